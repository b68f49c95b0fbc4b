"""Floating-point formats as frozen values, and the vocabulary of rounding.

A format is described by a handful of primitive facts (field widths, bias, what the reserved codes
mean); every other number is a documented property derived from them. Nothing here depends on torch:
the exact reference and the tensor code both read the same description. Terms follow IEEE 754, the OCP
FP8 and MX specifications, IEEE P3109 and ml_dtypes.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

Specials = Literal["ieee", "fn", "fnuz", "finite", "p3109"]
Rounding = Literal["nearest_even", "nearest_away", "toward_zero", "up", "down", "to_odd"]
Overflow = Literal["ovf_inf", "sat_finite", "sat_propagate"]

SPECIALS: tuple[str, ...] = get_args(Specials)
#: Rounding directions, in the senses of IEEE 754-2019 section 4.3 and IEEE P3109; ``to_odd`` is Boldo and
#: Melquiond's rounding to odd: an inexact result goes to the neighbour whose code is odd.
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
#: Stochastic roundings, and the most random bits that each takes: see `split_rounding`.
STOCHASTIC_ROUNDINGS: dict[str, int] = {"stochastic": 32, "stochastic_b": 31, "stochastic_c": 30}
#: Random bits where none are named: as many as a float32 can drop.
USUAL_RANDOM_BITS = 23
#: What happens to results beyond the largest finite value (IEEE P3109's names): see `resolve_overflow`.
OVERFLOWS: tuple[str, ...] = get_args(Overflow)


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format: sign, exponent field, mantissa field, from the top bit down.

    Attributes:
        exponent_bits: width E of the exponent field, 1 to 11.
        mantissa_bits: width M of the mantissa field (explicit bits, the leading one not counted), 0 to 52.
        bias: a normal number with exponent field ``f`` has exponent ``f - bias``. ``None`` (the default)
            takes the convention's own: ``2**(E-1) - 1``, for ``"fnuz"`` and ``"p3109"`` ``2**(E-1)``.
        specials: which codes are not numbers.
            ``"ieee"``: the top exponent field holds infinity (mantissa 0) and NaNs (IEEE 754);
            ``"fn"``: no infinity, NaN is the all-ones magnitude (OCP E4M3);
            ``"fnuz"``: no infinity, one NaN in the place of negative zero, no negative zero (ml_dtypes);
            ``"finite"``: neither infinity nor NaN (OCP FP6 and FP4);
            ``"p3109"``: infinity is the code after the largest finite value, one NaN in the place of negative zero,
            no negative zero (the extended formats of IEEE P3109); if unsigned, the NaN is the all-ones code.
        subnormals: whether exponent field 0 holds subnormals. If not, results are rounded as if the exponent
            had no lower bound and then, in every rounding direction, flushed to zero when they are below the
            smallest normal ("round, then flush", as a processor does in flush-to-zero mode); codes with
            exponent field 0 all decode to zero.
        signed: whether there is a sign bit.
        zero: whether code 0 is zero. ``False`` only for scale formats such as OCP E8M0, where exponent field 0
            is one more binade of normals.

    Raises:
        ValueError: a width, convention or combination that describes no format, or one with values that
            float64 does not have (no carrier could hold them).

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
        if not 1 <= e <= 11:
            raise ValueError(f"exponent_bits must be 1 to 11, got {e}: wider formats have values that float64 lacks")
        if not 0 <= m <= 52:
            raise ValueError(f"mantissa_bits must be 0 to 52, got {m}: wider formats have values that float64 lacks")
        if self.specials not in SPECIALS:
            raise ValueError(f"specials must be one of {', '.join(SPECIALS)}, got {self.specials!r}")
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
        """The bias of the convention: ``2**(E-1) - 1``, for fnuz ``2**(E-1)``."""
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
        """Code of positive infinity, None where the format has none."""
        return self.max_code + 1 if self.has_infinity else None

    @property
    def nan_code(self) -> int | None:
        """The NaN code that `encode` produces, None where the format has none.

        IEEE: the positive quiet NaN with an otherwise empty payload; fn and unsigned P3109: all ones, positive; fnuz
        and signed P3109: negative zero.
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
        field, mantissa = divmod(self.max_code, 1 << self.mantissa_bits)
        if field == 0 and self.zero:
            return mantissa * 2.0 ** (self.emin - self.mantissa_bits) if self.subnormals else 0.0
        return ((1 << self.mantissa_bits) + mantissa) * 2.0 ** (field - self.bias - self.mantissa_bits)

    @property
    def smallest_normal(self) -> float:
        """The smallest positive normal value, ``2**emin``."""
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        """The smallest positive value: a subnormal where the format has any, else `smallest_normal`."""
        return 2.0 ** (self.emin - self.mantissa_bits) if self.subnormals else self.smallest_normal

    @property
    def num_values(self) -> int:
        """How many different finite values there are (+0 and -0 count as one)."""
        positive = self.max_code + 1 - self.zero
        if not self.subnormals and self.zero:
            positive -= min((1 << self.mantissa_bits) - 1, self.max_code)
        return positive * (2 if self.signed else 1) + self.zero

    def is_subset_of(self, carrier: FloatFormat) -> bool:
        """Whether every finite value of this format is a value of ``carrier``, and likewise infinity and NaN."""
        return (
            self.mantissa_bits <= carrier.mantissa_bits
            and self.emin - self.mantissa_bits >= carrier.emin - carrier.mantissa_bits
            and (carrier.subnormals or self.smallest_subnormal >= carrier.smallest_normal)
            and self.max <= carrier.max
            and self.signed <= carrier.signed
            and self.has_infinity <= carrier.has_infinity
            and self.has_nan <= carrier.has_nan
            and self.zero <= carrier.zero
        )

    # -- names -----------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The canonical name: ``parse_format(f.name) == f`` for every format ``f``."""
        return _NAMES.get(self) or self._p3109_name() or self._systematic_name()

    def _p3109_name(self) -> str | None:
        """``binary8p3se`` and its kin, for IEEE P3109's formats with infinities; its others have older names."""
        usual = self.bias == self.default_bias and self.subnormals and self.zero
        if self.specials != "p3109" or not usual or self.bits not in _P3109_BITS:
            return None
        return f"binary{self.bits}p{self.precision}{'s' if self.signed else 'u'}e"

    def _systematic_name(self) -> str:
        stem = f"e{self.exponent_bits}m{self.mantissa_bits}"
        if stem + self.specials in _NAMED:  # e2m1fn and its kin: the plain suffix means something else there
            stem += f":{self.specials}"
        else:
            stem += _SUFFIX_OF[self.specials]
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


