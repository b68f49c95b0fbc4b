"""Globs, the patterns that name modules and parameters."""

from __future__ import annotations

import fnmatch
from functools import lru_cache


@lru_cache(maxsize=65536)
def matches(glob: str, path: str) -> bool:
    """Whether ``glob`` matches ``path`` or the path of a module that contains it.

    Args:
        glob: a pattern of `fnmatch`, case-sensitive: ``layers.*.attn``, ``lm_head``.
        path: a dotted path; ``""`` is the root.

    >>> matches("layers.*.attn", "layers.3.attn.q_proj"), matches("lm_head", "model.lm_head")
    (True, False)
    """
    parts = path.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), glob) for n in range(1, len(parts) + 1))
