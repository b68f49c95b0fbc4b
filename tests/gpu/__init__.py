"""The proof and the benchmarks that need a GPU: ``python -m tests.gpu``."""
