"""The exact reference: slow, scalar, and written as the standards read; the judge of everything else in fpsim.

Values are fractions (and signed zeros, infinities and NaN), codes are integers, and no floating-point operation
decides anything. It shares with the rest of fpsim only the description of the formats.
"""

from .decoding import decode
from .encoding import encode
from .rounding import round
from .tables import Interval, Table, table
from .values import INFINITY, NAN, NEGATIVE_INFINITY, NEGATIVE_ZERO, Number, Special, Value, as_value, to_float

__all__ = [
    "INFINITY",
    "NAN",
    "NEGATIVE_INFINITY",
    "NEGATIVE_ZERO",
    "Interval",
    "Number",
    "Special",
    "Table",
    "Value",
    "as_value",
    "decode",
    "encode",
    "round",
    "table",
    "to_float",
]
