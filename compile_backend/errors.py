"""The error and the warning of the backend."""

from __future__ import annotations


class UnroundedError(RuntimeError):
    """The policy asks for rounding that the backend cannot do. No product stays unrounded without this error."""


class UnroundedWarning(UserWarning):
    """A call of a compiled model ran products, or all of its code, without rounding."""
