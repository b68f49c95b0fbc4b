"""What the operands of a product cost in a format: bits of weights, or multiplications weighted by bits."""

from __future__ import annotations

import math
from collections.abc import Callable

from fpsim.casts import Cast
from fpsim.compile_backend.plan import Site
from fpsim.formats import parse_format
from fpsim.rounding.carriers import CARRIERS
from fpsim.scaling.groups import count
from fpsim.scaling.scale import MX_RULES, NV_RULES, Scale

#: The operands of a forward product, and their casts (None: unrounded).
Operands = tuple[tuple[Site, Site], tuple[Cast | None, Cast | None]]
#: From the operands of a product to its cost.
Cost = Callable[[Operands], float]


def bits_of(site: Site, cast: Cast | None) -> float:
    """The bits that hold the value of ``site``: those of its elements and of their scales.

    Raises:
        ValueError: a size is known only when the model runs.
    """
    sizes = [size for size in site.shape if isinstance(size, int)]
    if len(sizes) != len(site.shape):
        raise ValueError(f"the shape {site.shape} in {site.path!r} is symbolic: use batches of fixed shapes")
    elements = math.prod(sizes)
    if cast is None:
        own = next(fmt for dtype, fmt in CARRIERS.items() if str(dtype) == f"torch.{site.dtype}")
        return elements * own.bits
    bits: float = elements * cast.format.bits
    if cast.scale is not None:
        bits += count(sizes, cast.scale, [axis for axis in site.contracted if axis < len(sizes)]) * _bits(cast.scale)
        bits += 32 if cast.scale.rule in NV_RULES else 0  # the scale of the tensor
    return bits


def _bits(scale: Scale) -> int:
    """The bits of one scale: 8 for powers of two and NVFP4, else those of a ratio, with a zero point of 8 bits."""
    if scale.rule in (*MX_RULES, *NV_RULES, "power_of_two", "double"):
        return 8
    ratio = parse_format("bf16" if scale.rule == "bf16" else "fp32").bits
    return ratio + 8 if scale.rule == "asymmetric" else ratio


def weight_bits(operands: Operands) -> float:
    """The bits of the weight of a product; zero for products of two activations."""
    return sum(bits_of(site, cast) for site, cast in zip(*operands, strict=True) if site.role == "weight")


def weight_bytes(operands: Operands) -> float:
    """`weight_bits` in bytes."""
    return weight_bits(operands) / 8


def bit_operations(operands: Operands) -> float:
    """The multiplications of a product, times the bits of both factors.

    Raises:
        ValueError: the product is none of matrices, whose multiplications the shapes of operands tell.
    """
    (a, b), casts = operands
    lengths = [math.prod(int(s.shape[axis]) for axis in s.contracted) for s in (a, b)]
    batch = int(a.shape[0]) if len(a.shape) == len(b.shape) == 3 else 1
    if "convolution" in a.operator or lengths[0] != lengths[1] or max(len(a.shape), len(b.shape)) > 3:
        raise ValueError(f"cost='macs' counts products of matrices, and {a.path!r} has {a.operator}: pass a function")
    elements = [math.prod(map(int, site.shape)) for site in (a, b)]
    multiplications = elements[0] * elements[1] / (lengths[0] * batch)
    widths = [bits_of(site, cast) / n for site, cast, n in zip((a, b), casts, elements, strict=True)]
    return float(multiplications * widths[0] * widths[1])


#: The costs that have a name.
COSTS: dict[str, Cost] = {"bits": weight_bits, "bytes": weight_bytes, "macs": bit_operations}
