"""Floating-point formats as frozen values.

A few primitive facts describe a format: the widths of its fields, its bias, and the meaning of its reserved codes.
Every other number is a documented property that is derived from these facts. Nothing here depends on torch: the exact
reference and the tensor code read the same description. Terms follow IEEE 754, the OCP FP8 and MX specifications,
IEEE P3109 and ml_dtypes.
"""

from __future__ import annotations

import reprlib
import struct
from dataclasses import dataclass
from typing import Literal, get_args

Specials = Literal["ieee", "fn", "fnuz", "finite", "p3109"]

SPECIALS: tuple[str, ...] = get_args(Specials)


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format. From the top bit down: the sign, the exponent field, the mantissa field.

    Attributes:
        exponent_bits: width E of the exponent field, 1 to 11.
        mantissa_bits: width M of the mantissa field, 0 to 52. The implicit leading bit is not counted.
        bias: a normal number with exponent field ``f`` has exponent ``f - bias``. ``None`` (the default)
            means the usual bias of ``specials``: ``2**(E-1)`` for ``"fnuz"`` and ``"p3109"``, else ``2**(E-1) - 1``.
        specials: which codes are infinities and NaNs.
            ``"ieee"``: the top exponent field holds infinity (mantissa 0) and NaNs (IEEE 754);
            ``"fn"``: no infinity, NaN is the all-ones magnitude (OCP E4M3);
            ``"fnuz"``: no infinity, one NaN in the place of negative zero, no negative zero (ml_dtypes);
            ``"finite"``: neither infinity nor NaN (OCP FP6 and FP4);
            ``"p3109"``: infinity is the code after the largest finite value, one NaN in the place of negative zero,
            no negative zero (the extended formats of IEEE P3109). In an unsigned format the NaN is the all-ones code.
        subnormals: whether exponent field 0 holds subnormals. If it does not, all codes with exponent field 0
            decode to zero. A result is then rounded as if the exponent had no lower bound, and afterwards flushed
            to zero if it is below the smallest normal. This holds in every rounding direction ("round, then
            flush", as a processor does in flush-to-zero mode).
        signed: whether there is a sign bit.
        zero: whether code 0 is zero. ``False`` only for scale formats such as OCP E8M0, where exponent field 0
            holds one more binade of normals.

    Raises:
        TypeError: a width or the bias is not an int.
        ValueError: the attributes describe no format, or a format with values that float64 does not have (no
            carrier could hold them).

    >>> FloatFormat(4, 3, specials="fn").max
    448.0
    >>> FloatFormat(5, 2).name
    'e5m2'
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int = None  # type: ignore[assignment]  # filled in below; always an int once constructed
    specials: Specials = "ieee"
    subnormals: bool = True
    signed: bool = True
    zero: bool = True

    def __post_init__(self) -> None:
        e, m = self.exponent_bits, self.mantissa_bits
        if type(e) is not int or type(m) is not int or not (self.bias is None or type(self.bias) is int):
            raise TypeError(f"the widths and the bias of a format are ints, got {reprlib.repr((e, m, self.bias))}")
        if not 1 <= e <= 11:
            raise ValueError(f"exponent_bits must be 1 to 11, got {e}: wider formats have values that float64 lacks")
        if not 0 <= m <= 52:
            raise ValueError(f"mantissa_bits must be 0 to 52, got {m}: wider formats have values that float64 lacks")
        if not isinstance(self.specials, str) or self.specials not in SPECIALS:
            raise ValueError(f"specials must be one of {', '.join(SPECIALS)}, got {reprlib.repr(self.specials)}")
        if self.specials == "fnuz" and not self.signed:
            raise ValueError("an unsigned format cannot be 'fnuz', which keeps its NaN at negative zero: use 'fn'")
        if not self.zero and (self.subnormals or self.signed):
            raise ValueError("a format without zero must be unsigned and without subnormals, as OCP E8M0 is")
        if self.specials == "p3109" and e + m < 2:
            raise ValueError("a 'p3109' format needs two exponent and mantissa bits, or no code is left for a number")
        if self.bias is None:
            object.__setattr__(self, "bias", self.default_bias)
        if self.emin - m < -1074 or self.max_exponent > 1023:
            raise ValueError(
                f"bias {self.bias} gives values from 2**{self.emin - m} to 2**{self.max_exponent}, "
                "which float64 (2**-1074 to 2**1023) cannot hold"
            )

    # -- field arithmetic ------------------------------------------------------------------------------------

    @property
    def default_bias(self) -> int:
        """The usual bias of `specials`: ``2**(E-1)`` for fnuz and p3109, else ``2**(E-1) - 1``."""
        half = 1 << (self.exponent_bits - 1)
        return half if self.specials in ("fnuz", "p3109") else half - 1

    @property
    def bits(self) -> int:
        """Width of a code in bits."""
        return self.signed + self.exponent_bits + self.mantissa_bits

    @property
    def precision(self) -> int:
        """Significant bits of a normal number, the leading one included (IEEE 754's p)."""
        return self.mantissa_bits + 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number."""
        return (1 if self.zero else 0) - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the leading bit of the largest finite value (emin if all finite values are subnormal)."""
        return max(self.max_code >> self.mantissa_bits, 1 if self.zero else 0) - self.bias

    @property
    def has_infinity(self) -> bool:
        """Whether the format has infinities."""
        return self.specials in ("ieee", "p3109")

    @property
    def has_nan(self) -> bool:
        """Whether the format has a NaN. (E1M0 with "ieee" has an infinity but no code left for a NaN.)"""
        return self.specials in ("fn", "fnuz", "p3109") or (self.specials == "ieee" and self.mantissa_bits > 0)

    @property
    def has_negative_zero(self) -> bool:
        """Whether the format distinguishes -0 from +0."""
        return self.signed and self.specials not in ("fnuz", "p3109")

    @property
    def nan_is_negative_zero(self) -> bool:
        """Whether the only NaN has the code that negative zero would have."""
        return self.signed and self.specials in ("fnuz", "p3109")

    # -- codes -----------------------------------------------------------------------------------------------

    @property
    def sign_code(self) -> int:
        """The code with only the sign bit set, 0 for an unsigned format."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def max_code(self) -> int:
        """Code of the largest finite value."""
        magnitude_codes = 1 << (self.exponent_bits + self.mantissa_bits)
        if self.specials == "ieee":
            return magnitude_codes - (1 << self.mantissa_bits) - 1
        if self.specials == "p3109":
            return magnitude_codes - (2 if self.signed else 3)
        return magnitude_codes - (2 if self.specials == "fn" else 1)

    @property
    def infinity_code(self) -> int | None:
        """Code of positive infinity; None if the format has none."""
        return self.max_code + 1 if self.has_infinity else None

    @property
    def nan_code(self) -> int | None:
        """The NaN code that `encode` produces; None if the format has none.

        For ieee it is the positive quiet NaN with an otherwise empty payload. For fn it is the positive code whose
        other bits are all ones. For fnuz and signed p3109 it is the code of negative zero, for unsigned p3109 all ones.
        """
        if not self.has_nan:
            return None
        if self.specials == "ieee":
            return self.max_code + 1 + (1 << (self.mantissa_bits - 1))
        return self.sign_code if self.nan_is_negative_zero else self.max_code + 1 + self.has_infinity

    def is_nan_code(self, code: int) -> bool:
        """Whether ``code`` (0 <= code < 2**bits) is a NaN."""
        if self.nan_is_negative_zero:
            return code == self.sign_code
        magnitude = code & ~self.sign_code
        return magnitude > self.max_code + (1 if self.has_infinity else 0)

    # -- values ----------------------------------------------------------------------------------------------

    @property
    def max(self) -> float:
        """The largest finite value."""
        return float64_of(self.max_units)

    @property
    def max_units(self) -> int:
        """The largest finite value in units of 2**-1074, the smallest subnormal of float64."""
        field, mantissa = divmod(self.max_code, 1 << self.mantissa_bits)
        if field == 0 and self.zero:
            return mantissa << (self.emin - self.mantissa_bits + 1074) if self.subnormals else 0
        return ((1 << self.mantissa_bits) + mantissa) << (field - self.bias - self.mantissa_bits + 1074)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal value, ``2**emin``."""
        return float64_of(1 << (self.emin + 1074))

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest positive value, a power of two: a subnormal if the format has subnormals."""
        return self.emin - self.mantissa_bits if self.subnormals else self.emin

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value: a subnormal if the format has subnormals, else `smallest_normal`."""
        return float64_of(1 << (self.smallest_exponent + 1074))

    @property
    def num_values(self) -> int:
        """The number of different finite values (+0 and -0 count as one)."""
        positive = self.max_code + 1 - self.zero
        if not self.subnormals and self.zero:
            positive -= min((1 << self.mantissa_bits) - 1, self.max_code)
        return positive * (2 if self.signed else 1) + self.zero

    def is_subset_of(self, carrier: FloatFormat) -> bool:
        """Whether ``carrier`` has every finite value of this format, and infinity and NaN if this format has them."""
        return (
            self.mantissa_bits <= carrier.mantissa_bits
            and self.emin - self.mantissa_bits >= carrier.emin - carrier.mantissa_bits
            and (carrier.subnormals or self.smallest_exponent >= carrier.emin)
            and self.max_units <= carrier.max_units
            and self.signed <= carrier.signed
            and self.has_infinity <= carrier.has_infinity
            and self.has_nan <= carrier.has_nan
            and self.zero <= carrier.zero
        )

    # -- names -----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The canonical name: ``parse_format(f.name) == f`` for every format ``f``."""
        return _STANDARD_NAMES.get(self) or self._p3109_name() or self._systematic_name()

    def _p3109_name(self) -> str | None:
        """The IEEE P3109 name of a format with infinities, such as ``binary8p3se``. Others have older names."""
        usual = self.bias == self.default_bias and self.subnormals and self.zero
        if self.specials != "p3109" or not usual or self.bits not in P3109_BITS:
            return None
        return f"binary{self.bits}p{self.precision}{'s' if self.signed else 'u'}e"

    def _systematic_name(self) -> str:
        stem = f"e{self.exponent_bits}m{self.mantissa_bits}"
        if stem + self.specials in STANDARD_FORMATS:  # in e2m1fn, for example, the suffix means `finite`
            stem += f":{self.specials}"
        else:
            stem += SUFFIX_OF[self.specials]
        if self.bias != self.default_bias:
            stem += f":bias={self.bias}"
        if not self.subnormals:
            stem += ":nosubnormals"
        if not self.signed:
            stem += ":unsigned"
        if not self.zero:
            stem += ":nozero"
        return stem

    def __str__(self) -> str:
        return self.name


def float64_of(units: int) -> float:
    """The float64 that equals ``units`` * 2**-1074, for a number that float64 has.

    The bits are assembled from integers: if a process flushes subnormals to zero, floating-point operations lose them.
    """
    shift = max(units.bit_length() - 53, 0)
    return float(struct.unpack("<d", struct.pack("<Q", (shift << 52) + (units >> shift)))[0])


#: The suffix of a format's name for each value of `FloatFormat.specials`.
SUFFIX_OF = {"ieee": "", "fn": "fn", "fnuz": "fnuz", "finite": "finite", "p3109": ":p3109"}

#: Names that a standard or ml_dtypes defines, and whose meaning does not follow from the pattern eXmY.
STANDARD_FORMATS = {
    "e4m3b11fnuz": FloatFormat(4, 3, bias=11, specials="fnuz"),
    "e8m0fnu": FloatFormat(8, 0, specials="fn", subnormals=False, signed=False, zero=False, bias=127),
    "e2m3fn": FloatFormat(2, 3, specials="finite"),
    "e3m2fn": FloatFormat(3, 2, specials="finite"),
    "e2m1fn": FloatFormat(2, 1, specials="finite"),
}
_STANDARD_NAMES = {fmt: name for name, fmt in STANDARD_FORMATS.items()}

#: The widths in bits of the formats of IEEE P3109 that fpsim names.
P3109_BITS = range(3, 16)
