"""Measuring what rounding does to numbers while a rewritten graph runs."""
