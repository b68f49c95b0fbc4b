"""The flags of one operation, without its value."""

from __future__ import annotations

from fpsim.reference import Flags, with_flags


def flags(operation, *operands, format="fp16", **options) -> Flags:
    return with_flags(operation, *operands, format=format, **options).flags
