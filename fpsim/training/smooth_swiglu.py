"""Smooth-SwiGLU: the product of a gated unit is divided by a scale before it is rounded, and multiplied after.

Source: Fishman et al., Scaling FP8 training to trillion-token LLMs (arXiv 2409.12517), section 4.3, and the code,
Anonymous1252022/Megatron-DeepSpeed 20029cf, ``megatron/model/transformer.py``. The paper has one scale for each
channel, the code one for each token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: Which elements share a scale: those of a token, as in the code, or of a channel, as in the paper.
Granularity = Literal["token", "channel"]

#: The layers of a gated unit, as Llama and the models that follow it name them.
LAYERS = ("gate_proj", "up_proj", "down_proj")


class ScaledLinear(nn.Linear):
    """A linear layer whose input was divided by scales, which it multiplies back: those of tokens, or of channels."""

    @staticmethod
    def of(layer: nn.Linear) -> ScaledLinear:
        """The layer with the parameters of ``layer``."""
        own = ScaledLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        own.weight, own.bias = layer.weight, layer.bias
        return own.train(layer.training)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The result for the input ``x * scale``.

        Args:
            x: shape (..., in_features).
            scale: shape (..., 1) for tokens: the result is multiplied. Shape (in_features,) for channels: the columns
                of the weight are.
        """
        if scale is None or scale.dim() == 1:
            return linear(x, self.weight if scale is None else self.weight * scale, self.bias)
        out = linear(x, self.weight) * scale
        return out if self.bias is None else out + self.bias


class SmoothSwiGLU(nn.Module):
    """A gated unit down(act(gate(x)) * up(x)) whose product has scales that down_proj's input does not see.

    ``token``: s is the largest magnitude of up(x) of a token; the result is s down(act(gate(x)) (up(x) / s)).

    ``channel``: s is the largest magnitude of a channel of act(gate(x)) up(x), over all tokens of the call; the result
    is W (act(gate(x)) up(x) / s) with the columns of W, the weight of down_proj, multiplied by s.

    A scale of zero counts as 1. In exact arithmetic the result is that of the unit. With ``power_of_two`` a scale is
    the least power of two above, and the result has the same bits where no number is subnormal. The layers are those
    of the unit, under their names: parameters, and state dicts, stay as they are (down_proj becomes a `ScaledLinear`).

    The backend takes the weight times the scales of channels for a weight in models of tokens. If the model's inputs
    are floating-point numbers, it counts as an activation, since it is computed from them.

    Args:
        unit: a module with linear layers ``gate_proj``, ``up_proj`` and ``down_proj`` and the activation ``act_fn``.
        granularity: ``token`` or ``channel``.
        detach: whether no gradient flows through the scales.
        power_of_two: whether scales are powers of two.
    """

    def __init__(
        self, unit: nn.Module, granularity: Granularity = "token", *, detach: bool = True, power_of_two: bool = False
    ) -> None:
        super().__init__()
        if granularity not in ("token", "channel"):
            raise ValueError(f"unknown granularity {granularity!r} of Smooth-SwiGLU: use 'token' or 'channel'")
        self.gate_proj, self.up_proj, self.act_fn = (unit.get_submodule(name) for name in (*LAYERS[:2], "act_fn"))
        down = unit.get_submodule(LAYERS[2])
        assert isinstance(down, nn.Linear), "units have linear layers"
        self.down_proj = ScaledLinear.of(down)
        self.granularity, self.detach, self.power_of_two = granularity, detach, power_of_two
        self.training = unit.training

    def forward(self, x: Tensor) -> Tensor:
        """The result of the unit for ``x``, of shape (..., in_features)."""
        gate, up = self.act_fn(self.gate_proj(x)), self.up_proj(x)
        if self.granularity == "token":
            scale = self._scale(up.abs().amax(-1, keepdim=True))
            return self.down_proj(gate * (up / scale), scale)
        product = gate * up
        scale = self._scale(product.abs().flatten(0, -2).amax(0))
        return self.down_proj(product / scale, scale)

    def _scale(self, largest: Tensor) -> Tensor:
        scale = largest.detach() if self.detach else largest
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        if not self.power_of_two:
            return scale
        return (scale / torch.frexp(scale).mantissa).detach()  # exact, since the mantissa is in [0.5, 1)

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"granularity={self.granularity!r}, detach={self.detach}, power_of_two={self.power_of_two}"


def smooth_swiglu(
    model: nn.Module, granularity: Granularity = "token", *, detach: bool = True, power_of_two: bool = False
) -> nn.Module:
    """Put a `SmoothSwiGLU` in the place of each gated unit of ``model``, in place.

    A gated unit is a module with linear layers ``gate_proj``, ``up_proj`` and ``down_proj`` and an activation
    ``act_fn``: the MLP of Llama, Mistral, Qwen, Gemma and others in Hugging Face transformers. The name of its class
    has to end with ``MLP``.

    Returns:
        ``model``, or the new module if the model itself is such a unit.

    Raises:
        ValueError: there is no gated unit, or ``granularity`` is unknown.
    """
    units = [(path, module) for path, module in model.named_modules() if _is_gated_unit(module)]
    if not units:
        raise ValueError(
            f"{type(model).__name__} has no gated unit, a module ...MLP with {', '.join(LAYERS)} and act_fn: "
            "Smooth-SwiGLU is about Llama and models like it"
        )
    for path, unit in units:
        smooth = SmoothSwiGLU(unit, granularity, detach=detach, power_of_two=power_of_two)
        if not path:
            return smooth
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, smooth)
    return model


def _is_gated_unit(module: nn.Module) -> bool:
    return (
        type(module).__name__.endswith("MLP")
        and all(isinstance(getattr(module, name, None), nn.Linear) for name in LAYERS)
        and isinstance(getattr(module, "act_fn", None), nn.Module)
    )