_SUFFIX_OF = {"ieee": "", "fn": "fn", "fnuz": "fnuz", "finite": "finite", "p3109": ":p3109"}
_SPECIALS_OF = {suffix: specials for specials, suffix in _SUFFIX_OF.items()}

#: Names whose meaning is fixed by a standard or by ml_dtypes and does not follow from the eXmY pattern.
_NAMED = {
    "e4m3b11fnuz": FloatFormat(4, 3, bias=11, specials="fnuz"),
    "e8m0fnu": FloatFormat(8, 0, specials="fn", subnormals=False, signed=False, zero=False, bias=127),
    "e2m3fn": FloatFormat(2, 3, specials="finite"),
    "e3m2fn": FloatFormat(3, 2, specials="finite"),
    "e2m1fn": FloatFormat(2, 1, specials="finite"),
}
_NAMES = {fmt: name for name, fmt in _NAMED.items()}

_ALIASES = {
    "bf16": "e8m7", "bfloat16": "e8m7",
    "fp16": "e5m10", "float16": "e5m10", "half": "e5m10",
    "tf32": "e8m10", "tfloat32": "e8m10",
    "fp32": "e8m23", "float32": "e8m23", "float": "e8m23",
    "fp64": "e11m52", "float64": "e11m52", "double": "e11m52",
}  # fmt: skip

#: The formats shown by ``fpsim formats`` and covered by name in the tests: all of ml_dtypes and torch,
#: and two of IEEE P3109.
NAMED_FORMATS: tuple[str, ...] = (
    "fp64", "fp32", "tf32", "bf16", "fp16",
    "e5m2", "e5m2fnuz", "e4m3fn", "e4m3", "e4m3fnuz", "e4m3b11fnuz", "e3m4", "e8m0fnu",
    "e3m2fn", "e2m3fn", "e2m1fn", "binary8p3se", "binary8p4se",
)  # fmt: skip

_PATTERN = re.compile(r"e(?P<e>\d+)m(?P<m>\d+)(?P<suffix>fnuz|fn|finite)?")
_P3109_BITS = range(3, 16)
_P3109_PATTERN = re.compile(r"binary(?P<k>\d+)p(?P<p>\d+)(?P<sign>[su])(?P<domain>[ef])")
_LIBRARY_PREFIX = re.compile(r"^(torch\.|ml_dtypes\.|jnp\.|np\.)?(float\d+_(?=e\d))?")


