"""The memory that a recipe would need on hardware: bytes per parameter between steps, and bytes per kept activation.

fpsim simulates values and keeps them in float32. Here the formats and scales of a recipe are counted as hardware would
store them. Scales of whole tensors and of matrices' rows are counted for a matrix of `SHAPE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fpsim.casts import Cast, parse_cast
from fpsim.recipes import Recipe
from fpsim.scaling.scale import NV_RULES
from fpsim.transforms.power_map import PowerMap

#: The matrix for which scales are counted: rows and columns, as the layers of a model with 7 B parameters have them.
SHAPE = (4096, 4096)
#: The bits of the scale itself, by its rule.
_SCALE_BITS = {"fp32": 32, "encode": 32, "bf16": 16}
#: Powers of two are E8M0, and NVFP4's scales of blocks e4m3fn.
_BYTE = 8


def bits_per_element(cast: Cast | None, carrier: float = 32.0) -> float:
    """The bits of an element with its share of the scales; ``carrier`` for None, which is not rounded.

    >>> bits_per_element(parse_cast("mxfp8")), bits_per_element(parse_cast("e4m3fn/block:128x128"))
    (8.25, 8.001953125)
    >>> round(bits_per_element(parse_cast("nf4/group:64:double")), 3)
    4.127
    """
    if cast is None:
        return carrier
    bits, scale = float(cast.format.bits), cast.scale
    if scale is None:
        return bits
    rows, columns = SHAPE
    elements = rows * columns
    shared = {"tensor": elements, "row": columns, "column": rows, "block": 1, "group": 1, "tile": 1}[scale.kind]
    for size in scale.sizes:
        shared *= size
    if isinstance(cast.transform, PowerMap):  # the power of a group, in sixteenths
        bits += 8 / shared
    if scale.rule == "double":  # 8 bits for each scale, a float32 for every 256 of them, and one for the tensor
        return bits + (8 + 32 / 256) / shared + 32 / elements
    if scale.rule == "asymmetric":  # a float32 and a zero point
        return bits + (32 + bits) / shared
    whole = 32 / elements if scale.rule in NV_RULES else 0.0
    return bits + _SCALE_BITS.get(scale.rule, _BYTE) / shared + whole


@dataclass(frozen=True)
class Footprint:
    """Bytes that a recipe keeps.

    Attributes:
        weights: per parameter of a linear layer: its weight, and its master copy or compensation.
        moments: per such parameter: the state of AdamW.
        activation: per activation that a linear layer keeps for the gradient of its weight.
    """

    weights: float
    moments: float
    activation: float

    @property
    def parameter(self) -> float:
        """Bytes per parameter between steps: `weights` and `moments`."""
        return self.weights + self.moments


def footprint(recipe: Recipe, carrier: float = 32.0) -> Footprint:
    """The bytes that ``recipe`` keeps for a linear layer which it rounds.

    A weight that the optimizer's part does not round, and a moment likewise, have ``carrier`` bits. An activation has
    the format of the copy that is kept for backward (`fpsim.Policy.saved`), or else that of its operand of wgrad.

    Raises:
        ValueError: the optimizer's part is not known here.
    """
    name = type(recipe.optimizer).__name__
    if name not in _PARTS:
        raise ValueError(f"the memory of optimizer part {name!r} is not known: add it to fpsim.paper.footprint")
    weights, moments = _PARTS[name](recipe.optimizer, carrier)
    return Footprint(weights / 8, moments / 8, _activation_bits(recipe, carrier) / 8)


def _activation_bits(recipe: Recipe, carrier: float) -> float:
    policy = recipe.policy
    if policy is None:
        return carrier
    saved = policy.saved_cast("product")
    return bits_per_element(saved or policy.cast("wgrad", "activation"), carrier)


def _unchanged(part: Any, carrier: float) -> tuple[float, float]:
    return carrier, 2 * carrier


def _rounded_state(part: Any, carrier: float) -> tuple[float, float]:
    def bits(cast: str | None) -> float:
        return bits_per_element(None if cast is None else parse_cast(cast), carrier)

    weights = bits(part.weights)
    if part.master is not None:
        weights += bits(part.master)
    if part.kahan:
        weights += bits(part.weights)
    state: Mapping[str, str | None]
    if isinstance(part.state, str):
        state = dict.fromkeys(("exp_avg", "exp_avg_sq"), part.state)
    else:
        state = {"exp_avg": None, "exp_avg_sq": None, **dict(part.state or ())}
    return weights, sum(bits(cast) for cast in state.values())


def _projected(part: Any, carrier: float) -> tuple[float, float]:
    """The moments of a square matrix whose gradient is projected to a share of its side, and the projection."""
    share = part.rank if part.rank < 1 else part.rank / min(SHAPE)
    state = {"exp_avg": None, "exp_avg_sq": None, **dict(part.state)}
    each = [bits_per_element(None if cast is None else parse_cast(cast), carrier) for cast in state.values()]
    return carrier, share * (sum(each) + carrier)


def _half_precision(part: Any, carrier: float) -> tuple[float, float]:
    bits = bits_per_element(parse_cast(part.arithmetic), carrier)
    return bits * (2 if part.kahan else 1), 2 * bits


#: The bits of the weight and of the moments, by the class of the optimizer's part.
_PARTS: dict[str, Callable[[Any, float], tuple[float, float]]] = {
    "NoneType": _unchanged,
    "ClippedUpdates": _unchanged,
    "ClippingValues": _unchanged,
    "RoundedState": _rounded_state,
    "ScaledLoss": _unchanged,
    "ProjectedAdam": _projected,
    "HalfPrecisionAdam": _half_precision,
    "TrainedGates": _unchanged,
}
