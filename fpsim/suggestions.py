"""Suggestions for error messages: the valid names that are most similar to a wrong one."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

_Class = TypeVar("_Class")


def near_names(wrong: object, valid: Iterable[str], *, most: int = 3, cutoff: float = 0.6) -> list[str]:
    """Up to ``most`` of the ``valid`` names that resemble ``wrong``, the most similar first.

    Args:
        cutoff: the least similarity, from 0 to 1 (`difflib.get_close_matches`).

    >>> near_names("e4m3fm", ["e4m3fn", "e5m2", "e4m3"])
    ['e4m3fn', 'e4m3']
    """
    return difflib.get_close_matches(str(wrong), list(valid), n=most, cutoff=cutoff)


def did_you_mean(wrong: object, valid: Iterable[str]) -> str:
    """A phrase for a message that suggests the most similar of the other ``valid`` names; empty if none is similar.

    >>> did_you_mean("shufled", ["shuffled", "noisy"])
    " (did you mean 'shuffled'?)"
    """
    return suggest(near_names(wrong, (name for name in valid if name != str(wrong)), most=1))


def first_words(names: Iterable[str]) -> list[str]:
    """The words with which ``names`` begin, which may go on with options.

    >>> first_words(["mx[:32]", "block:128x128", "block:128", "row"])
    ['mx', 'block', 'row']
    """
    return list(dict.fromkeys(name.partition("[")[0].partition(":")[0] for name in names))


def suggest(names: Sequence[str]) -> str:
    """A phrase for a message that suggests ``names``; empty if there are none.

    >>> suggest(["lm_head", "*.head"])
    " (did you mean 'lm_head' or '*.head'?)"
    """
    return f" (did you mean {' or '.join(map(repr, names))}?)" if names else ""


def named_arguments(cls: type[_Class]) -> type[_Class]:
    """A decorator of a data class: an argument that is no field is a TypeError which lists the fields."""
    construct, valid = cls.__init__, [field.name for field in fields(cls) if field.init]  # type: ignore[arg-type]

    @functools.wraps(construct)
    def checked(self: _Class, *args: Any, **kwargs: Any) -> None:
        for key in kwargs:
            if key not in valid:
                hint = did_you_mean(key, valid)
                raise TypeError(f"{cls.__name__} has no field {key!r}{hint}: its fields are {', '.join(valid)}")
        construct(self, *args, **kwargs)

    cls.__init__ = checked  # type: ignore[assignment]
    return cls
