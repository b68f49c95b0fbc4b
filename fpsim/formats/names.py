"""Names of formats: the names of standards and libraries, and the pattern ``eXmY`` with options."""

from __future__ import annotations

import re
import reprlib
from dataclasses import fields
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

_NUMBER = "[0-9]{1,4}"
_PATTERN = re.compile(rf"e(?P<e>{_NUMBER})m(?P<m>{_NUMBER})(?P<suffix>fnuz|fn|finite)?")
_P3109_PATTERN = re.compile(rf"binary(?P<k>{_NUMBER})p(?P<p>{_NUMBER})(?P<sign>[su])(?P<domain>[ef])")
_LIBRARY_PREFIX = re.compile(rf"^(?:torch\.|ml_dtypes\.|jnp\.|np\.)?(?:float(?P<bits>{_NUMBER})_(?=e[0-9]))?")

#: The options that a name takes besides ``bias=N``: the field of `FloatFormat` that each sets, and its value.
_OPTIONS: dict[str, tuple[str, object]] = {
    **{specials: ("specials", specials) for specials in SPECIALS},
    "nosubnormals": ("subnormals", False),
    "unsigned": ("signed", False),
    "nozero": ("zero", False),
}


@lru_cache(maxsize=4096)
def _parse(name: str) -> FloatFormat:
    text, *options = name.strip().lower().split(":")
    prefix = _LIBRARY_PREFIX.match(text)
    assert prefix is not None, "the pattern matches an empty string"
    text = text[prefix.end() :]
    text = "e2m1fn" if text == "e2m1fn_x2" else text
    chosen = _chosen(name, options)
    try:
        stated = _stated(text)
        for field, option in zip(chosen, options, strict=True):
            if field in stated:
                raise ValueError(f"{text} has a meaning that {option!r} repeats or contradicts: leave {option!r} out")
        fmt = FloatFormat(**{**stated, **chosen})  # type: ignore[arg-type]
        if prefix["bits"] and not options and int(prefix["bits"]) != fmt.bits:
            raise ValueError(f"{text} has {fmt.bits} bits, and not the {prefix['bits']} of 'float{prefix['bits']}_'")
        return fmt
    except KeyError:
        near = near_names(text, dict.fromkeys([*NAMED_FORMATS, *_ALIASES]), cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"unknown format {name!r}: {hint}A format is one of {', '.join(NAMED_FORMATS)}, or eXmY "
            "(1 <= X <= 11 exponent bits, 0 <= Y <= 52 mantissa bits) with an optional suffix fn, fnuz or finite, "
            "or IEEE P3109's binaryKpP[su][ef] such as binary8p3se, "
            "and options :bias=N, :nosubnormals, :unsigned, :nozero"
        ) from None
    except ValueError as error:
        raise ValueError(f"no such format {name!r}: {error}") from None


def _stated(text: str) -> dict[str, object]:
    """The fields of `FloatFormat` that a name states before its options.

    Raises:
        KeyError: the name is unknown.
        ValueError: no carrier has the values of the format.
    """
    if text in STANDARD_FORMATS:
        fmt = STANDARD_FORMATS[text]
        plain = FloatFormat(fmt.exponent_bits, fmt.mantissa_bits, specials=fmt.specials)
        own = {f.name: getattr(fmt, f.name) for f in fields(fmt) if getattr(fmt, f.name) != getattr(plain, f.name)}
        return {"exponent_bits": fmt.exponent_bits, "mantissa_bits": fmt.mantissa_bits, "specials": fmt.specials, **own}
    if p3109 := _P3109_PATTERN.fullmatch(text):
        return _stated_by_p3109(int(p3109["k"]), int(p3109["p"]), p3109["sign"] == "s", p3109["domain"] == "e")
    match = _PATTERN.fullmatch(_ALIASES.get(text, text))
    if match is None:
        raise KeyError(text)
    widths: dict[str, object] = {"exponent_bits": int(match["e"]), "mantissa_bits": int(match["m"])}
    if match["suffix"] or text in _ALIASES:
        return {**widths, "specials": _SPECIALS_OF[match["suffix"] or ""]}
    return widths


def _stated_by_p3109(k: int, p: int, signed: bool, extended: bool) -> dict[str, object]:
    """The fields of the format of IEEE P3109 (draft) that has ``k`` bits in total and ``p`` bits of precision."""
    exponent_bits = k - p + (not signed)
    if k not in P3109_BITS or p < 1 or exponent_bits < 1:
        raise ValueError(
            f"IEEE P3109 formats here have 3 to 15 bits, and 1 to {'K - 1' if signed else 'K'} bits of precision"
        )
    if exponent_bits > 11:
        raise ValueError(f"no carrier has its values: it has {exponent_bits} exponent bits, and float64 has 11")
    specials = "p3109" if extended else "fnuz" if signed else "fn"
    return {
        "exponent_bits": exponent_bits,
        "mantissa_bits": p - 1,
        "bias": 1 << (exponent_bits - 1),
        "specials": specials,
        "signed": signed,
    }


def _chosen(name: str, options: list[str]) -> dict[str, object]:
    """The fields of `FloatFormat` that options set, in their order."""
    chosen: dict[str, object] = {}
    for option in options:
        if option in _OPTIONS:
            field, value = _OPTIONS[option]
        elif re.fullmatch(f"bias=-?{_NUMBER}", option):
            field, value = "bias", int(option.removeprefix("bias="))
        else:
            raise ValueError(
                f"unknown option {option!r} in format {name!r}: options are bias=N, {', '.join(SPECIALS)}, "
                "nosubnormals, unsigned, nozero"
            )
        if field in chosen:
            raise ValueError(f"format {name!r} has two options for its {field}: leave out {option!r} or the other one")
        chosen[field] = value
    return chosen


def parse_format(name: str | FloatFormat) -> FloatFormat:
    """The format that ``name`` denotes; a `FloatFormat` is returned unchanged.

    The names of ml_dtypes and torch are accepted with or without their prefix: ``e4m3fn``, ``float8_e4m3fn``,
    ``torch.bfloat16``, ``fp16``, ``tf32``. So is ``eXmY`` with an optional suffix ``fn``, ``fnuz`` or ``finite``
    (`FloatFormat.specials`; no suffix means ``ieee``), followed by any of the options ``:bias=N``, ``:nosubnormals``,
    ``:unsigned``, ``:nozero``. No option may repeat or contradict the name. As in ml_dtypes and OCP MX, ``e2m1fn``,
    ``e2m3fn`` and ``e3m2fn`` have neither infinity nor NaN: they are ``finite``. Names such as ``binary8p3se`` denote
    the formats of IEEE P3109 (draft): the width (3 to 15 bits), the precision, ``s``igned or ``u``nsigned,
    ``e``xtended (with infinities) or ``f``inite. Those with more than 11 exponent bits, such as ``binary15p2se``, are
    refused: no carrier has their values.

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
        raise TypeError(
            f"a format is a name such as 'e4m3fn' or a FloatFormat, got {reprlib.repr(name)} of {type(name)}"
        )
    return _parse(name)
