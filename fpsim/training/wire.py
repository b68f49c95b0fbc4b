"""Gradients that processes add in a narrow format, as FP8-LM does: each partial sum is rounded.

`fpsim.training.gradients` rounds what a rank sends, and the sum is wide. Here the sum is narrow too, so the scale has
to leave room for it: FP8-LM's code divides by the root of the number of ranks, and its paper has an automatic factor.

Source: Peng et al., FP8-LM (arXiv 2310.18313), section 2.1, and the code, MS-AMP 9746ea8, ``msamp/nn/distributed.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch import distributed as dist

from fpsim.casts import CastLike, parse_cast
from fpsim.formats import FloatFormat
from fpsim.scaling.ops import power_of_two_scale
from fpsim.training.arithmetic import rounding_to


@dataclass(frozen=True)
class AutomaticFactor:
    """FP8-LM's factor mu of gradients before their sum, and its rule (paper, section 2.1).

    Attributes:
        mu: the factor in use.
        threshold: the share of elements at the format's largest value above which mu is halved. The paper has 0.001 %.
        growth_steps: the number of steps below the threshold in which mu doubles, a little in each.
    """

    mu: float = 1.0
    threshold: float = 1e-5
    growth_steps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.mu < math.inf or not 0 <= self.threshold < 1 or self.growth_steps < 1:
            raise ValueError(f"mu is positive, threshold a share and growth_steps at least 1, got {self}")

    def after(self, saturated: float) -> AutomaticFactor:
        """The factor of the next step, if a share ``saturated`` of the sums is at the format's largest value.

        >>> AutomaticFactor().after(0.01).mu, AutomaticFactor(growth_steps=1).after(0.0).mu
        (0.5, 2.0)
        """
        factor = 0.5 if saturated > self.threshold else 2.0 ** (1 / self.growth_steps)
        return replace(self, mu=self.mu * factor)


@dataclass(frozen=True)
class NarrowMean:
    """The result of `mean_in_format`.

    Attributes:
        mean: the average gradient, of the shape and dtype of the gradients.
        saturated: how many elements of the sum have the format's largest magnitude.
    """

    mean: Tensor
    saturated: int


@torch.no_grad()
def mean_in_format(
    gradients: Sequence[Tensor],
    format: CastLike = "e4m3fn/sat_finite",
    *,
    factor: float | None = None,
    own_scales: bool = False,
) -> NarrowMean:
    """The mean of the gradients of W ranks, with every partial sum rounded to ``format``.

    With amax the largest magnitude of all ranks, and max that of the format::

        s = 2^floor(log2(max / amax)) factor            t = q(g_1 s)
        t = q(t + q(g_r s)) for r = 2 ... W             mean = t (1/s) / W

    Args:
        gradients: the gradients of the ranks, of one shape and dtype. float16 and bfloat16 are computed in float32, and
            the mean is rounded to their dtype.
        format: a floating-point format, with modes but without a scale.
        factor: the factor of the scale. None means 1/sqrt(W), as in MS-AMP. The paper's is `AutomaticFactor.mu`.
        own_scales: whether a rank first rounds its gradient with its own s_r = 2^floor(log2(max / amax_r)), and then
            the result again with the least s_r of all ranks times ``factor``: the paper's text.

    Returns:
        The mean, and how many elements of the sum t are at the format's largest magnitude. An infinity or a NaN in a
        gradient makes the power of two 1, and then becomes what the format's overflow mode says.

    Raises:
        ValueError: there is no gradient, shapes or dtypes differ, the cast has a scale or is stochastic, the factor is
            not positive.

    >>> ranks = [torch.tensor([1.0, 0.0625]), torch.tensor([1.0, 0.0703125])]
    >>> mean_in_format(ranks, factor=1.0)  # s = 256: the sums 512 and 34 become 448 and 32 (a tie)
    NarrowMean(mean=tensor([0.8750, 0.0625]), saturated=1)
    """
    kinds = {(g.shape, g.dtype) for g in gradients}
    if len(kinds) != 1:
        raise ValueError(
            f"the gradients of all ranks have one shape and dtype, got {len(gradients)} of {kinds or 'none'}"
        )
    fmt, q = _format(format), rounding_to(format, "mean_in_format")
    ranks = len(gradients)
    factor = 1 / math.sqrt(ranks) if factor is None else factor
    if not 0 < factor < math.inf:
        raise ValueError(f"the factor of a sum of gradients is a positive number, got {factor}")
    dtype = gradients[0].dtype
    wide = [g.detach().to(torch.promote_types(dtype, torch.float32)) for g in gradients]
    powers = torch.stack([power_of_two_scale(g, fmt) for g in wide])
    power = powers.min() if own_scales else power_of_two_scale(torch.stack(wide), fmt)
    s = power * torch.tensor(factor, dtype=power.dtype)
    if own_scales:
        wide = [q(g * own) / own for g, own in zip(wide, powers, strict=True)]
    total = q(wide[0] * s)
    for g in wide[1:]:
        total = q(total + q(g * s))
    mean = total * ((1 / s) / ranks)
    return NarrowMean(mean.to(dtype), int((total.abs() == fmt.max).sum()))


# -- exchange between processes ----------------------------------------------------------------------------------------


@dataclass
class NarrowExchange:
    """How `DistributedDataParallel` averages gradients in a narrow format: the state of `narrow_exchange_hook`.

        exchange = NarrowExchange("e4m3fn", factor=AutomaticFactor())
        parallel.register_comm_hook(exchange, narrow_exchange_hook)

    Attributes:
        format, own_scales: the arguments of `mean_in_format`.
        factor: its argument too, or an `AutomaticFactor`, which each backward pass replaces by that of the next step.
        parameters: the parameters whose gradients are averaged in the format. Those of other parameters are averaged in
            their dtype. None means all.
        group: the process group; None means the default one.
        saturated, elements: how many elements of the last pass were averaged in the format, and how many of their sums
            were at its largest magnitude.
    """

    format: CastLike = "e4m3fn/sat_finite"
    factor: float | AutomaticFactor | None = None
    own_scales: bool = False
    parameters: Iterable[Tensor] | None = None
    group: dist.ProcessGroup | None = None
    saturated: int = 0
    elements: int = 0

    def __post_init__(self) -> None:
        _format(self.format)
        rounding_to(self.format, "NarrowExchange")
        if self.parameters is not None:
            self.parameters = frozenset(self.parameters)

    def state_dict(self) -> dict[str, float]:
        """The automatic factor in use, for `load_state_dict` of an exchange that resumes; empty without one."""
        return {"mu": self.factor.mu} if isinstance(self.factor, AutomaticFactor) else {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Take the factor from `state_dict`.

        Raises:
            ValueError: one of the two exchanges has an automatic factor, and the other has none.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(f"the exchange has the state {sorted(self.state_dict())}, and was given {sorted(state)}")
        if isinstance(self.factor, AutomaticFactor):
            self.factor = replace(self.factor, mu=state["mu"])


def narrow_exchange_hook(state: NarrowExchange, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook that averages gradients by `mean_in_format`, with the gradients of all ranks in their order.

    It gathers the gradients of all ranks on each rank, since what is simulated is the result of a narrow sum and not
    its traffic. So all ranks get the same bits. A ring of W ranks adds each part of a buffer in another order.

    Raises:
        ValueError: a gradient is sparse.
    """
    group = state.group if state.group is not None else dist.group.WORLD
    buffer = bucket.buffer()
    if buffer.is_sparse:
        raise ValueError("sparse gradients are not averaged in a narrow format: leave sparse=True out of the embedding")
    gathered = [torch.empty_like(buffer) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, buffer, group=group)
    if bucket.index() == 0:
        state.saturated = state.elements = 0
    gradients = bucket.gradients()
    first = min(part.storage_offset() for part in gradients)
    factor = state.factor.mu if isinstance(state.factor, AutomaticFactor) else state.factor
    for p, part in zip(bucket.parameters(), gradients, strict=True):
        own = slice(part.storage_offset() - first, part.storage_offset() - first + part.numel())
        ranks = [each[own] for each in gathered]
        if state.parameters is None or p in state.parameters:
            result = mean_in_format(ranks, state.format, factor=factor, own_scales=state.own_scales)
            buffer[own] = result.mean
            state.saturated, state.elements = state.saturated + result.saturated, state.elements + part.numel()
        else:
            buffer[own] = torch.stack(ranks).sum(0) / len(ranks)
    if bucket.is_last() and isinstance(state.factor, AutomaticFactor) and state.elements:
        state.factor = state.factor.after(state.saturated / state.elements)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(buffer)
    return done


narrow_exchange_hook.__annotations__ = {}  # register_comm_hook expects types, and in this file annotations are strings


def _format(format: CastLike) -> FloatFormat:
    cast = parse_cast(format)
    if cast is None or not isinstance(cast.format, FloatFormat) or cast.scale is not None or cast.transform is not None:
        raise ValueError(f"gradients are added in a floating-point format without a scale of its own, got {format!r}")
    return cast.format
