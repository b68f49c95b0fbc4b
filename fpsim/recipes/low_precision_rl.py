"""Soft actor-critic in float16: hAdam, compensated weights, and a compound loss scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Adam, AdamW

from fpsim.policy import Policy
from fpsim.recipes.recipe import Recipe
from fpsim.training.clipping import is_decoupled
from fpsim.training.compound_scaling import scale_compound
from fpsim.training.hypot_adam import HypotAdam
from fpsim.training.parameters import round_parameters


@dataclass(frozen=True)
class HalfPrecisionAdam:
    """hAdam in place of Adam, in a narrow arithmetic and with a compound loss scale.

    Attributes:
        arithmetic: the format of every result of the optimizer, and of the parameters.
        eps: that of hAdam, beside scaled gradients; the optimizer's own eps is not used.
        kahan: whether the parameters are compensated.
        scale: the first factor of the loss; None leaves out loss scaling.
        growth_interval, least_eps, margin: the arguments of `fpsim.training.compound_scaling.scale_compound`.
    """

    arithmetic: str = "fp16"
    eps: float = 1e-4
    kahan: bool = True
    scale: float | None = 1e4
    growth_interval: int = 10_000
    least_eps: float = 1e-7
    margin: float = 1.1

    def apply(self, optimizer: Any, model: torch.nn.Module) -> HypotAdam:
        """A hAdam with the parameters, learning rates and betas of ``optimizer``, which no longer serves.

        Multiply the loss by ``optimizer.param_groups[0]["loss_scale"]`` before ``backward()``.

        Raises:
            ValueError: ``optimizer`` is not Adam, has taken steps, has weight decay as AdamW, or ``amsgrad`` or
                ``maximize``.
        """
        if type(optimizer) not in (Adam, AdamW):
            raise ValueError(f"hAdam takes the place of torch.optim.Adam, got {type(optimizer).__name__}")
        if optimizer.state:
            raise ValueError("the optimizer has taken steps: apply the recipe before training")
        for group in optimizer.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise ValueError("hAdam has neither amsgrad nor maximize: leave them out")
            if group["weight_decay"] and is_decoupled(optimizer, group):
                raise ValueError("hAdam adds weight decay to gradients, as Adam: use Adam, or weight_decay=0")
        names = ("params", "lr", "betas", "weight_decay")
        groups = [{name: group[name] for name in names} for group in optimizer.param_groups]
        ours = HypotAdam(groups, eps=self.eps, kahan=self.kahan, arithmetic=self.arithmetic)
        round_parameters(model, self.arithmetic)
        if self.scale is not None:
            scale_compound(
                ours,
                self.scale,
                growth_interval=self.growth_interval,
                least_eps=self.least_eps,
                margin=self.margin,
            )
        return ours

    def __str__(self) -> str:
        scale = "" if self.scale is None else f", compound loss scale from {self.scale:g}"
        return f"hAdam, every result {self.arithmetic}, eps {self.eps:g}" + ", weights compensated" * self.kahan + scale


def low_precision_rl(
    *, format: str = "fp16", kahan: bool = True, scale: float | None = 1e4, growth_interval: int = 10_000
) -> Recipe:
    """float16 soft actor-critic: every operand and result, and every number of the optimizer, is float16.

    The recipe replaces the optimizer of one network (critic, actor or temperature). What belongs to the algorithm are
    functions: `fpsim.training.compensation.soft_update` moves a target network ("Kahan momentum"),
    `fpsim.training.log_probability` has the log-probability of the actor.

    Args:
        format: the format in place of float16.
        kahan: whether weights are compensated ("Kahan gradients"). The code does it for the critic and the temperature,
            and not for the actor.
        scale: the first factor of the loss; None leaves out loss scaling.
        growth_interval: the number of steps without an overflow after which the factor doubles.

    Raises: the errors of `fpsim.Policy`, and those of `HalfPrecisionAdam.apply` from `Recipe.apply`.
    """
    return Recipe(
        name="low_precision_rl",
        source="Björck et al., Low-Precision Reinforcement Learning: Running Soft Actor-Critic in Half Precision, "
        "arXiv 2102.13565; nilsjohanbjorck/low-precision-rl",
        policy=Policy(format=format, output=format, elementwise=format),
        optimizer=HalfPrecisionAdam(arithmetic=format, kahan=kahan, scale=scale, growth_interval=growth_interval),
        notes=(
            "Multiply the loss by optimizer.param_groups[0]['loss_scale'] before backward().",
            "Gradients stay scaled: hAdam's eps of 1e-4 goes with the factor 1e4, and changes with it.",
            "The code also keeps a plain second moment, which it does not use. Formats other than float16 go through "
            "QPyTorch there, whose ties round away and whose largest float16 is 131008: this rounds to IEEE float16.",
        ),
    )
