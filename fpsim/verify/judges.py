"""The right result of rounding every bit pattern of a carrier.

`fpsim.reference.table` divides the real line into intervals of inputs with the same result. The non-negative codes of
a carrier are in the order of their values, the negative ones in the reverse order. So a table becomes a list of *runs*
of consecutive codes with the same result: a `Judge`. Where there is no table (wide formats, stochastic rounding),
`results_one_by_one` asks `fpsim.reference.round` for each input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from fpsim import reference
from fpsim.formats import ROUNDINGS, FloatFormat, Overflow, Rounding, parse_format, resolve_overflow
from fpsim.reference.values import is_negative, negate
from fpsim.rounding.carriers import CARRIERS, check_carrier
from fpsim.verify.codes import Codes, code_of, exact_code_of, tensor_of, unsigned_of


@dataclass(frozen=True, eq=False)
class Judge:
    """The result of every bit pattern of a carrier: the reference's table as runs of codes.

    Attributes:
        format, rounding, overflow: the target and the mode; ``overflow`` is the mode in force, never None.
        dtype: the carrier.
        starts: the first code of each run, increasing from 0, as unsigned integers of the carrier's width.
        results: the code of each run's result; NaN stands as the carrier's canonical NaN.
    """

    format: FloatFormat
    rounding: Rounding
    overflow: Overflow
    dtype: torch.dtype
    starts: Codes
    results: Codes

    @property
    def carrier(self) -> FloatFormat:
        """The format of the carrier."""
        return CARRIERS[self.dtype]

    @cached_property
    def ends(self) -> list[int]:
        """The code after each run's last."""
        return [*self.starts[1:].tolist(), 1 << self.carrier.bits]

    def expected(self, codes: Codes) -> Codes:
        """The codes of the results of rounding ``codes``.

        Args:
            codes: bit patterns of the carrier, any shape, as integers of its width (signed or unsigned).

        Returns:
            An array of unsigned integers of the carrier's width, of the shape of ``codes``.
        """
        codes = np.asarray(codes).view(self.starts.dtype)
        return self.results[np.searchsorted(self.starts, codes, side="right") - 1]

    def expand(self, first: int, out: Codes) -> list[tuple[int, int]]:
        """Write the results of the codes ``first``, ``first + 1``, ... into ``out``, as many as it is long.

        Returns:
            The ranges of positions in ``out`` that must be NaN.
        """
        nan, nans = self.carrier.nan_code, []
        run = int(np.searchsorted(self.starts, self.starts.dtype.type(first), side="right")) - 1
        position = 0
        while position < len(out):
            end = min(self.ends[run] - first, len(out))
            out[position:end] = self.results[run]
            if self.results[run] == nan:
                nans.append((position, end))
            position, run = end, run + 1
        return nans

    def probes(self, radius: int = 2) -> Codes:
        """The codes where an error is likeliest: every boundary and every result, with ``radius`` codes on either side.

        Among them are the zeros, the infinities, the largest numbers, the smallest, and NaNs with several payloads.
        """
        carrier, unsigned = self.carrier, self.starts.dtype
        nan = exact_code_of(reference.NAN, carrier)
        special = [0, 1 << carrier.mantissa_bits, carrier.max_code + 1, nan, carrier.sign_code - 1]
        special += [code | carrier.sign_code for code in special]
        last = self.starts - unsigned.type(1)  # of the run before: a boundary that is a code is one of the two
        centres = np.unique(np.concatenate([last, self.starts, self.results, np.array(special, unsigned)]))
        offsets = np.arange(-radius, radius + 1).astype(unsigned)  # wraps around, as the sum does
        return np.unique(centres[:, None] + offsets)


def judge(
    format: str | FloatFormat,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Judge:
    """The `Judge` of rounding tensors of ``dtype`` to ``format``; built once per combination.

    Args:
        format: a name or a `FloatFormat` of at most `fpsim.reference.tables.MAX_BITS` exponent and mantissa bits.
        rounding, overflow: as in `fpsim.round`.
        dtype: float64, float32, bfloat16 or float16.

    Raises:
        ValueError: an unknown format or mode, a format too wide for a table, or one that ``dtype`` cannot carry.
        TypeError: ``dtype`` is not a carrier.

    >>> [hex(code) for code in judge("e2m1fn").expected(np.array([0x3F800001, 0xC0A00000], np.uint32)).tolist()]
    ['0x3f800000', '0xc0800000']
    """
    fmt = parse_format(format)
    return _judge(fmt, rounding, resolve_overflow(fmt, overflow), dtype)


@lru_cache(maxsize=8)
def _judge(fmt: FloatFormat, rounding: str, overflow: str, dtype: torch.dtype) -> Judge:
    carrier = check_carrier(dtype, fmt)
    table = reference.table(fmt, rounding, overflow)
    zero = next(i for i, interval in enumerate(table.intervals) if not is_negative(interval.lower))
    mirrored = [
        (negate(interval.upper), interval.upper_closed, interval.result)
        for interval in reversed(table.intervals[:zero])
    ]
    positive = [(interval.lower, interval.lower_closed, interval.result) for interval in table.intervals[zero:]]
    runs: dict[int, int] = {}  # in the order of codes; the next run replaces an empty one
    for sign, half in ((0, positive), (carrier.sign_code, mirrored)):
        for lower, closed, result in half:
            code, exact = code_of(lower, carrier)
            start = code if exact and closed else code + 1
            runs[sign + start] = exact_code_of(result, carrier)
        runs[sign + carrier.max_code + 2] = exact_code_of(table.nan, carrier)  # replaces a run open at infinity
    unsigned = unsigned_of(carrier)
    starts, results = np.array(list(runs), unsigned), np.array(list(runs.values()), unsigned)
    different = np.append(True, results[1:] != results[:-1])
    return Judge(fmt, table.rounding, table.overflow, dtype, starts[different], results[different])


def has_table(fmt: FloatFormat, rounding: str, most_bits: int) -> bool:
    """Whether there is a table: a direction, and at most ``most_bits`` exponent and mantissa bits."""
    return rounding in ROUNDINGS and fmt.exponent_bits + fmt.mantissa_bits <= most_bits


def results_one_by_one(
    fmt: FloatFormat,
    rounding: str,
    overflow: str,
    codes: Codes,
    dtype: torch.dtype,
    random_numbers: Iterable[int] | None = None,
) -> Codes:
    """The codes of the results of rounding ``codes``, each from `fpsim.reference.round`.

    Args:
        fmt, rounding, overflow: as in `fpsim.reference.round`.
        codes: bit patterns of ``dtype``, of one dimension.
        dtype: the carrier.
        random_numbers: for stochastic rounding, the random number of each code.
    """
    carrier = CARRIERS[dtype]
    values = tensor_of(codes, dtype).double().tolist()
    draws: Iterable[int | None] = [None] * len(values) if random_numbers is None else random_numbers
    results = (
        reference.round(value, fmt, rounding, overflow, random=draw) for value, draw in zip(values, draws, strict=True)
    )
    return np.array([exact_code_of(result, carrier) for result in results], unsigned_of(carrier))
