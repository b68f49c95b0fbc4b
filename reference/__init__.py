"""The exact reference: slow, scalar, and written as the standards read; the judge of everything else in fpsim.

Values are fractions, signed zeros, infinities and NaN. Codes are integers. No result depends on a floating-point
operation. The reference imports nothing of fpsim but the description of the formats, and neither torch nor numpy.

- `round`, `table`, `encode` and `decode`: into a format, and between values and codes.
- `add` to `remainder`, `exp` to `pow`: operations, correctly rounded into any format.
- `sum` and `dot`: exact, or with every step rounded, in any order.
- `round_block` and `round_blocks`, `quantize_block` and `quantize_blocks`: elements that share a scale, as in OCP MX
  and NVFP4. `block_scale` and `scale_steps`: the scales of OCP MX. `delayed_scales`: those that earlier steps give.
- `hadamard`, `smoothing_factor`, `sorted_channels` and `round_power_map`: transforms before rounding.
- `round_integer` and `round_codebook`: to integers, and to the nearest of a list of values.
- `flash_forward` and `flash_backward`: attention in tiles, with every step rounded (`Steps`).
- `with_flags`: any of these with the flags it raises.
- `compare` to `maximum_number`, `classify` to `ulp`: comparison, classes, neighbours and exponents.

Stochastic rounding takes its random numbers as an argument, so that everything here is a function of its arguments.

The files build on one another in this order: values, decoding, substitutes, rounding, encoding, outcomes, operations,
enclosures, irrational, arithmetic, elementary, aligned, orders, sums, flags; and, beside these, tables, comparison,
classification, and integers, codebooks, elements, scales, blocks, attention, histories,
transforms.
"""

from .aligned import Aligned
from .arithmetic import add, convert, div, fma, mul, remainder, sqrt, sub
from .attention import Steps, causal, flash_backward, flash_forward
from .blocks import Block, Cast, block_indices, parse_cast, quantize_block, quantize_blocks, round_block, round_blocks
from .classification import (
    FloatClass,
    classify,
    is_finite,
    is_infinite,
    is_nan,
    is_normal,
    is_subnormal,
    is_zero,
    logb,
    next_down,
    next_up,
    scaleb,
    ulp,
)
from .codebooks import CODEBOOKS, Codebook, dynamic_map, parse_codebook, round_codebook
from .comparison import (
    compare,
    equal,
    greater,
    greater_equal,
    is_sign_minus,
    less,
    less_equal,
    maximum,
    maximum_number,
    minimum,
    minimum_number,
    total_order,
    unordered,
)
from .decoding import decode
from .elementary import cos, erf, exp, exp2, gelu, log, log2, pow, rsqrt, sigmoid, sin, tanh
from .encoding import encode
from .flags import with_flags
from .histories import delayed_scales
from .integers import Integers, parse_integers, round_integer
from .outcomes import TININESS, Flags, Result
from .reductions import mean, variance
from .rounding import round
from .scales import Scale, block_scale, parse_scale, scale_steps
from .sums import dot, sum
from .tables import Interval, Table, table
from .transforms import (
    hadamard,
    hadamard_signs,
    paley_matrix,
    power_of_group,
    round_power_map,
    smoothing_factor,
    sorted_channels,
)
from .values import INFINITY, NAN, NEGATIVE_INFINITY, NEGATIVE_ZERO, Number, Special, Value, as_value, to_float

__all__ = [
    "CODEBOOKS",
    "INFINITY",
    "NAN",
    "NEGATIVE_INFINITY",
    "NEGATIVE_ZERO",
    "TININESS",
    "Aligned",
    "Block",
    "Cast",
    "Codebook",
    "Flags",
    "FloatClass",
    "Integers",
    "Interval",
    "Number",
    "Result",
    "Scale",
    "Special",
    "Steps",
    "Table",
    "Value",
    "add",
    "as_value",
    "block_indices",
    "block_scale",
    "causal",
    "classify",
    "compare",
    "convert",
    "cos",
    "decode",
    "delayed_scales",
    "div",
    "dot",
    "dynamic_map",
    "encode",
    "equal",
    "erf",
    "exp",
    "exp2",
    "flash_backward",
    "flash_forward",
    "fma",
    "gelu",
    "greater",
    "greater_equal",
    "hadamard",
    "hadamard_signs",
    "is_finite",
    "is_infinite",
    "is_nan",
    "is_normal",
    "is_sign_minus",
    "is_subnormal",
    "is_zero",
    "less",
    "less_equal",
    "log",
    "log2",
    "logb",
    "maximum",
    "maximum_number",
    "mean",
    "minimum",
    "minimum_number",
    "mul",
    "next_down",
    "next_up",
    "paley_matrix",
    "parse_cast",
    "parse_codebook",
    "parse_integers",
    "parse_scale",
    "pow",
    "power_of_group",
    "quantize_block",
    "quantize_blocks",
    "remainder",
    "round",
    "round_block",
    "round_blocks",
    "round_codebook",
    "round_integer",
    "round_power_map",
    "rsqrt",
    "scale_steps",
    "scaleb",
    "sigmoid",
    "sin",
    "smoothing_factor",
    "sorted_channels",
    "sqrt",
    "sub",
    "sum",
    "table",
    "tanh",
    "to_float",
    "total_order",
    "ulp",
    "unordered",
    "variance",
    "with_flags",
]


def __dir__() -> list[str]:
    return sorted(__all__)
