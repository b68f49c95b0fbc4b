"""Suggestions for error messages: the valid names that are most similar to a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def near_names(wrong: object, valid: Iterable[str], *, most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Up to ``most`` of the ``valid`` names that resemble ``wrong``, the most similar first.

    Args:
        cutoff: the least similarity, from 0 to 1 (`difflib.get_close_matches`).

    >>> near_names("e4m3fm", ["e4m3fn", "e5m2", "e4m3"])
    ['e4m3fn', 'e4m3']
    """
    return difflib.get_close_matches(str(wrong), list(valid), n=most, cutoff=cutoff)


def did_you_mean(wrong: object, valid: Iterable[str]) -> str:
    """A phrase for a message that suggests the most similar of the ``valid`` names; empty if none is similar.

    >>> did_you_mean("shufled", ["shuffled", "noisy"])
    " (did you mean 'shuffled'?)"
    """
    return suggest(near_names(wrong, valid, most=1))


def suggest(names: Sequence[str]) -> str:
    """A phrase for a message that suggests ``names``; empty if there are none.

    >>> suggest(["lm_head", "*.head"])
    " (did you mean 'lm_head' or '*.head'?)"
    """
    return f" (did you mean {' or '.join(map(repr, names))}?)" if names else ""