@lru_cache(maxsize=4096)
def _parse(name: str) -> FloatFormat:
    head, *options = name.strip().lower().split(":")
    head = _LIBRARY_PREFIX.sub("", head).removesuffix("_x2")
    head = _ALIASES.get(head, head)
    named = _NAMED.get(head)
    match = _PATTERN.fullmatch(head)
    p3109 = _P3109_PATTERN.fullmatch(head)
    if named is None and match is None and p3109 is None:
        known = list(dict.fromkeys([*NAMED_FORMATS, *_ALIASES]))
        near = difflib.get_close_matches(head, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"unknown format {name!r}: {hint}A format is one of {', '.join(NAMED_FORMATS)}, or eXmY "
            "(1 <= X <= 11 exponent bits, 0 <= Y <= 52 mantissa bits) with an optional suffix fn, fnuz or finite, "
            "or IEEE P3109's binaryKpP[su][ef] such as binary8p3se, "
            "and options :bias=N, :nosubnormals, :unsigned, :nozero"
        )
    facts: dict[str, object] = {}
    for option in options:
        if option in SPECIALS:
            facts["specials"] = option
        elif re.fullmatch(r"bias=-?\d+", option):
            facts["bias"] = int(option.removeprefix("bias="))
        elif option in ("nosubnormals", "unsigned", "nozero"):
            facts[{"nosubnormals": "subnormals", "unsigned": "signed", "nozero": "zero"}[option]] = False
        else:
            raise ValueError(
                f"unknown option {option!r} in format {name!r}: options are bias=N, {', '.join(SPECIALS)}, "
                "nosubnormals, unsigned, nozero"
            )
    try:
        if named is not None:
            return replace(named, **facts)  # type: ignore[arg-type]
        if p3109 is not None:
            fmt = _p3109(int(p3109["k"]), int(p3109["p"]), p3109["sign"] == "s", p3109["domain"] == "e")
            return replace(fmt, **facts)  # type: ignore[arg-type]
        assert match is not None
        facts.setdefault("specials", _SPECIALS_OF[match["suffix"] or ""])
        return FloatFormat(int(match["e"]), int(match["m"]), **facts)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"no such format {name!r}: {error}") from None


def _p3109(k: int, p: int, signed: bool, extended: bool) -> FloatFormat:
    """The format of IEEE P3109 (draft) with ``k`` bits in all and ``p`` bits of precision."""
    exponent_bits = k - p + (not signed)
    if k not in _P3109_BITS or p < 1 or exponent_bits < 1:
        raise ValueError(
            f"IEEE P3109 formats here have 3 to 15 bits, and 1 to {'K - 1' if signed else 'K'} bits of precision"
        )
    if extended:
        return FloatFormat(exponent_bits, p - 1, specials="p3109", signed=signed)
    if signed:
        return FloatFormat(exponent_bits, p - 1, specials="fnuz")
    return FloatFormat(exponent_bits, p - 1, bias=1 << (exponent_bits - 1), specials="fn", signed=False)


def parse_format(name: str | FloatFormat) -> FloatFormat:
    """The format that ``name`` denotes; a `FloatFormat` is returned as it is.

    Names are those of ml_dtypes and torch, with or without their prefix (``e4m3fn``, ``float8_e4m3fn``,
    ``torch.bfloat16``, ``fp16``, ``tf32``), and ``eXmY`` with an optional suffix ``fn``, ``fnuz`` or ``finite``
    (`FloatFormat.specials`; none means ``ieee``), then options ``:bias=N``, ``:nosubnormals``, ``:unsigned``,
    ``:nozero``. As in ml_dtypes and OCP MX, ``e2m1fn``, ``e2m3fn`` and ``e3m2fn`` have no NaN either: they are
    ``finite``. ``binary8p3se`` and its kin are the formats of IEEE P3109 (draft): 3 to 15 bits, precision, ``s``igned
    or ``u``nsigned, ``e``xtended (with infinities) or ``f``inite.

    Raises:
        ValueError: no such format; the message lists near matches.
        TypeError: neither a string nor a `FloatFormat`.

    >>> parse_format("float8_e4m3fn") == FloatFormat(4, 3, specials="fn")
    True
    >>> parse_format("e5m2:bias=16:nosubnormals").smallest_normal
    3.0517578125e-05
    """
    if isinstance(name, FloatFormat):
        return name
    if not isinstance(name, str):
        raise TypeError(f"a format is a name such as 'e4m3fn' or a FloatFormat, got {name!r} of type {type(name)}")
    return _parse(name)


