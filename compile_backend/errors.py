"""The error of the backend."""

from __future__ import annotations


class UnroundedError(RuntimeError):
    """The policy asks for rounding that the backend cannot do. No product stays unrounded without this error."""
