"""What a run tells of itself beside its loss: signals that may warn of divergence, and how formats fit its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fpsim import curvature, sharpness
from fpsim.formats import parse_format
from fpsim.policy.policy import ROLES

#: Keskar's two boxes; the paper gives no number.
EPSILONS = (5e-4, 1e-3)
#: Products with the Hessian per estimate, at most, and its relative residual.
HESSIAN_PRODUCTS, HESSIAN_TOLERANCE = 40, 0.05


def logit_signals(logits: Tensor, targets: Tensor, *, lbfgsb: bool = False) -> dict[str, float]:
    """Means over tokens of the sharpness in both boxes and of the logits, and the largest |z|.

    Args:
        logits: shape (tokens, vocabulary).
        targets: int64, shape (tokens,).
        lbfgsb: search the boxes too, as the paper did (milliseconds per token).

    Returns:
        By the names of `fpsim.paper.training.Record`. Where no token has a finite loss, all are NaN.
    """
    small, large = EPSILONS
    found = sharpness.logit_metrics(logits, targets, epsilon=small)
    signals = {
        "sharpness_5e4": found.sharpness,
        "sharpness_1e3": sharpness.logit(logits, targets, epsilon=large),
        "mean_logit": found.mean_logit,
    }
    if lbfgsb:
        for name, epsilon in (("lbfgsb_5e4", small), ("lbfgsb_1e3", large)):
            signals[name] = sharpness.logit(logits, targets, epsilon=epsilon, method="lbfgsb")
    return {
        **{name: float(values.nanmean()) for name, values in signals.items()},
        "max_abs_logit": float(found.max_abs_logit.max()),
    }


def hessian_eigenvalue(loss: nn.Module, batch: tuple[Tensor, Tensor], *, seed: int) -> float:
    """The largest eigenvalue of the Hessian of ``loss`` with respect to its parameters, on one batch.

    Args:
        loss: inputs and targets to the loss, neither compiled nor with fused attention (it has no second derivative).
        seed: of the first vector.

    Returns:
        By Lanczos, with at most 40 products; NaN where the loss has no finite derivatives.
    """
    operator = curvature.hessian(curvature.functional_loss(loss, batch=batch), dict(loss.named_parameters()))
    try:
        found = curvature.eigenpairs(
            operator,
            tol=HESSIAN_TOLERANCE,
            max_products=HESSIAN_PRODUCTS,
            generator=torch.Generator().manual_seed(seed),
        )
    except FloatingPointError:
        return float("nan")
    return float(found.eigenvalues[0])


@dataclass
class _Count:
    values: int = 0
    saturated: int = 0
    underflowed: int = 0


class Ranges(TorchDispatchMode):
    """Counts, by role, the operands that saturate or underflow while a model of the ``fpsim_eager`` backend runs.

    An operand is a weight if it lies in the memory of a parameter, a gradient if it was computed from ``tangent``, the
    gradient that the backward pass begins with, and an activation otherwise. Saturated: beyond the largest finite value
    of the format. Underflowed: not zero, and rounded to zero.
    """

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo may compile while this is active: it only looks."""
        return True

    def __init__(self, parameters: Sequence[Tensor], tangent: Tensor) -> None:
        super().__init__()
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._from_tangent = {tangent.untyped_storage().data_ptr()}
        self._kept: list[Tensor] = [tangent]  # so that no address is used again
        self._counts = {role: _Count() for role in ROLES}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(source.untyped_storage().data_ptr() in self._from_tangent for source in sources):
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._kept.append(leaf)
                    self._from_tangent.add(leaf.untyped_storage().data_ptr())
        if func in (torch.ops.fpsim.round.default, torch.ops.fpsim.round_stochastic.default):
            fmt = args[1] if func is torch.ops.fpsim.round.default else args[2]
            self._add(self._counts[self._role(args[0])], args[0], result, fmt)
        return result

    def _role(self, value: Tensor) -> str:
        place = value.untyped_storage().data_ptr()
        if place in self._weights:
            return "weight"
        return "gradient" if place in self._from_tangent else "activation"

    @staticmethod
    def _add(count: _Count, value: Tensor, rounded: Tensor, fmt: str) -> None:
        count.values += value.numel()
        count.saturated += int((value.abs() > float(parse_format(fmt).max)).sum())
        count.underflowed += int(((value != 0) & (rounded == 0)).sum())

    def shares(self) -> dict[str, float]:
        """``saturated_ROLE`` and ``underflowed_ROLE``, as shares of all values rounded in that role."""
        return {
            f"{what}_{role}": getattr(count, what) / count.values
            for role, count in self._counts.items()
            if count.values
            for what in ("saturated", "underflowed")
        }


def range_shares(
    model: nn.Module,
    loss_of: Callable[..., Any],
    batch: tuple[Tensor, Tensor],
    *,
    loss_scale: float,
) -> dict[str, float]:
    """`Ranges` over one forward and backward pass of ``loss_of``, which ``fpsim_eager`` compiled from ``model``.

    Gradients that the parameters hold stay as they are.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tangent = torch.tensor(loss_scale, device=parameters[0].device)
    with Ranges(parameters, tangent) as ranges:
        outputs = loss_of(*batch)
        loss = outputs[0] if isinstance(outputs, tuple) else outputs
        torch.autograd.grad(loss, parameters, tangent, allow_unused=True)
    return ranges.shares()
