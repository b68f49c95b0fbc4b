"""Whether an operator is symmetric, and whether its loss is the same at every call; if not, the reasons.

Lanczos and related algorithms assume one symmetric matrix. Dropout, stochastic rounding with new noise at each call,
and shuffled data give another matrix at each product. Rounded gradients give a matrix that is not symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fpsim.curvature.data import NO_BATCH, Data, Weight, call
from fpsim.curvature.linear import Operator
from fpsim.curvature.products import OperationsSeen
from fpsim.curvature.vectors import Layout, Params, Select, layout

#: An operator draws random numbers if its name contains one of these.
_RANDOM = ("rand", "bernoulli", "dropout", "normal_", "uniform_", "exponential", "multinomial", "geometric_", "cauchy_")


@dataclass(frozen=True)
class Symmetry:
    """Whether an operator is symmetric.

    Attributes:
        error: an estimate of ``|A - A^T| / |A|`` (`Operator.symmetry_error`).
        tolerance: the largest error at which the operator counts as symmetric.
        symmetric: whether the error is within the tolerance.
    """

    error: float
    tolerance: float
    symmetric: bool


def check_symmetry(
    operator: Operator, *, tolerance: float | None = None, pairs: int = 2, generator: torch.Generator | None = None
) -> Symmetry:
    """Whether ``operator`` is symmetric, by ``2 * pairs`` products.

    Args:
        operator: any operator.
        tolerance: the largest error; None is 1e-9 for float64 vectors, and 1e-4 for float32 vectors, where forward
            rounding and float32 arithmetic stay below 1e-5.
        pairs: the number of pairs of random vectors.
        generator: the source of the vectors; None is a fresh one with seed 0.
    """
    if tolerance is None:
        tolerance = 1e-9 if operator.dtype == torch.float64 else 1e-4
    error = operator.symmetry_error(pairs=pairs, generator=generator)
    return Symmetry(error, tolerance, error <= tolerance)


@dataclass(frozen=True)
class Determinism:
    """Whether a loss and its gradient are the same at every call.

    Attributes:
        deterministic: whether loss and gradient were the same, bit for bit, and the data came in the same order.
        difference: the largest relative difference of loss and gradient between two calls.
        reasons: why not, in words; also any reason why the result depends on the cut of the data into batches.
    """

    deterministic: bool
    difference: float
    reasons: tuple[str, ...]


def check_determinism(
    loss: Callable[..., Tensor],
    params: Params,
    *,
    batches: Iterable[Any] | None = None,
    weight: Weight = None,
    select: Select = None,
    limit: int = 3,
) -> Determinism:
    """Whether `hessian` of the same arguments is one matrix, and if not, why.

    It computes the loss and its gradient twice, and leaves torch's global random state unchanged.

    Args:
        loss, params, batches, weight, select: as for `hessian`.
        limit: how many batches to differentiate; all batches are read, twice.
    """
    arranged = layout(params, select=select)
    data = Data.of(batches, weight)
    reasons = _order_of(data)
    deterministic = not reasons
    difference, training = 0.0, False
    for index, (batch, _) in enumerate(data):
        if index == limit:
            break
        found, why, trains = _of_batch(loss, arranged, batch)
        difference, training = max(difference, found), training or trains
        reasons += [reason for reason in why if reason not in reasons]
        deterministic = deterministic and not why
    if training and batches is not None:
        reasons.append(
            "batch_norm in training mode makes each sample's loss depend on its batch, so the result depends on how "
            "the data are cut and shuffled into batches: call model.eval(), or use one batch"
        )
    return Determinism(deterministic, difference, tuple(reasons))


def _of_batch(loss: Callable[..., Tensor], arranged: Layout, batch: Any) -> tuple[float, list[str], bool]:
    """The relative difference of two gradients, its reasons, and whether a batch_norm is in training mode."""
    devices = list({value.device.index for value in arranged.values if value.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        first = _gradient(loss, arranged, batch)  # a loss under a policy traces itself, which fails inside the mode
        with OperationsSeen() as seen:
            second = _gradient(loss, arranged, batch)
        training = any(args[5] is True for name, args in seen.calls if len(args) > 5)
        difference = _difference(first, second)
        if difference == 0:
            return 0.0, [], training
        state = torch.random.get_rng_state()
        states = [torch.cuda.get_rng_state(device) for device in devices]
        replayed = []
        for _ in range(2):
            torch.random.set_rng_state(state)
            for device, saved in zip(devices, states, strict=True):
                torch.cuda.set_rng_state(saved, device)
            replayed.append(_gradient(loss, arranged, batch))
    random = sorted(name for name in seen.names if any(part in name for part in _RANDOM))
    reasons = []
    if random:
        reasons.append(_why_random(random))
    left = _difference(*replayed)
    if left:
        reasons.append(_why_otherwise(left))
    return difference, reasons or [_why_otherwise(difference)], training


def _why_random(names: list[str]) -> str:
    drawn = ", ".join(names)
    if any("dropout" in name or "bernoulli" in name for name in names):
        return f"dropout is active, or the loss draws other random signs at each call ({drawn}): call model.eval()"
    return (
        f"the loss draws random numbers at each call ({drawn}): draw them once and pass them in; for stochastic "
        "rounding, use frozen noise or a frozen seed"
    )


def _why_otherwise(difference: float) -> str:
    if difference < 1e-4:
        return (
            f"gradients differ by {difference:.1e} between equal calls: kernels sum in varying order "
            "(torch.use_deterministic_algorithms(True) makes them repeat)"
        )
    return (
        f"the loss changes from call to call (gradients differ by {difference:.1e}) although no random numbers explain "
        "it: it keeps a state, such as running statistics, a counter or a cache"
    )


def _gradient(loss: Callable[..., Tensor], arranged: Layout, batch: Any) -> Tensor:
    variables = [value.detach().requires_grad_() for value in arranged.values]
    value = call(loss, arranged.substitute(variables), batch)
    pieces = torch.autograd.grad(value, variables, materialize_grads=True)
    return torch.cat([value.detach().reshape(1).to(arranged.dtype), arranged.join(pieces).to(value.device)])


def _difference(a: Tensor, b: Tensor) -> float:
    scale = float(torch.linalg.vector_norm(a, dtype=torch.float64))
    gap = float(torch.linalg.vector_norm(a - b, dtype=torch.float64))
    return gap / scale if scale else gap


def _order_of(data: Data) -> list[str]:
    """Why the batches differ between two passes, if they do."""
    first, second = ([_fingerprint(batch) for batch, _ in data] for _ in range(2))
    if first == second:
        return []
    if sorted(first) == sorted(second):
        return [
            "the batches come in another order at each pass (shuffle=True): results differ only by rounding errors, "
            "but pass shuffle=False for results that repeat"
        ]
    return [
        "the batches differ from pass to pass: the loader shuffles samples between batches (shuffle=True), or augments "
        "at random; pass shuffle=False, or list(loader)"
    ]


def _fingerprint(batch: Any) -> tuple[str, ...]:
    """The shape, the dtype and two weighted sums of each tensor of a batch; other leaves as text."""
    if batch is NO_BATCH:
        return ()
    parts = []
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().reshape(-1).to(torch.float64)
            ramp = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
            parts.append(f"{tuple(leaf.shape)} {leaf.dtype} {float(flat.sum())!r} {float((flat * ramp).sum())!r}")
        else:
            parts.append(repr(leaf))
    return tuple(parts)
