"""Scales: factors that bring tensors into the range of a format before they are rounded."""