def check_rounding(rounding: str) -> Rounding:
    """``rounding`` itself if it is one of `ROUNDINGS`, the deterministic ones.

    Raises:
        ValueError: it is not.
    """
    if rounding not in ROUNDINGS:
        hint = ""
        if str(rounding).partition(":")[0] in STOCHASTIC_ROUNDINGS:
            hint = " (stochastic rounding depends on a random number, which is not taken here)"
        raise ValueError(f"unknown rounding {rounding!r}: use one of {', '.join(ROUNDINGS)}{hint}")
    return rounding  # type: ignore[return-value]


def split_rounding(rounding: str) -> tuple[str, int]:
    """The name of any rounding, and its number of random bits: 0 for the deterministic ones.

    Stochastic rounding of an inexact x, at the fraction d (0 < d < 1) of the way from its neighbour toward zero to the
    one away from zero, with N random bits R (an integer, 0 <= R < 2**N), goes away from zero where

    - ``stochastic``: floor(d * 2**N) + R >= 2**N, with probability floor(d * 2**N) / 2**N;
    - ``stochastic_b``: d * 2**N + R + 1/2 >= 2**N, with probability floor(d * 2**N + 1/2) / 2**N;
    - ``stochastic_c``: D + R >= 2**N, D being d * 2**N rounded to an integer, ties to even.

    These are StochasticA, B and C of IEEE P3109 (draft); gfloat calls them StochasticFastest, StochasticFast and
    Stochastic. Their names may be followed by the number of random bits, ``stochastic:8``: 1 to 32, 31 and 30.
    Without it there are 23, as many as a float32 can drop.

    Raises:
        ValueError: an unknown rounding, or a number of random bits that it does not take.

    >>> split_rounding("stochastic:8"), split_rounding("up")
    (('stochastic', 8), ('up', 0))
    """
    name, colon, bits = str(rounding).partition(":")
    if name not in STOCHASTIC_ROUNDINGS:
        if rounding not in ROUNDINGS:
            known = ", ".join([*ROUNDINGS, *STOCHASTIC_ROUNDINGS])
            raise ValueError(f"unknown rounding {rounding!r}: use one of {known} (the last three also with :BITS)")
        return rounding, 0
    if not colon:
        return name, USUAL_RANDOM_BITS
    if not re.fullmatch(r"[0-9]+", bits) or not 1 <= int(bits) <= STOCHASTIC_ROUNDINGS[name]:
        raise ValueError(f"rounding {rounding!r}: random bits are 1 to {STOCHASTIC_ROUNDINGS[name]}, got {bits!r}")
    return name, int(bits)


def full_rounding(rounding: str) -> str:
    """Any rounding spelled out: ``stochastic`` with its number of random bits, the deterministic ones as they are.

    Raises:
        ValueError: as `split_rounding`.
    """
    name, bits = split_rounding(rounding)
    return f"{name}:{bits}" if bits else name


def resolve_overflow(fmt: FloatFormat, overflow: str | None) -> Overflow:
    """The overflow mode in force for ``fmt``: ``overflow``, or where it is None the format's usual one.

    A result overflows when, rounded to the format's precision as if the exponent had no upper bound, it is
    beyond the largest finite value. Then, in the names of IEEE P3109:

    - ``ovf_inf``: as the rounding direction says (IEEE 754-2019 section 7.4): the nearest and the stochastic modes
      give infinity,
      ``toward_zero`` and ``to_odd`` the largest finite value, ``up`` and ``down`` one or the other by sign.
      Where the format has no infinity, NaN stands for it.
    - ``sat_finite``: the largest finite value, for infinities too.
    - ``sat_propagate``: the largest finite value for finite inputs; infinities stay (NaN where there are none).

    None means ``ovf_inf`` for formats with infinities, else ``sat_finite``. In an unsigned format a result
    below zero is an overflow as well: NaN under ``ovf_inf``, else the smallest value (but -inf under
    ``sat_propagate`` is NaN); in a format without zero the same holds for an input of zero.

    Raises:
        ValueError: an unknown mode, or one that needs an infinity or a NaN where ``fmt`` has neither.
    """
    if overflow is None:
        return "ovf_inf" if fmt.has_infinity else "sat_finite"
    if overflow not in OVERFLOWS:
        raise ValueError(f"unknown overflow mode {overflow!r}: use one of {', '.join(OVERFLOWS)}, or None")
    if overflow != "sat_finite" and not (fmt.has_infinity or fmt.has_nan):
        raise ValueError(
            f"overflow={overflow!r} needs an infinity or a NaN and {fmt.name} has neither: use overflow='sat_finite'"
        )
    return overflow  # type: ignore[return-value]
