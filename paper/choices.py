"""The check of a value that must be one of a few names."""

from __future__ import annotations

from collections.abc import Iterable

from fpsim.suggestions import did_you_mean


def check_choice(name: str, value: object, choices: Iterable[str | None]) -> None:
    """Check that ``value`` is one of ``choices``.

    Args:
        name: what the message calls the value.

    Raises:
        ValueError: it is not; the message lists the choices and names the nearest.

    >>> check_choice("schedule", "cosin", ["cosine", "constant"])
    Traceback (most recent call last):
    ValueError: unknown schedule 'cosin' (did you mean 'cosine'?): use one of cosine, constant
    """
    choices = list(choices)
    if value not in choices:
        hint = did_you_mean(value, filter(None, choices))
        raise ValueError(f"unknown {name} {value!r}{hint}: use one of {', '.join(map(str, choices))}")
