"""Measurements of a run beside its loss: signals that may warn of divergence, and how its operands fit a format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fpsim import curvature, sharpness
from fpsim.compile_backend.observe.rounding_statistics import merge
from fpsim.compile_backend.report.profiler import Profiler
from fpsim.compile_backend.report.profiles import Profile
from fpsim.policy.policy import ROLES
from fpsim.sharpness.box import EPSILONS

#: The most products with the Hessian per estimate, and the relative residual at which an estimate ends.
HESSIAN_PRODUCTS, HESSIAN_TOLERANCE = 40, 0.05


def logit_signals(logits: Tensor, targets: Tensor, *, lbfgsb: bool = False) -> dict[str, float]:
    """Means over tokens of the sharpness in both boxes and of the logits, and the largest |z|.

    Args:
        logits: shape (tokens, vocabulary).
        targets: int64, shape (tokens,).
        lbfgsb: also search the boxes by L-BFGS-B, as the paper did (milliseconds per token).

    Returns:
        The values by the names of `fpsim.paper.record.Record`; all are NaN where no token has a finite loss.
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


def max_attention_logit(network: nn.Module, inputs: Tensor) -> float | None:
    """The largest attention logit of ``network(inputs)``: of all layers, heads, queries, and keys that they see.

    A logit is an entry of the scores to which softmax is applied (arXiv 2309.14322): the scaled product of
    a query and a key, plus the mask where there is one. The network is neither rounded nor compiled.

    Returns:
        The logit, NaN if one is NaN; None if the network never calls
        `torch.nn.functional.scaled_dot_product_attention`.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=_devices(network)), _Scores() as scores:
        network(inputs)
    return float(torch.stack(scores.largest).max()) if scores.largest else None


class _Scores(TorchFunctionMode):
    """Notes the largest score of every call of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[Tensor] = []

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is functional.scaled_dot_product_attention:
            self.largest.append(_largest_score(*args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def _largest_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The largest score of one call, by the arguments of `scaled_dot_product_attention`."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None:
        is_seen = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_seen else scores + attn_mask
    return scores.max()


def _devices(module: nn.Module) -> list[torch.device]:
    """The GPU of ``module`` if it is on one."""
    device = next(module.parameters()).device
    return [device] if device.type == "cuda" else []


def hessian_eigenvalue(loss: nn.Module, batch: tuple[Tensor, Tensor], *, seed: int) -> float:
    """The largest eigenvalue of the Hessian of ``loss`` with respect to its parameters, on one batch.

    Args:
        loss: from inputs and targets to the loss, neither compiled nor with fused attention (which has no second
            derivative).
        seed: of the first vector of the Lanczos iteration, which takes at most 40 products.

    Returns:
        The eigenvalue, to a relative residual of 0.05 if 40 products reach it; NaN where the loss has no finite
        derivatives.
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


def range_shares(
    model: nn.Module, profiler: Profiler, batch: tuple[Tensor, Tensor], *, loss_scale: float
) -> dict[str, float]:
    """The shares of operands that saturate and underflow in one interpreted forward and backward pass, by role.

    The counts are those of `fpsim.profile`: an operand counts once for every matrix product that reads it, and only
    where a cast rounds it. Gradients that the parameters hold and random state stay as they are.

    Args:
        model: the parameters to differentiate with respect to.
        profiler: of ``model``, under the policy in question; nothing has run since its last `take`.
        batch: inputs and targets of ``model``, which returns the loss, or a tuple that begins with it.
        loss_scale: the gradient with which the backward pass begins.

    Returns:
        ``saturated_ROLE``: the share of finite operands beyond the largest finite value of the format, scaled as the
        cast scales them, that were rounded to a finite value. ``underflowed_ROLE``: the share that is not zero and was
        rounded to zero. Roles without a rounded operand are missing.
    """
    profile = profiled(model, profiler, batch, loss_scale=loss_scale)
    rounded = [site for site in profile.sites if site.cast is not None]
    by_role = {role: merge(site.statistics for site in rounded if site.role == role) for role in ROLES}
    counts = {"saturated": "saturations", "underflowed": "underflows"}
    return {
        f"{what}_{role}": statistics.share(count)
        for role, statistics in by_role.items()
        if statistics.elements
        for what, count in counts.items()
    }


def profiled(model: nn.Module, profiler: Profiler, batch: tuple[Tensor, Tensor], *, loss_scale: float) -> Profile:
    """The profile of one interpreted forward and backward pass, with the arguments of `range_shares`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=_devices(model)):
        outputs = profiler(*batch)
        loss = outputs[0] if isinstance(outputs, tuple) else outputs
        torch.autograd.grad(loss, parameters, torch.full_like(loss, loss_scale), allow_unused=True)
    return profiler.take()
