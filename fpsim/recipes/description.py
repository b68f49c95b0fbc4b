"""The text of a recipe's policy: which tensor has which format, rounding and scale."""

from __future__ import annotations

import textwrap

from fpsim.attention.flash import FlashAttention
from fpsim.casts import Cast, usual_overflow
from fpsim.formats import expand
from fpsim.policy import Policy
from fpsim.policy.policy import KINDS, ROLES

#: The operands of the products of linear layers, by kind.
_OPERANDS = {"fprop": ("activation", "weight"), "dgrad": ("gradient", "weight"), "wgrad": ("gradient", "activation")}
_WIDTH = 120


def wrapped(heading: str, text: str) -> str:
    """A line of a description, broken where it is longer than the screen."""
    return textwrap.fill(text, _WIDTH, initial_indent=f"  {heading:<12} ", subsequent_indent=" " * 15)


def lines_of_policy(policy: Policy | None) -> list[tuple[str, str]]:
    """Headings and texts: a line for each kind of product, one for each field that says more, and one for each rule."""
    if policy is None:
        return [("policy", "none: the model is not compiled")]
    lines = [(kind, _product(policy, kind)) for kind in KINDS]
    results = {name: cast for name in ("forward", "backward") if (cast := policy.elementwise_cast(name)) is not None}
    if results:
        lines.append(("other results", ", ".join(f"{name} {_text(cast)}" for name, cast in results.items())))
    if isinstance(policy.attention, FlashAttention):
        lines.append(("attention", f"computed in tiles: {policy.attention.written()}"))
    elif policy.products == "weights":
        lines.append(("attention", "its products are not rounded"))
    if policy.skip:
        lines.append(("skip", ", ".join(policy.skip)))
    return lines + [(glob, short(rule)) for glob, rule in policy.modules]


def short(policy: Policy | None) -> str:
    """A policy in a few words: ``bf16``, or the casts of its products."""
    if policy is None:
        return "unrounded"
    casts = {policy.cast(kind, role) for kind, roles in _OPERANDS.items() for role in roles}
    if len(casts) == 1:
        return _text(casts.pop())
    of_roles = {role: {policy.cast(kind, role) for kind in KINDS if role in _OPERANDS[kind]} for role in ROLES}
    if all(len(found) == 1 for found in of_roles.values()):
        return "; ".join(f"{role} {_text(found.pop())}" for role, found in of_roles.items())
    return "; ".join(f"{kind}: {_product(policy, kind)}" for kind in KINDS)


def _product(policy: Policy, kind: str) -> str:
    texts = [f"{role} {_text(policy.cast(kind, role))}" for role in _OPERANDS[kind]]
    if (transform := policy.product_transform(kind)) is not None:
        texts.append(f"both {transform}")
    if (accumulator := policy.accumulator_of(kind)) is not None:
        texts.append(f"sums {accumulator}")
    if (output := policy.output_cast(kind)) is not None:
        texts.append(f"result {_text(output)}")
    return "; ".join(texts)


def _text(cast: Cast | None) -> str:
    """The text of a cast without the modes that are usual."""
    if cast is None:
        return "unrounded"
    usual = ("nearest_even", usual_overflow(cast.format, cast.scale))
    name, *modes = cast.written.split("/")
    element = expand(name).partition("/")[0]
    return "/".join([element, *(mode for mode in modes if mode not in usual)])
