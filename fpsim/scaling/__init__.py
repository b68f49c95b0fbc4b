"""Scales: factors that bring numbers into the range of a format before they are rounded."""
