"""Layers whose weights and inputs lie on a floating-point grid with a learned clipping value (QAT).

Source: as `fpsim.training.federated`, whose grid this uses.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fpsim.training.federated import round_to_grid
from fpsim.training.layers import is_linear

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
#: The name under which a layer holds the grid of its input.
_INPUT = "input_grid"


class LearnedGrid(nn.Module):
    """A tensor rounded to the grid of `round_to_grid`, with the parameter ``alpha`` as its clipping value.

    ``alpha`` begins as the largest magnitude of the first tensor. The magnitude of the parameter counts, and at least
    2^-100, so that a step of the optimizer cannot make it negative.
    """

    def __init__(self, mantissa_bits: int, exponent_bits: int, like: Tensor) -> None:
        super().__init__()
        self.mantissa_bits, self.exponent_bits = mantissa_bits, exponent_bits
        self.alpha = nn.Parameter(torch.ones((), dtype=like.dtype, device=like.device))
        self.is_set: Tensor
        self.register_buffer("is_set", torch.zeros((), dtype=torch.bool, device=like.device))

    def value(self) -> Tensor:
        """The clipping value in use, a positive number without dimensions."""
        return self.alpha.abs().clamp(min=2.0**-100)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` rounded, of any shape."""
        if not self.is_set:
            with torch.no_grad():
                self.alpha.copy_(x.abs().amax())
                self.is_set.fill_(True)
        return round_to_grid(x, self.value(), mantissa_bits=self.mantissa_bits, exponent_bits=self.exponent_bits)

    def right_inverse(self, x: Tensor) -> Tensor:
        """The parameter of which a weight is computed: the weight itself."""
        return x


def learn_clipping(
    model: nn.Module, *, mantissa_bits: int = 3, exponent_bits: int = 4, activations: bool = True
) -> nn.Module:
    """Let the linear layers and convolutions of ``model`` round their weights and inputs, in place.

    A weight is a parametrization of `torch.nn.utils.parametrize`: the parameter stays the same object, and is the
    float32 master weight. Gradients pass rounding straight through and reach the clipping values.

    Args:
        model: the model.
        mantissa_bits, exponent_bits: those of the grid.
        activations: whether inputs are rounded too.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no layer, or a layer has a grid already.
    """
    layers = [module for module in model.modules() if is_linear(module) or isinstance(module, _CONVOLUTIONS)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer or convolution")
    if clipping_values(model):
        raise ValueError(f"{type(model).__name__} has learned clipping values already: prepare it once")
    for layer in layers:
        weight = layer.get_parameter("weight")
        grid = LearnedGrid(mantissa_bits, exponent_bits, weight)
        if activations:
            setattr(layer, _INPUT, LearnedGrid(mantissa_bits, exponent_bits, weight))
            layer.register_forward_pre_hook(_round_input)
        parametrize.register_parametrization(layer, "weight", grid)
    return model


def clipping_values(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned clipping values of a model by their names in ``named_parameters``."""
    grids = [(name, module) for name, module in model.named_modules() if isinstance(module, LearnedGrid)]
    return {f"{name}.alpha": grid.alpha for name, grid in grids}


def messages(model: nn.Module) -> dict[str, tuple[Tensor, float]]:
    """The float32 weights of the layers and their clipping values, by the names of the weights: what a client sends.

    `fpsim.training.federated.send` rounds each on its way.
    """
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            (grid,) = module.parametrizations["weight"]
            weight = module.parametrizations["weight"].original.detach()
            found[f"{name}.weight".lstrip(".")] = (weight, float(grid.value().detach()))
    return found


def _round_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (getattr(layer, _INPUT)(inputs[0]), *inputs[1:])
