"""Checks that all ranks of parallel training use the same policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import distributed as dist

from fpsim.casts import Cast
from fpsim.policy import Policy
from fpsim.scaling.scale import Scale
from fpsim.transforms.transform import Transform


def check_same_policy(
    policy: Policy | Mapping[str, Any] | None = None, group: dist.ProcessGroup | None = None
) -> Policy:
    """Check that every rank has the policy of rank 0. It is a collective: all ranks must call it.

    Args:
        policy: a `Policy`, or the ``options`` of `torch.compile`.
        group: the ranks; None means all.

    Returns:
        The policy.

    Raises:
        ValueError: the policies differ. Every rank raises it, and the message says which ranks differ from rank 0, and
            in which fields. Also if ``policy`` is not a policy.
        RuntimeError: `torch.distributed` is not initialised.

    >>> check_same_policy({"format": "e4m3fn"})  # doctest: +SKIP
    """
    own = policy if isinstance(policy, Policy) else Policy.from_options(policy)
    if not dist.is_initialized():
        raise RuntimeError("there are no other ranks: call torch.distributed.init_process_group first")
    texts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(texts, own.to_json(), group=group)
    first, *others = map(Policy.from_json, texts)
    differing = {rank: differences(first, other) for rank, other in enumerate(others, 1) if other != first}
    if differing:
        lines = "; ".join(f"rank {rank}: {text}" for rank, text in differing.items())
        raise ValueError(f"these ranks have other policies than rank 0: {lines}. Give all ranks the same options")
    return own


def refuse_other_policy(policy: Policy, function: str) -> None:
    """Raise an error if another rank compiled the same function with another policy.

    This is not a collective: no rank waits. The first rank stores its policy in the default store of the process group.
    The other ranks compare their policies with it. If a function is compiled several times, the ``n``-th compilations
    are compared with each other. Without other ranks nothing happens.

    Args:
        policy: the policy with which this rank compiles.
        function: a name of the compiled function that is the same on every rank.

    Raises:
        ValueError: another rank has another policy.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    own = json.dumps({"rank": dist.get_rank(), "policy": policy.to_json()})
    times = store.add(f"fpsim/compiled/{function}/{dist.get_rank()}", 1)
    first = json.loads(store.compare_set(f"fpsim/policy/{function}/{times}", "", own))
    other = Policy.from_json(first["policy"])
    if other != policy:
        raise ValueError(
            f"this is rank {dist.get_rank()}, whose policy is not that of rank {first['rank']}: "
            f"{differences(other, policy)}. Give all ranks the same options"
        )


def differences(first: Policy, other: Policy) -> str:
    """The fields in which two policies differ, as text: ``field is X, not Y``. ``Y`` is the value in ``first``."""
    pairs = {each.name: (getattr(first, each.name), getattr(other, each.name)) for each in fields(Policy)}
    return ", ".join(
        f"{name} is {_shown(theirs)!r}, not {_shown(ours)!r}"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs
    )


def _shown(value: Any) -> Any:
    """The value of a policy's field, with casts, scales and transforms as text."""
    if isinstance(value, tuple):
        return tuple(map(_shown, value))
    return str(value) if isinstance(value, Cast | Scale | Transform) else value
