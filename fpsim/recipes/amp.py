"""Mixed precision as under `torch.autocast`: the baselines."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.recipe import Recipe
from fpsim.recipes.scaled_loss import ScaledLoss

_NOTES = (
    "Parameters and the optimizer stay as they are: float32 parameters are the master weights.",
    "autocast runs softmax, norms and losses in float32: they are not rounded. Fused attention keeps the scores in "
    "float32; here they are a product's result, and rounded.",
)
_SOURCE = "Micikevicius et al., Mixed Precision Training, arXiv 1710.03740; torch.autocast"


def amp_bf16() -> Recipe:
    """Operands and results of all matrix products in bfloat16, everything else in the model's dtype."""
    return Recipe("amp_bf16", _SOURCE, Policy.preset("bf16"), notes=_NOTES)


def amp_fp16() -> Recipe:
    """Operands and results of all matrix products in float16, with a dynamic scale of the loss.

    Multiply the loss by ``optimizer.param_groups[0]["loss_scale"]``. The optimizer divides the gradients by it, and
    skips steps whose gradients overflow (`fpsim.training.loss_scaling.scale_loss`).
    """
    notes = (*_NOTES, "The rule of the loss's scale is that of torch.amp.GradScaler.")
    return Recipe("amp_fp16", _SOURCE, Policy.preset("fp16"), optimizer=ScaledLoss(), notes=notes)
