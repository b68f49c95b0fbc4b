"""Federated learning in FP8: clients train on a grid with learned clipping values, and send unbiased messages."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fpsim.recipes.recipe import Recipe
from fpsim.training.learned_clipping import clipping_values, learn_clipping


@dataclass(frozen=True)
class LearnedClipping:
    """Weights and inputs of layers on a grid with learned clipping values (`fpsim.training.learned_clipping`).

    Attributes:
        mantissa_bits, exponent_bits: those of the grid.
        activations: whether inputs of layers are rounded too.
    """

    mantissa_bits: int = 3
    exponent_bits: int = 4
    activations: bool = True

    def apply(self, model: torch.nn.Module, batches: Iterable[Any] | None) -> torch.nn.Module:
        """Change ``model`` in place; ``batches`` is not used.

        Raises:
            ValueError: the model has no linear layer or convolution, or has learned clipping values already.
        """
        return learn_clipping(
            model,
            mantissa_bits=self.mantissa_bits,
            exponent_bits=self.exponent_bits,
            activations=self.activations,
        )

    def __str__(self) -> str:
        what = "weights and inputs" if self.activations else "weights"
        return (
            f"{what} of layers on a grid of {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits, with "
            "a learned clipping value per tensor"
        )


@dataclass(frozen=True)
class ClippingValues:
    """The optimizer of a client, which also learns the clipping values.

    Attributes:
        lr: their learning rate; None means that of the optimizer's first group.
    """

    lr: float | None = None

    def apply(self, optimizer: Any, model: torch.nn.Module) -> Any:
        """Add the clipping values of ``model`` to ``optimizer``, in a group without weight decay.

        Raises:
            ValueError: the model has no clipping values.
        """
        values = list(clipping_values(model).values())
        if not values:
            raise ValueError("the model has no clipping values: apply LearnedClipping first")
        known = {p for group in optimizer.param_groups for p in group["params"]}
        if not known & set(values):
            lr = optimizer.param_groups[0]["lr"] if self.lr is None else self.lr
            optimizer.add_param_group({"params": values, "weight_decay": 0.0, "lr": lr})
        return optimizer

    def __str__(self) -> str:
        return "also learns the clipping values, without weight decay"


def fp8_federated(*, mantissa_bits: int = 3, exponent_bits: int = 4, activations: bool = True) -> Recipe:
    """FP8 federated learning: the recipe of a client, which trains in float32 with rounded weights and inputs.

    What belongs to the algorithm between clients and the server are functions of `fpsim.training.federated`: ``send``
    rounds weights stochastically for the way to the server and back, ``average`` and ``server_step`` are the server's.
    `fpsim.training.learned_clipping.messages` gives the weights of a client with their clipping values.

    Args:
        mantissa_bits, exponent_bits: those of the grid.
        activations: whether inputs of layers are rounded too.
    """
    return Recipe(
        name="fp8_federated",
        source="Wang et al., Towards Federated Learning with On-device Training and Communication in 8-bit Floating "
        "Point, arXiv 2407.02610; grid: Kuzmin et al., FP8 Quantization: The Power of the Exponent, arXiv 2208.09225",
        policy=None,
        preparation=LearnedClipping(mantissa_bits, exponent_bits, activations),
        optimizer=ClippingValues(),
        notes=(
            "No code of this paper is known. The grid is that of Qualcomm's FP8-quantization, whose bias is a real "
            "number and whose codes are all numbers.",
            "The number of steps and the grid of clipping values of the server (UQ+) are not in the paper's text as "
            "known here: they are arguments.",
            "Clients round deterministically. Only what is sent is rounded stochastically.",
        ),
    )
