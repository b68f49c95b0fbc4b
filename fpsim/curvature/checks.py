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

from fpsim.curvature.data import NO_DATA, Data, Weight, call, fingerprint, why_batches_differ
from fpsim.curvature.linear import Operator, symmetry_tolerance
from fpsim.curvature.losses import INDEPENDENT, scalar_loss
from fpsim.curvature.products import OperationsSeen
from fpsim.curvature.vectors import Layout, Params, Select, layout
from fpsim.showing import Shown

#: An operator draws random numbers if its name contains one of these.
_RANDOM = ("rand", "bernoulli", "dropout", "normal_", "uniform_", "exponential", "multinomial", "geometric_", "cauchy_")


@dataclass(frozen=True)
class Symmetry(Shown):
    """Whether an operator is symmetric.

    Attributes:
        error: an estimate of ``|A - A^T| / |A|`` (`Operator.symmetry_error`).
        tolerance: the largest error at which the operator counts as symmetric.
        symmetric: whether the error is within the tolerance.
        products: the number of products with the operator.
        cost: that of the products in gradients (`Operator.cost`).
    """

    error: float
    tolerance: float
    symmetric: bool
    products: int
    cost: float


def check_symmetry(
    operator: Operator, *, tolerance: float | None = None, pairs: int = 2, generator: torch.Generator | None = None
) -> Symmetry:
    """Whether ``operator`` is symmetric, by ``2 * pairs`` products.

    Args:
        operator: any operator.
        tolerance: the largest error; None depends on the narrowest dtype of the parameters: 1e-6 for float64 (a loss
            may compute a part in float32), 1e-4 for float32, where forward rounding and float32 arithmetic stay below
            1e-5, 0.02 for float16 and 0.1 for bfloat16.
        pairs: the number of pairs of random vectors.
        generator: the source of the vectors; None is a fresh one with seed 0.
    """
    if tolerance is None:
        tolerance = symmetry_tolerance(operator)
    error = operator.symmetry_error(pairs=pairs, generator=generator)
    return Symmetry(error, tolerance, error <= tolerance, 2 * pairs, 2 * pairs * operator.cost)


@dataclass(frozen=True)
class Determinism(Shown):
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

    Raises:
        FloatingPointError: the loss, or its gradient, has infinities or NaN.
    """
    arranged = layout(params, select=select)
    data = Data.of(batches, weight)
    passes = ([fingerprint(batch) for batch, _ in data] for _ in range(2))
    first, second = passes
    if not first:
        raise ValueError(NO_DATA)
    reasons = list(why_batches_differ(first, second))
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
    value = scalar_loss(call(loss, arranged.substitute(variables), batch))
    if not torch.isfinite(value):
        raise FloatingPointError(f"the loss is {float(value)}: there is nothing to compare")
    if not value.requires_grad:
        raise ValueError(INDEPENDENT)
    pieces = torch.autograd.grad(value, variables, materialize_grads=True)
    joined = arranged.join(pieces).to(value.device)
    if not torch.isfinite(joined).all():
        raise FloatingPointError("the gradient has infinities or NaN: there is nothing to compare")
    return torch.cat([value.detach().reshape(1).to(arranged.dtype), joined])


def _difference(a: Tensor, b: Tensor) -> float:
    scale = float(torch.linalg.vector_norm(a, dtype=torch.float64))
    gap = float(torch.linalg.vector_norm(a - b, dtype=torch.float64))
    return gap / scale if scale else gap
