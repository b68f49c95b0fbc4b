"""Rotary positions in bfloat16 (AnchorAttention's finding)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.casts import parse_unscaled
from fpsim.policy import Policy
from fpsim.recipes.recipe import Recipe
from fpsim.recipes.rotary import check_precision, rotary_tables

#: Types of rotary positions in Hugging Face's models whose frequencies do not change while the model runs.
_FIXED = ("default", "linear", "yarn", "llama3", "proportional")


@dataclass(frozen=True)
class RotaryTables:
    """The tables of cosines and sines in a narrow format.

    Attributes:
        precision, format: those of `fpsim.recipes.rotary.rotary_tables`.
    """

    precision: str = "products"
    format: str = "bf16"

    def __post_init__(self) -> None:
        check_precision(self.precision)
        parse_unscaled(self.format, "nearest_even", None, "rotary positions")

    def apply(self, model: nn.Module, batches: Iterable[Any] | None = None) -> nn.Module:
        """``model``, whose modules with a buffer ``inv_freq`` compute other tables: those of Hugging Face's models.

        Raises:
            ValueError: there is no such module, or its frequencies change while it runs.
        """
        rotary: list[Any] = [
            module for module in model.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)
        ]
        if not rotary:
            raise ValueError(f"{type(model).__name__} has no module with a buffer 'inv_freq': it has no rotary tables")
        for module in rotary:
            if getattr(module, "rope_type", "default") not in _FIXED:
                raise ValueError(f"rotary positions of type {module.rope_type!r} have no fixed table: use 'default'")
            module.rotary_precision, module.rotary_format = self.precision, self.format
            module.forward = MethodType(_tables, module)
        return model

    def __str__(self) -> str:
        rounded = {"fp32": "nothing", "products": "cosines and sines", "positions": "positions, frequencies and angles"}
        return f"rotary tables: {rounded[self.precision]} in {self.format}"


@torch.no_grad()
def _tables(module: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The method ``forward`` of a module of rotary positions: cosines and sines in the dtype of ``x``."""
    tables = rotary_tables(position_ids, module.inv_freq, module.rotary_precision, module.rotary_format)
    cos, sin = ((table * getattr(module, "attention_scaling", 1.0)).to(x.dtype) for table in tables)
    return cos, sin


def bf16_rope(*, precision: str = "products", format: str = "bf16", attention: str = "*.self_attn") -> Recipe:
    """Rotary positions, and every result in attention, in bfloat16.

    Args:
        precision: ``"products"``, the paper's case: angles are float32, and cosines, sines and all results in attention
            are narrow. ``"positions"``: positions, frequencies and angles are narrow too, as where tables are built in
            16 bits. ``"fp32"``: the control, where rotary positions have no rounding and attention no narrow results.
        format: the format.
        attention: the glob of the modules that rotate queries and keys.

    Raises:
        ValueError: an argument is unknown. `Recipe.apply` raises it for a model without rotary tables.
    """
    narrow = {"elementwise": {"forward": format}} if precision != "fp32" else {}
    return Recipe(
        name="bf16_rope",
        source="Wang et al., When Precision Meets Position: BFloat16 Breaks Down RoPE in Long-Context Training, "
        "arXiv 2411.13476; haonan3/AnchorContext",
        policy=Policy(
            format=format, output=format, modules={attention: {"format": format, "output": format, **narrow}}
        ),
        preparation=RotaryTables(precision, format),
        notes=(
            "The measure of the paper is `fpsim.recipes.rotary.shift_distance`, and its remedy, one shared first token "
            "for all documents, is `anchor_mask`. The code has no measurement.",
            "Softmax and scores are narrow too, as attention that is not fused has them.",
        ),
    )
