"""Matrix units in float64 arithmetic of numpy, beside the reference and without any of its code.

Every number here is exact in float64: a cut term has at most 36 significant bits, and their sum a few more. Rows are
independent inner products. A number is written as significand times ``2**exponent``, with ``np.frexp``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Unit:
    """A matrix unit: ``length`` products in a step, ``bits`` kept below the largest exponent, and the result's format.

    Attributes:
        precision: significant bits of the result, and ``emin`` its least exponent.
        nearest: whether the result is rounded to nearest, ties to even; else it is cut.
        floor: the exponent of a zero.
        late: None, or the bits that are kept when the accumulator joins (CDNA 3), with ``lanes`` partial sums.
    """

    length: int
    bits: int
    precision: int = 24
    emin: int = -126
    nearest: bool = False
    floor: int = -133
    late: int | None = None
    lanes: int = 1

    def dot(
        self, a: np.ndarray, b: np.ndarray, least: int | tuple[int, int], c: np.ndarray | None = None
    ) -> np.ndarray:
        """The inner products of the rows of ``a`` and ``b``, two float64 arrays of shape (rows, K), after ``c``.

        ``least`` is the least exponent of the operands' formats.
        """
        total = np.zeros(len(a)) if c is None else c.astype(np.float64)
        least_a, least_b = least if isinstance(least, tuple) else (least, least)
        for first in range(0, a.shape[1], self.length):
            part = slice(first, first + self.length)
            with np.errstate(all="ignore"):
                x, y = _split(a[:, part], least_a), _split(b[:, part], least_b)
                step = self._step if self.late is None else self._late_step
                total = step(x[0] * y[0], x[1] + y[1], total)
        return total

    def scaled_dot(
        self,
        a: np.ndarray,
        b: np.ndarray,
        scales: tuple[np.ndarray, np.ndarray],
        least: int,
        least_scale: int,
        group: int,
    ) -> np.ndarray:
        """`dot` of elements with scales, one each; ``group`` products are one term with their scales' exponent."""
        total = np.zeros(len(a))
        parts = [
            _split(x, floor) for x, floor in zip((a, b, *scales), (least, least, least_scale, least_scale), strict=True)
        ]
        significands, exponents = np.prod([s for s, _ in parts], axis=0), sum(e for _, e in parts)
        if group > 1:
            of_scales = parts[2][1] + parts[3][1]
            exact = np.ldexp(significands, exponents - of_scales)
            starts = range(0, a.shape[1], group)
            significands = np.stack([exact[:, i : i + group].sum(axis=1) for i in starts], axis=1)
            is_zero = np.stack([(exact[:, i : i + group] == 0).all(axis=1) for i in starts], axis=1)
            exponents = np.where(is_zero, self.floor, of_scales[:, ::group])
        for first in range(0, significands.shape[1], self.length // group):
            part = slice(first, first + self.length // group)
            total = self._step(significands[:, part], exponents[:, part], total, zeros_count=group > 1)
        return total

    def _step(
        self, significands: np.ndarray, exponents: np.ndarray, total: np.ndarray, zeros_count: bool = False
    ) -> np.ndarray:
        """One step; ``zeros_count``: products that cancel to zero keep their exponent."""
        own, exponent = _split(total, self.emin)
        s = np.concatenate([significands, own[:, None]], axis=1)
        e = np.concatenate([exponents, np.where(total == 0, self.floor, exponent)[:, None]], axis=1)
        e = np.where((s == 0) & (not zeros_count), self.floor, e)
        top = e.max(axis=1)
        cut = np.trunc(np.ldexp(s, e - top[:, None] + self.bits)).sum(axis=1)
        return self._rounded(np.ldexp(cut, top - self.bits)) + 0.0

    def _late_step(self, significands: np.ndarray, exponents: np.ndarray, total: np.ndarray) -> np.ndarray:
        assert self.late is not None
        too_large = np.abs(np.ldexp(significands, exponents)) >= 2.0**128
        significands = np.where(too_large, np.copysign(np.inf, significands), significands)
        exponents = np.where(significands == 0, -9999, exponents)
        sums, tops = [], []
        for lane in range(self.lanes):
            s, e = significands[:, lane :: self.lanes], exponents[:, lane :: self.lanes]
            top = e.max(axis=1, initial=-9999)
            sums.append(np.trunc(np.ldexp(s, e - top[:, None] + self.bits)).sum(axis=1))
            tops.append(top)
        highest = np.max(tops, axis=0)
        together = sum(np.floor(np.ldexp(s, top - highest)) for s, top in zip(sums, tops, strict=True))
        own, exponent = _split(total, -126)
        joined = np.maximum(highest, exponent)
        products = np.floor(np.ldexp(together, highest - self.bits - joined + self.late + 1))
        kept = np.floor(np.ldexp(own, exponent - joined + self.bits))
        if self.lanes > 1:
            kept = np.where(np.isfinite(own) & (exponent < joined - self.bits - 1), 0.0, kept)
        result = np.ldexp(products, -self.late - 1) + np.ldexp(kept, -self.bits) + 0.0
        s, e = _split(np.ldexp(result, joined), -126)
        return self._rounded(np.ldexp(np.floor(np.ldexp(s, self.late)), e - self.late))

    def _rounded(self, value: np.ndarray) -> np.ndarray:
        s, e = _split(value, self.emin)
        scaled = np.ldexp(s, self.precision - 1)
        result = np.ldexp(np.rint(scaled) if self.nearest else np.trunc(scaled), e - self.precision + 1)
        return np.where(np.abs(result) >= 2.0 ** (2 - self.emin), np.copysign(np.inf, result), result)


def _split(x: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Significands and exponents: 1 <= |significand| < 2, or less where the exponent would be below ``least``.

    Zeros, infinities and NaN have the exponent ``least``.
    """
    _, e = np.frexp(x)
    e = np.where((x == 0) | ~np.isfinite(x), least, np.maximum(e - 1, least))
    return np.where(np.isfinite(x), np.ldexp(x, -e), x), e


#: The units whose behaviour is known, by the machine and the format of the operands.
UNITS: dict[tuple[str, str], Unit] = {
    ("volta", "fp16"): Unit(4, 23, floor=-131),
    **{(name, fmt): Unit(8, 24, floor=-132) for name in ("ampere", "ada") for fmt in ("fp16", "bf16")},
    **{(name, "tf32"): Unit(4, 24, floor=-132) for name in ("ampere", "ada")},
    **{("ada_fp8", fmt): Unit(16, 13, precision=14, floor=-132) for fmt in ("e4m3fn", "e5m2")},
    **{(name, fmt): Unit(16, 25) for name in ("hopper", "blackwell") for fmt in ("fp16", "bf16")},
    **{(name, "tf32"): Unit(8, 25) for name in ("hopper", "blackwell")},
    **{("hopper_fp8", fmt): Unit(32, 13, precision=14) for fmt in ("e4m3fn", "e5m2")},
    **{("blackwell", fmt): Unit(32, 25) for fmt in ("e4m3fn", "e5m2", "e3m2fn", "e2m3fn", "e2m1fn")},
    **{("mi300", fmt): Unit(8, 24, nearest=True, late=31) for fmt in ("fp16", "bf16")},
    ("mi300", "tf32"): Unit(4, 24, nearest=True, late=31),
    **{("mi300_fp8", fmt): Unit(16, 24, nearest=True, late=31, lanes=2) for fmt in ("e4m3fnuz", "e5m2fnuz")},
}
