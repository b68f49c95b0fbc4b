"""What several recipes share: the fields of their policies, and the policy of modules that stay high."""

from __future__ import annotations

from typing import Any

from fpsim.policy import Policy
from fpsim.policy.presets import LINEAR, by_role

__all__ = ["LINEAR", "by_role", "kept_in", "results", "split_in_backward"]


def results(high: str | None, *kinds: str) -> dict[str, Any]:
    """The fields that round the results of products to ``high``, of all kinds or of these; none for None."""
    if high is None:
        return {}
    return {kind: {"output": high} for kind in kinds} if kinds else {"output": high}


def kept_in(high: str | None) -> Policy | None:
    """The policy of modules whose products have operands and results in ``high``; None for None."""
    return None if high is None else Policy(format=high, output=high)


def split_in_backward(accumulator: str | None) -> dict[str, Any]:
    """The fields of sums in ``accumulator``: all along in fprop, promoted to float32 every 128 products in backward."""
    if accumulator is None:
        return {}
    return {"accumulator": accumulator, "promote": {"dgrad": 128, "wgrad": 128}}
