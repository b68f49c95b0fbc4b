"""Rounding tensors: the algorithm, written once, and what runs it on CPU, on GPU and in compiled code."""
