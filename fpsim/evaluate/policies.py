"""Policies as people give them: values, fields, names of presets, formats, and files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from fpsim.formats import format_name
from fpsim.policy import Policy
from fpsim.policy.policy import PRESETS
from fpsim.policy.shorthand import parse_shorthand

#: A policy, its fields, a name that `parse_policy` reads, or a dtype of torch; None rounds nothing.
PolicyLike = Policy | Mapping[str, Any] | str | torch.dtype | None

#: The name of the model in which nothing is rounded.
UNROUNDED = "unrounded"

#: The policy under which nothing is rounded.
NOTHING = Policy(format="none")


def parse_policy(given: PolicyLike) -> Policy | None:
    """The policy that ``given`` stands for; None if nothing is to be rounded.

    A text is the name of a preset (``bf16``, ``mxfp8``, ``nvfp4``, ``paper:e8m3``), a cast for all operands
    (``e4m3fn``, ``e8m3/toward_zero``), two casts for forward and backward (``e4m3fn+e5m2``), or the path of a file that
    `fpsim.Policy.to_json` wrote (``best.json``). ``unrounded`` and None round nothing. A
    dtype of torch is the format of all operands: ``torch.bfloat16`` is ``Policy(format="bfloat16")``, and not the
    preset ``bf16``, which rounds results too.

    Raises:
        ValueError, TypeError: it is none of these.
        FileNotFoundError: there is no such file.

    >>> parse_policy("bf16") == Policy.preset("bf16"), parse_policy("e4m3fn") == Policy(format="e4m3fn")
    (True, True)
    """
    if given is None or given == UNROUNDED:
        return None
    given = format_name(given)
    if isinstance(given, Mapping):
        return Policy.from_options(given)
    if not isinstance(given, str):
        return Policy.from_options({"policy": given})
    given = given.strip()
    if given in PRESETS:
        return Policy.preset(given)
    if given.endswith(".json"):
        return Policy.from_json(Path(given).read_text(encoding="utf-8"))
    if "," in given:
        raise ValueError(
            f"{given!r} has a comma, which no policy has: name policies one by one, in a list or by an option for each"
        )
    options = parse_shorthand(given)
    return Policy(format=given) if options is None else Policy.from_options(options)


def named_policies(given: Mapping[str, PolicyLike] | Iterable[PolicyLike] | PolicyLike) -> dict[str, Policy | None]:
    """Policies by name: a mapping's keys, or else the text of each policy.

    Raises:
        ValueError: two have the same name, one that rounds has the name ``unrounded``, a mapping has the fields of one
            policy in place of names, or there is no policy.
    """
    if isinstance(given, Policy | str | torch.dtype) or given is None:
        given = [given]
    if isinstance(given, Mapping) and given and _is_policy(given):
        raise ValueError(f"{dict(given)} is one policy, and not a mapping from names to policies: give it in a list")
    pairs = list(given.items()) if isinstance(given, Mapping) else [(_name(each), each) for each in given]
    result: dict[str, Policy | None] = {}
    for name, policy in pairs:
        if name in result:
            raise ValueError(f"the policy {name!r} is given twice: leave one out, or give each a name in a mapping")
        result[str(name)] = parse_policy(policy)
        if name == UNROUNDED and result[name] is not None:
            raise ValueError(f"the name {UNROUNDED!r} is that of the model without rounding: give the policy another")
    if not result:
        raise ValueError("there is no policy: give at least one, such as 'bf16'")
    return result


def forward_only(policy: Policy) -> Policy:
    """``policy`` without the roundings of the backward pass.

    >>> nvfp4 = Policy.preset("nvfp4")
    >>> nvfp4.is_stochastic, forward_only(nvfp4).is_stochastic
    (True, False)
    """
    operands = {role: policy.cast("fprop", role) for role in ("activation", "weight")}
    results = policy.elementwise_cast("forward")
    return replace(
        policy,
        format="none",
        activation=None,
        weight=None,
        gradient=None,
        output=None,
        fprop={key: each or "none" for key, each in {**operands, "output": policy.output_cast("fprop")}.items()},
        dgrad=(),
        wgrad=(),
        elementwise=() if results is None else {"forward": results},
        modules=[(glob, None if rule is None else forward_only(rule)) for glob, rule in _rules(policy)],
    )


def _rules(policy: Policy) -> Sequence[tuple[str, Policy | None]]:
    return cast(Sequence[tuple[str, Policy | None]], policy.modules)  # as a policy stores them


def _is_policy(given: Mapping[str, Any]) -> bool:
    try:
        Policy.from_options(given)
    except (TypeError, ValueError):
        return False
    return True


def _name(policy: PolicyLike) -> str:
    if policy is None:
        return UNROUNDED
    policy = format_name(policy)
    if isinstance(policy, str):
        return policy.strip()
    parsed = parse_policy(policy)
    return UNROUNDED if parsed is None else ", ".join(f"{k}={_text(v)}" for k, v in parsed.to_dict().items())


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
