"""Scales that multiply the result of a product, as in the epilogue of a hardware product, instead of its operand.

A scale that does not vary along the axes that the product sums over can be multiplied afterwards. Then the product
multiplies exact values of the element format: for NVFP4 those times the scales of their blocks.
"""

from __future__ import annotations

import torch

from fpsim.casts import Cast
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.products import PRODUCTS, Axes, product_operator
from fpsim.formats import CodebookFormat, IntegerFormat
from fpsim.rounding.carriers import CARRIERS
from fpsim.scaling.scale import NV_RULES

_BY_NAME = {entry.name: entry for entry in PRODUCTS}


def is_outside(product: Product, cast: Cast | None, contracted: Axes, dtype: torch.dtype) -> bool:
    """Whether the scale of an operand, or for NVFP4 the scale of its tensor, multiplies the result of the product.

    Args:
        product: the product.
        cast: the cast of the operand.
        contracted: the axes of the operand along which the product sums.
        dtype: the dtype of the operand.

    Returns:
        True for the ratios of tensors, and of rows where the operator maps them to rows or columns of its result. False
        for powers of two, which change no bit; for zero points; for codebooks, whose values are looked up before the
        product; for casts with a transform of their own; and if the dtype lacks an element of the format.
    """
    entry = product_operator(product.node.target) or _BY_NAME.get(product.operator)
    if cast is None or cast.scale is None or entry is None or not entry.scales:
        return False
    if cast.transform is not None:
        return False
    if cast.scale.rule in NV_RULES:
        return True
    if cast.scale.rule not in ("fp32", "bf16", "encode") or not _holds(dtype, cast):
        return False
    return cast.scale.kind == "tensor" or (cast.scale.kind == "row" and entry.scales == "rows" and bool(contracted))


def _holds(dtype: torch.dtype, cast: Cast) -> bool:
    """Whether every value of the element format is a number of ``dtype``."""
    carrier, element = CARRIERS[dtype], cast.format
    if isinstance(element, CodebookFormat):
        return False
    if isinstance(element, IntegerFormat):
        return element.bits - 1 <= carrier.precision and element.unit_exponent >= carrier.emin
    return element.is_subset_of(carrier)
