"""Attention as kernels compute it: in tiles, with an online softmax, every step rounded."""
