"""Names of formats: the names of standards and libraries, and the pattern ``eXmY`` with options."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from fpsim.formats.float import P3109_BITS, SPECIALS, STANDARD_FORMATS, SUFFIX_OF, FloatFormat
from fpsim.suggestions import near_names

_SPECIALS_OF = {suffix: specials for specials, suffix in SUFFIX_OF.items()}

_ALIASES = {
    "bf16": "e8m7", "bfloat16": "e8m7",
    "fp16": "e5m10", "float16": "e5m10", "half": "e5m10",
    "tf32": "e8m10", "tfloat32": "e8m10",
    "fp32": "e8m23", "float32": "e8m23", "float": "e8m23",
    "fp64": "e11m52", "float64": "e11m52", "double": "e11m52",
}  # fmt: skip

#: The formats that ``fpsim formats`` lists and that the tests cover by name: all formats of ml_dtypes and torch,
#: and two of IEEE P3109.
NAMED_FORMATS: tuple[str, ...] = (
    "fp64", "fp32", "tf32", "bf16", "fp16",
    "e5m2", "e5m2fnuz", "e4m3fn", "e4m3", "e4m3fnuz", "e4m3b11fnuz", "e3m4", "e8m0fnu",
    "e3m2fn", "e2m3fn", "e2m1fn", "binary8p3se", "binary8p4se",
)  # fmt: skip

_PATTERN = re.compile(r"e(?P<e>\d+)m(?P<m>\d+)(?P<suffix>fnuz|fn|finite)?")
_P3109_PATTERN = re.compile(r"binary(?P<k>\d+)p(?P<p>\d+)(?P<sign>[su])(?P<domain>[ef])")
_LIBRARY_PREFIX = re.compile(r"^(torch\.|ml_dtypes\.|jnp\.|np\.)?(float\d+_(?=e\d))?")


@lru_cache(maxsize=4096)
def _parse(name: str) -> FloatFormat:
    head, *options = name.strip().lower().split(":")
    head = _LIBRARY_PREFIX.sub("", head).removesuffix("_x2")
    head = _ALIASES.get(head, head)
    named = STANDARD_FORMATS.get(head)
    match = _PATTERN.fullmatch(head)
    p3109 = _P3109_PATTERN.fullmatch(head)
    if named is None and match is None and p3109 is None:
        known = list(dict.fromkeys([*NAMED_FORMATS, *_ALIASES]))
        near = near_names(head, known, cutoff=0.5)
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
    """The format of IEEE P3109 (draft) that has ``k`` bits in total and ``p`` bits of precision."""
    exponent_bits = k - p + (not signed)
    if k not in P3109_BITS or p < 1 or exponent_bits < 1:
        raise ValueError(
            f"IEEE P3109 formats here have 3 to 15 bits, and 1 to {'K - 1' if signed else 'K'} bits of precision"
        )
    if extended:
        return FloatFormat(exponent_bits, p - 1, specials="p3109", signed=signed)
    if signed:
        return FloatFormat(exponent_bits, p - 1, specials="fnuz")
    return FloatFormat(exponent_bits, p - 1, bias=1 << (exponent_bits - 1), specials="fn", signed=False)


def parse_format(name: str | FloatFormat) -> FloatFormat:
    """The format that ``name`` denotes; a `FloatFormat` is returned unchanged.

    The names of ml_dtypes and torch are accepted with or without their prefix: ``e4m3fn``, ``float8_e4m3fn``,
    ``torch.bfloat16``, ``fp16``, ``tf32``. So is ``eXmY`` with an optional suffix ``fn``, ``fnuz`` or ``finite``
    (`FloatFormat.specials`; no suffix means ``ieee``), followed by any of the options ``:bias=N``, ``:nosubnormals``,
    ``:unsigned``, ``:nozero``. As in ml_dtypes and OCP MX, ``e2m1fn``, ``e2m3fn`` and ``e3m2fn`` have neither infinity
    nor NaN: they are ``finite``. Names such as ``binary8p3se`` denote the formats of IEEE P3109 (draft): the width (3
    to 15 bits), the precision, ``s``igned or ``u``nsigned, ``e``xtended (with infinities) or ``f``inite.

    Raises:
        ValueError: there is no such format. The message lists similar names.
        TypeError: ``name`` is neither a string nor a `FloatFormat`.

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
