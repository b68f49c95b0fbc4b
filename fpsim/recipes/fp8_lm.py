"""FP8-LM, as in MS-AMP: FP8 products, gradients, optimizer states and weights, at three levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from fpsim.policy import Policy
from fpsim.recipes.parts import LINEAR, by_role, results, split_in_backward
from fpsim.recipes.recipe import Recipe
from fpsim.recipes.rounded_state import RoundedState
from fpsim.training.layers import linear_weights
from fpsim.training.wire import AutomaticFactor, NarrowExchange, narrow_exchange_hook

#: The parts of the optimizer at each level.
_LEVELS = {
    "O1": RoundedState(weights="fp16/power_of_two", linear_only=True),
    "O2": RoundedState(
        {"exp_avg": "e4m3fn/power_of_two", "exp_avg_sq": "fp16/power_of_two"},
        weights="fp16/power_of_two",
        linear_only=True,
    ),
    "O3": RoundedState(
        {"exp_avg": "e4m3fn/power_of_two", "exp_avg_sq": "fp16/power_of_two"},
        weights="e4m3fn/power_of_two",
        master="fp16/power_of_two",
        linear_only=True,
    ),
}


@dataclass(frozen=True)
class NarrowGradients:
    """The gradients of linear weights, which processes add in a narrow format (`fpsim.training.wire`).

    Attributes:
        format: the format of what is sent and of every partial sum.
        factor: a positive number, ``"sqrt"`` for 1/sqrt(processes), or ``"automatic"`` for the paper's mu.
        own_scales: whether each process first rounds with its own scale.
    """

    format: str = "e4m3fn/sat_finite"
    factor: float | str = "sqrt"
    own_scales: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.factor, str) and self.factor not in ("sqrt", "automatic"):
            raise ValueError(f"factor={self.factor!r} of gradients: use a number, 'sqrt' or 'automatic'")

    def apply(self, model: torch.nn.Module, optimizer: Any) -> NarrowExchange:
        """Register the exchange on a `DistributedDataParallel` model.

        Returns:
            The state of the exchange, whose `NarrowExchange.state_dict` a resumed run loads.

        Raises:
            ValueError: the model is no `DistributedDataParallel`, and nothing would round its gradients.
        """
        if not isinstance(model, DistributedDataParallel):
            raise ValueError(
                f"gradients are exchanged by DistributedDataParallel, got {type(model).__name__}: wrap the model, or "
                "take fp8_lm(processes=False), which rounds them after each product"
            )
        factor = {"sqrt": None, "automatic": AutomaticFactor()}.get(str(self.factor), self.factor)
        known = torch.optim.SGD(model.parameters()) if optimizer is None else optimizer
        exchange = NarrowExchange(self.format, factor, self.own_scales, linear_weights(model, known))  # type: ignore[arg-type]
        model.register_comm_hook(exchange, narrow_exchange_hook)
        return exchange

    def __str__(self) -> str:
        factor = {"sqrt": "1/sqrt(processes)", "automatic": "an automatic mu"}.get(str(self.factor), self.factor)
        scales = ", each process first with its own scale" * self.own_scales
        return f"gradients of linear weights added in {self.format}, times a power of two and {factor}{scales}"


def fp8_lm(
    level: str = "O2",
    *,
    processes: bool = False,
    factor: float | str = "sqrt",
    history: int = 16,
    high: str | None = "bf16",
    accumulator: str | None = None,
) -> Recipe:
    """FP8-LM: FP8 operands, and more in FP8 and scaled FP16 with each level.

    All scales are powers of two of whole tensors. Activations (e4m3fn) and gradients (e5m2) have histories of 16 steps;
    weights, gradients of weights (e4m3fn) and states are scaled by their own magnitude. The step uses moments before
    they are rounded.

    Args:
        level: ``"O1"``: weights of linear layers in scaled FP16, without a wider master copy, and their gradients in
            e4m3fn. ``"O2"``: the first moments also in e4m3fn and the second ones in FP16, both scaled. ``"O3"``:
            also weights in e4m3fn, over master copies in scaled FP16.
        processes: whether the model is a `DistributedDataParallel`. Then gradients of linear weights are rounded where
            processes add them, and otherwise after each backward product (of every micro-batch).
        factor: for ``processes``, that of the sum: ``"sqrt"`` as in the code, ``"automatic"`` for the paper's mu (with
            each process's own scale first), or a number.
        history: how many steps determine the scale of activations and gradients.
        high: the format of other results of products; None leaves them in the model's dtype.
        accumulator: that of all sums, such as ``"hopper_fp8"``; backward sums are split every 128 products.

    Raises:
        ValueError: ``level`` or ``factor`` is unknown, or there is a factor without ``processes``. Otherwise the errors
            of `fpsim.Policy`.
    """
    if not processes and factor != "sqrt":
        raise ValueError(f"factor={factor!r} is that of a sum over processes: give processes=True, or leave it out")
    if level not in _LEVELS:
        raise ValueError(f"level={level!r} is none of FP8-LM's: use one of {', '.join(_LEVELS)}")
    timed = f"power_of_two/history:{history}:ms_amp"
    fields: dict[str, Any] = {
        **by_role(f"e4m3fn/{timed}", "e4m3fn/sat_finite/power_of_two", f"e5m2/{timed}"),
        **results(high),
        **LINEAR,
        **split_in_backward(accumulator),
    }
    if not processes:
        fields["wgrad"] = {"output": "e4m3fn/sat_finite/power_of_two"}
    return Recipe(
        name="fp8_lm",
        source="Peng et al., FP8-LM: Training FP8 Large Language Models, arXiv 2310.18313; Azure/MS-AMP 9746ea8",
        policy=Policy(**fields),
        optimizer=_LEVELS[level],
        gradients=NarrowGradients(factor=factor, own_scales=factor == "automatic") if processes else None,
        notes=(
            f"This is level {level}. MS-AMP has O3 under DeepSpeed's ZeRO only; here nothing is partitioned.",
            "The paper multiplies gradients by an automatic mu. The released code has 1/sqrt(processes) and no mu. "
            "factor='sqrt' follows the code, 'automatic' the paper, with mu on top of the power of two: a mu before it "
            "would cancel.",
            "MS-AMP unties a tied head, and rounds it like every linear layer. A tied head stays tied here.",
            "All states of the optimizer are rounded, as in the code; embeddings, norms and biases keep their weights.",
            *(() if processes else ("On one process there is no exchange of gradients.",)),
        ),
    )
