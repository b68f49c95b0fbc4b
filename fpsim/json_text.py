"""Reading JSON that a user or a file gives: every text is a value or a `ValueError`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

#: The deepest nesting of lists and objects that fpsim reads. Deeper ones would exhaust Python's stack somewhere.
MOST_LEVELS = 100


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: ``text`` is not JSON, an object has a key twice, or it is nested in more than `MOST_LEVELS` levels.
        TypeError: ``text`` is not a string.

    >>> parse_json('{"format": "bf16"}')
    {'format': 'bf16'}
    """
    if not isinstance(text, str):
        raise TypeError(f"JSON is read from a string, got {type(text).__name__}")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise _too_deep() from None
    check_depth(value)
    return value


def parse_versioned(text: str, kind: str, version: int) -> dict[str, Any]:
    """The JSON object in which fpsim wrote a ``kind`` of value (such as a policy), without its entry ``version``.

    Raises:
        ValueError: ``text`` is not JSON (`parse_json`) or no object, or has another version than ``version``.

    >>> parse_versioned('{"version": 1, "format": "bf16"}', "policy", 1)
    {'format': 'bf16'}
    """
    try:
        given = parse_json(text)
    except ValueError as error:
        raise ValueError(f"a {kind} must be valid JSON: {error}") from None
    if not isinstance(given, dict):
        raise ValueError(f"a {kind} must be a JSON object, got {type(given).__name__}")
    written = given.pop("version", version)
    if written != version:
        raise ValueError(f"this {kind} has version {written}, this fpsim reads version {version}: upgrade fpsim")
    return given


def check_depth(value: object) -> None:
    """Raise an error if mappings, lists and tuples are nested in ``value`` in more than `MOST_LEVELS` levels.

    Raises:
        ValueError: they are.
    """
    level = [value]
    for _ in range(MOST_LEVELS + 1):
        parents = [each for each in level if isinstance(each, Mapping | list | tuple)]
        if not parents:
            return
        level = [child for each in parents for child in (each.values() if isinstance(each, Mapping) else each)]
    raise _too_deep()


def _too_deep() -> ValueError:
    return ValueError(f"it is nested too deeply: fpsim reads at most {MOST_LEVELS} levels of lists and mappings")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if any(key == other for other, _ in pairs[:i]))
        raise ValueError(f"the key {twice!r} stands twice in one object: leave one of the two out")
    return result
