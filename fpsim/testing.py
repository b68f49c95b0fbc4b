"""For tests of your own kernels: compare tensors bit for bit, compare a function with the reference, draw inputs.

`assert_bitwise_equal` tells how two tensors differ: in the sign of a zero, by a flushed subnormal, by one unit in the
last place. `assert_rounds` runs a function on the inputs where an error is likeliest and compares it with
`fpsim.reference`, as `fpsim.verify` does with `fpsim.round`. `formats`, `values_near_boundaries` and `tensors` are
strategies of hypothesis. They import hypothesis when they are called; it comes with ``pip install 'fpsim-torch[dev]'``.
"""

from fpsim.verify.assertions import (
    DIFFERENCES,
    Difference,
    assert_bitwise_equal,
    assert_rounds,
    classify_differences,
)
from fpsim.verify.strategies import formats, tensors, values_near_boundaries

__all__ = [
    "DIFFERENCES",
    "Difference",
    "assert_bitwise_equal",
    "assert_rounds",
    "classify_differences",
    "formats",
    "tensors",
    "values_near_boundaries",
]
