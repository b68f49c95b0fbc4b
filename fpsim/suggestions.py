"""Slips of the pen: what to add to the complaint about a name that is none of the valid ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(wrong: object, valid: Iterable[str]) -> str:
    """The nearest of ``valid`` in words, or nothing where none is near.

    >>> did_you_mean("shufled", ["shuffled", "noisy"])
    " (did you mean 'shuffled'?)"
    """
    near = difflib.get_close_matches(str(wrong), list(valid), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
