"""Accumulators of matrix products: how a sum is rounded, the machines that do so, and the product itself."""
