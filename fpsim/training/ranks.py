"""One policy for all ranks of a parallel training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import distributed as dist

from fpsim.casts import Cast
from fpsim.policy import Policy
from fpsim.scaling.scale import Scale


def check_same_policy(
    policy: Policy | Mapping[str, Any] | None = None, group: dist.ProcessGroup | None = None
) -> Policy:
    """Make sure that every rank has the policy of rank 0. All ranks must call it, as any collective.

    Args:
        policy: a `Policy`, or the ``options`` of `torch.compile`.
        group: the ranks; None means all.

    Returns:
        The policy.

    Raises:
        ValueError: on every rank, if they differ: which ranks differ from rank 0, and in what. Or ``policy`` is none.
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
        lines = "; ".join(f"rank {rank}: {what}" for rank, what in differing.items())
        raise ValueError(f"the policies of these ranks are not that of rank 0: {lines}. Give all the same options")
    return own


def refuse_other_policy(policy: Policy, what: str) -> None:
    """Refuse a policy that is not the one with which another rank has compiled the same thing.

    Not a collective: it waits for nobody. The first rank to come leaves its policy in the store through which the ranks
    found each other, and the others compare theirs with it, the ``n``-th time they compile the same thing with what was
    left the ``n``-th time. Without other ranks nothing happens.

    Args:
        policy: of what is being compiled.
        what: names what is being compiled, on every rank in the same way.

    Raises:
        ValueError: another rank has another policy.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    own = json.dumps({"rank": dist.get_rank(), "policy": policy.to_json()})
    times = store.add(f"fpsim/compiled/{what}/{dist.get_rank()}", 1)
    first = json.loads(store.compare_set(f"fpsim/policy/{what}/{times}", "", own))
    firsts = Policy.from_json(first["policy"])
    if firsts != policy:
        raise ValueError(
            f"this is rank {dist.get_rank()}, whose policy is not that of rank {first['rank']}: "
            f"{differences(firsts, policy)}. Give all ranks the same options"
        )


def differences(first: Policy, other: Policy) -> str:
    """Where two policies differ: ``field is this, not that`` for each field, ``that`` being the first's."""
    pairs = {each.name: (getattr(first, each.name), getattr(other, each.name)) for each in fields(Policy)}
    return ", ".join(
        f"{name} is {_shown(this)!r}, not {_shown(that)!r}" for name, (that, this) in pairs.items() if this != that
    )


def _shown(value: Any) -> Any:
    """The value of a policy's field with text in place of casts and scales."""
    if isinstance(value, tuple):
        return tuple(map(_shown, value))
    return str(value) if isinstance(value, Cast | Scale) else value
