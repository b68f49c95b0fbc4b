"""The proof at scale: rounding as shipped, compared bit for bit with the exact reference.

`fpsim.reference.table` cuts the real line into intervals of inputs with the same result. In the order of their bit
patterns the inputs of a carrier are monotone (the positive ones, then the negative ones), so a table becomes a list
of *runs* of codes, and what every code must become is a run-length expansion: `Judge`. `verify` compares it with
`fpsim.round`, eager and compiled, on a sample of the inputs or on all of them. Where there is no table (wide formats,
stochastic rounding), `fpsim.reference.round` computes each result. `plan` lists what there is to verify, and
`verify_together` does many modes of a format at once, since most of the time goes into compilation.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fpsim import reference
from fpsim.formats import (
    NAMED_FORMATS,
    OVERFLOWS,
    ROUNDINGS,
    FloatFormat,
    Overflow,
    Rounding,
    full_rounding,
    parse_format,
    resolve_overflow,
    split_rounding,
)
from fpsim.functions import round as round_tensor
from fpsim.reference.tables import MAX_BITS
from fpsim.reference.values import Value, is_negative, magnitude, negate
from fpsim.rounding.carriers import CARRIERS, check_carrier
from fpsim.rounding.definitions import random_words_at as words_of
from fpsim.rounding.ops import random_key_op
from fpsim.source import proven_hash

Codes = NDArray[np.unsignedinteger]  #: bit patterns of a carrier

#: The ways to run `fpsim.round` that `verify` checks.
PATHS: tuple[str, ...] = ("eager", "compiled")
#: How many mismatches a `Verdict` shows.
MAX_EXAMPLES = 10
#: The stochastic roundings that `plan` lists by default, each with the usual overflow mode only.
STOCHASTIC_SAMPLES: tuple[str, ...] = ("stochastic:23", "stochastic:8", "stochastic_b:8", "stochastic_c:8")

#: The roundings that `plan` compiles with overflow modes that are not the format's usual one.
COMPILED_WITH_EVERY_OVERFLOW: tuple[str, ...] = ("nearest_even", "up")
#: The formats that `plan` compiles on carriers other than float32, if it has more formats than these.
COMPILED_ON_EVERY_CARRIER: tuple[str, ...] = ("e5m2", "e4m3fn", "e4m3fnuz", "e2m1fn")

# Inputs per call of `fpsim.round`: what they need stays in the cache, and torch's overhead per call is small.
_BATCH = 1 << 18
# The same for samples, which are padded to a multiple of it.
_SAMPLE_BATCH = 1 << 15
# Threads report to the main one about so many times in all: each time costs a change of threads.
_STRETCHES = 1024
# Formats of more exponent and mantissa bits are sampled without a table, whose making would take half a minute.
_TABLE_BITS_OF_SAMPLES = 15
# Where many modes are verified together: the same, for tables of milliseconds; inputs per call of `fpsim.round`, which
# are as many as the reference judges one by one; random inputs of the others.
_TABLE_BITS_OF_MANY = 10
_MANY_BATCH = 1 << 12
_MANY_SAMPLES = 1 << 15
# As many modes of a carrier besides its main ones go together: fewer would be compiled in more time, more would keep
# one process busy while others have nothing left to do.
_MANY_MODES = 16

_WIDTHS: dict[int, tuple[torch.dtype, type[np.unsignedinteger]]] = {
    16: (torch.int16, np.uint16),
    32: (torch.int32, np.uint32),
    64: (torch.int64, np.uint64),
}


def codes_of(x: torch.Tensor) -> Codes:
    """The bit patterns of a CPU tensor of floats, as unsigned integers; a view where ``x`` is contiguous."""
    integer, unsigned = _WIDTHS[x.dtype.itemsize * 8]
    return x.detach().contiguous().view(integer).numpy().view(unsigned)


def tensor_of(codes: Codes, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The floats of type ``dtype`` with these bit patterns; shares the memory of ``codes``."""
    integer = _WIDTHS[dtype.itemsize * 8][0]
    return torch.from_numpy(codes.view(str(integer).removeprefix("torch."))).view(dtype)


def code_of(value: Value, carrier: FloatFormat) -> tuple[int, bool]:
    """The bit pattern in ``carrier`` (IEEE) of the value nearest to ``value`` in the direction of zero, exactly.

    Returns:
        The code, and whether it stands for ``value`` itself. (NaN has the carrier's canonical code.)
    """
    if value is reference.NAN:
        return carrier.nan_code, True  # type: ignore[return-value]  # IEEE carriers have a NaN
    sign = carrier.sign_code if is_negative(value) else 0
    if value in (reference.INFINITY, reference.NEGATIVE_INFINITY):
        return sign | (carrier.max_code + 1), True
    exact = magnitude(value)
    if exact == 0:
        return sign, True
    numerator, denominator = exact.numerator, exact.denominator
    exponent = numerator.bit_length() - denominator.bit_length()  # of the leading bit, or one more
    exponent -= numerator << max(-exponent, 0) < denominator << max(exponent, 0)
    exponent = max(exponent, carrier.emin)
    shift = carrier.mantissa_bits - exponent
    significand, rest = divmod(numerator << max(shift, 0), denominator << max(-shift, 0))
    code = ((exponent - carrier.emin) << carrier.mantissa_bits) + significand
    if code > carrier.max_code:
        return sign | carrier.max_code, False
    return sign | code, rest == 0


def _code_of_result(value: Value, carrier: FloatFormat) -> int:
    code, exact = code_of(value, carrier)
    assert exact, f"{value} is no value of the carrier"
    return code


@dataclass(frozen=True, eq=False)
class Judge:
    """What every bit pattern of a carrier must become: the reference's table as runs of codes.

    Attributes:
        format, rounding, overflow: what is rounded to, and how; ``overflow`` is the mode in force, never None.
        dtype: the carrier.
        starts: the first code of each run, increasing from 0, as unsigned integers of the carrier's width.
        results: the code that each run becomes; NaN stands as the carrier's canonical NaN.
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
        """The codes that ``codes`` must become.

        Args:
            codes: bit patterns of the carrier, any shape, as integers of its width (signed or unsigned).

        Returns:
            An array of unsigned integers of the carrier's width, of the shape of ``codes``.
        """
        codes = np.asarray(codes).view(self.starts.dtype)
        return self.results[np.searchsorted(self.starts, codes, side="right") - 1]

    def expand(self, first: int, out: Codes) -> list[tuple[int, int]]:
        """Write into ``out`` what the codes ``first``, ``first + 1``, ... must become: a slice of the expansion.

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
        nan = _code_of_result(reference.NAN, carrier)
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
    runs: dict[int, int] = {}  # in the order of codes; a run that is empty is replaced by the next one
    for sign, half in ((0, positive), (carrier.sign_code, mirrored)):
        for lower, closed, result in half:
            code, exact = code_of(lower, carrier)
            start = code if exact and closed else code + 1
            runs[sign + start] = _code_of_result(result, carrier)
        runs[sign + carrier.max_code + 2] = _code_of_result(table.nan, carrier)  # replaces one that is open at infinity
    unsigned = _WIDTHS[carrier.bits][1]
    starts, results = np.array(list(runs), unsigned), np.array(list(runs.values()), unsigned)
    different = np.append(True, results[1:] != results[:-1])
    return Judge(fmt, table.rounding, table.overflow, dtype, starts[different], results[different])


def differences(got: Codes, want: Codes, carrier: FloatFormat) -> NDArray[np.intp]:
    """The positions where two flat arrays of codes differ: bit for bit, except that all NaNs are alike.

    >>> nan, other_nan, zero, negative_zero = np.array([0x7FC00000, 0xFFFFFFFF, 0, 1 << 31], np.uint32)
    >>> differences(np.array([nan, zero]), np.array([other_nan, negative_zero]), CARRIERS[torch.float32])
    array([1])
    """
    positions = np.flatnonzero(got != want)
    return positions[~(_is_nan(got[positions], carrier) & _is_nan(want[positions], carrier))]


def _is_nan(codes: Codes, carrier: FloatFormat) -> NDArray[np.bool_]:
    return (codes & codes.dtype.type(carrier.sign_code - 1)) > carrier.max_code + 1


# -- what to verify --------------------------------------------------------------------------------------------


class Mode(NamedTuple):
    """One way to round, in full: what a `Verdict` is about.

    Attributes:
        format: what to round to.
        rounding: a direction, or a stochastic rounding with its number of random bits.
        overflow: the mode in force, never None.
    """

    format: FloatFormat
    rounding: str
    overflow: Overflow

    def __str__(self) -> str:
        return f"{self.format.name} {self.rounding} {self.overflow}"


def mode_of(format: str | FloatFormat, rounding: str = "nearest_even", overflow: str | None = None) -> Mode:
    """The `Mode` that arguments of `fpsim.round` mean.

    Raises:
        ValueError: an unknown format, rounding or overflow mode, or one that the format does not take.

    >>> str(mode_of("e5m2", "stochastic"))
    'e5m2 stochastic:23 ovf_inf'
    """
    fmt = parse_format(format)
    return Mode(fmt, full_rounding(rounding), resolve_overflow(fmt, overflow))


class Group(NamedTuple):
    """Modes of one carrier that are verified together: compiled as one function, and given the same inputs.

    Attributes:
        modes: one or more.
        dtype: the carrier.
        paths: which of `PATHS`: ``eager`` calls, ``compiled`` code as in training (it needs a C++ compiler), or both.
    """

    modes: tuple[Mode, ...]
    dtype: torch.dtype
    paths: tuple[str, ...] = PATHS

    def __str__(self) -> str:
        names = " ".join(dict.fromkeys(mode.format.name for mode in self.modes))
        return f"{names} on {_name_of(self.dtype)}"


def plan(
    formats: Iterable[str | FloatFormat] = NAMED_FORMATS,
    *,
    roundings: Sequence[str] | None = None,
    overflows: Sequence[str] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    paths: Sequence[str] = PATHS,
) -> tuple[Group, ...]:
    """What ``fpsim verify --all`` verifies.

    On float32 (float64 for formats that float32 cannot carry): every rounding direction with every overflow mode that
    the format takes, and `STOCHASTIC_SAMPLES` with the usual overflow mode. All are called eagerly. Compiled, since a
    mode takes a fifth of a second to compile, are those with the usual overflow mode, and of the other overflow modes
    those of `COMPILED_WITH_EVERY_OVERFLOW`; if ``roundings`` or ``overflows`` are given, all of them.

    On the other carriers: every format that is narrower than the carrier, to nearest-even and by ``stochastic:8``,
    with the usual overflow mode. If they are more than a few, only `COMPILED_ON_EVERY_CARRIER` are compiled.

    Args:
        formats: names or `FloatFormat` instances.
        roundings, overflows: these alone, on every carrier, with one another.
        dtypes: these carriers alone.
        paths: which of `PATHS`.

    Raises:
        ValueError: an unknown format, mode or path, or nothing is left to verify.

    >>> [(len(group.modes), group.paths) for group in plan(["e4m3fn"], dtypes=[torch.float32])]
    [(14, ('eager', 'compiled')), (8, ('eager',))]
    """
    fmts = list(dict.fromkeys(parse_format(name) for name in formats))
    for overflow in overflows or ():
        if overflow not in OVERFLOWS:
            raise ValueError(f"unknown overflow mode {overflow!r}: use one of {', '.join(OVERFLOWS)}")
    wanted = tuple(dict.fromkeys(full_rounding(rounding) for rounding in roundings)) if roundings else None
    main = {fmt: torch.float32 if fmt.is_subset_of(CARRIERS[torch.float32]) else torch.float64 for fmt in fmts}
    paths, groups = _check_paths(paths), []
    for fmt, dtype in main.items():
        modes = _modes(fmt, wanted, overflows)
        eager_only = [] if wanted or overflows or "eager" not in paths else [m for m in modes if not _is_compiled(m)]
        if "compiled" not in paths:
            eager_only = []
        groups.append(Group(tuple(mode for mode in modes if mode not in eager_only), dtype, paths))
        groups.append(Group(tuple(eager_only), dtype, ("eager",)))
    for dtype, carrier in CARRIERS.items():
        others = [fmt for fmt in fmts if dtype != main[fmt] and fmt != carrier and fmt.is_subset_of(carrier)]
        few = wanted or ("nearest_even", "stochastic:8")
        many = len(others) > len(COMPILED_ON_EVERY_CARRIER) and "eager" in paths
        for compiled in (True, False):
            fmts_of_path = [fmt for fmt in others if compiled is (not many or fmt.name in COMPILED_ON_EVERY_CARRIER)]
            rest = [mode for fmt in fmts_of_path for mode in _modes(fmt, few, overflows or _usual(fmt))]
            groups += [
                Group(tuple(rest[i : i + _MANY_MODES]), dtype, paths if compiled else ("eager",))
                for i in range(0, len(rest), _MANY_MODES)
            ]
    groups = [group for group in groups if group.modes and (dtypes is None or group.dtype in dtypes)]
    if not groups:
        raise ValueError(
            f"nothing to verify: none of {', '.join(fmt.name for fmt in fmts) or 'no formats'} takes these overflow "
            "modes and fits into these carriers"
        )
    return tuple(groups)


def _modes(fmt: FloatFormat, roundings: Sequence[str] | None, overflows: Sequence[str] | None) -> tuple[Mode, ...]:
    """All combinations that ``fmt`` takes; None: all directions, stochastic ones with the usual overflow mode only."""
    taken = [mode for mode in overflows or OVERFLOWS if mode == "sat_finite" or fmt.has_infinity or fmt.has_nan]
    if roundings is not None:
        return tuple(mode_of(fmt, rounding, overflow) for overflow in taken for rounding in roundings)
    usual = [mode for mode in taken if mode in (overflows or _usual(fmt))]
    return _modes(fmt, ROUNDINGS, taken) + _modes(fmt, STOCHASTIC_SAMPLES, usual) if taken else ()


def _is_compiled(mode: Mode) -> bool:
    return mode.overflow in _usual(mode.format) or mode.rounding in COMPILED_WITH_EVERY_OVERFLOW


def _check_paths(paths: Sequence[str]) -> tuple[str, ...]:
    unknown = [path for path in paths if path not in PATHS]
    if unknown or not paths:
        raise ValueError(f"unknown path {unknown[0]!r}: use {' or '.join(PATHS)}" if unknown else "no path to verify")
    return tuple(dict.fromkeys(paths))


def _usual(fmt: FloatFormat) -> tuple[str, ...]:
    return (resolve_overflow(fmt, None),)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- the proof -------------------------------------------------------------------------------------------------


class CompilationError(RuntimeError):
    """``torch.compile`` does not work on this machine."""


class Mismatch(NamedTuple):
    """An input whose output is wrong, as hexadecimal codes of the carrier.

    Attributes:
        path: which of `PATHS` it was.
        input, got, want: the input, what came out, and what the reference says (NaN as the canonical NaN).
        random: of stochastic rounding, the random number, in hexadecimal; else empty.
    """

    path: str
    input: str
    got: str
    want: str
    random: str = ""

    def __str__(self) -> str:
        return f"{self.input} became {self.got}, not {self.want} ({self.path})"


@dataclass(frozen=True)
class Verdict:
    """The outcome of `verify`.

    Attributes:
        format, rounding, overflow: what was rounded to, and how; ``overflow`` is the mode in force, never None.
        carrier: the dtype of the inputs, such as ``"float32"``.
        device: where they were rounded.
        paths: which of `PATHS` were compared with the reference.
        exhaustive: whether the inputs were all that there are.
        inputs: how many inputs were checked, each on every path.
        mismatches: how many outputs were wrong, over all paths.
        examples: the first of them, at most `MAX_EXAMPLES`.
        seconds: wall-clock time, compilation and the reference's results included. Modes that were verified together
            share it equally.
        cpu_seconds: processor time of all threads in the same span.
    """

    format: str
    rounding: str
    overflow: str
    carrier: str
    device: str
    paths: tuple[str, ...]
    exhaustive: bool
    inputs: int
    mismatches: int
    examples: tuple[Mismatch, ...]
    seconds: float
    cpu_seconds: float

    @property
    def ok(self) -> bool:
        """Whether every output was right."""
        return self.mismatches == 0

    def __str__(self) -> str:
        extent = "all" if self.exhaustive else "sampled"
        outcome = "no mismatch" if self.ok else f"{self.mismatches:,} MISMATCHES"
        return (
            f"{self.format} {self.rounding} {self.overflow}: {outcome} in {self.inputs:,} inputs "
            f"({extent} {self.carrier}, {' and '.join(self.paths)}), {self.seconds:.1f} s"
        )

    def describe(self, mismatch: Mismatch) -> str:
        """One of `examples` in a line that says all: the bits and numbers of input, output and right result, the mode.

        A line reads ``input 0x4200 = 3.0 became 0x4400 = 4.0, not 0x4200 = 3.0: e5m2 nearest_even ovf_inf, float16
        eager``, after the input of stochastic rounding also ``with random number 0x1f``.
        """
        sides = (f"{code} = {self._number(code)!r}" for code in (mismatch.input, mismatch.got, mismatch.want))
        source, got, want = sides
        drawn = f" with random number {mismatch.random}" if mismatch.random else ""
        mode = f"{self.format} {self.rounding} {self.overflow}, {self.carrier} {mismatch.path}"
        return f"input {source}{drawn} became {got}, not {want}: {mode}"

    def record(self) -> dict[str, Any]:
        """The verdict for machines: JSON values only.

        The attributes by their names; each example as its path and, for input, got and want, the ``bits`` in binary,
        ``hex`` (of the bits) and ``decimal`` (the number: text, which may be nan or inf), and for stochastic rounding
        ``random``. Besides, the versions of torch and fpsim, and ``source``: `fpsim.source.proven_hash`, a hash of the
        source that decides the bits.
        """
        examples = [
            {"path": example.path}
            | {side: self._datum(getattr(example, side)) for side in ("input", "got", "want")}
            | ({"random": example.random} if example.random else {})
            for example in self.examples
        ]
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "examples"}
        versions = {"torch": torch.__version__, "fpsim": metadata.version("fpsim"), "source": proven_hash()}
        return facts | {"paths": list(self.paths), "ok": self.ok, "examples": examples} | versions

    def _datum(self, code: str) -> dict[str, str]:
        digits = 4 * (len(code) - 2)
        return {"bits": f"{int(code, 16):0{digits}b}", "hex": code, "decimal": repr(self._number(code))}

    def _number(self, code: str) -> float:
        dtype = next(dtype for dtype in CARRIERS if _name_of(dtype) == self.carrier)
        unsigned = _WIDTHS[dtype.itemsize * 8][1]
        return tensor_of(np.array([int(code, 16)], unsigned), dtype).item()


def verify(
    format: str | FloatFormat,
    *,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    exhaustive: bool = False,
    samples: int | None = None,
    seed: int = 0,
    paths: Sequence[str] = PATHS,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Verdict:
    """Compare `fpsim.round` with the exact reference, bit for bit (all NaNs count as equal).

    Inputs are either all bit patterns of ``dtype``, or a sample: every value of the format, every boundary between
    two results, infinities, zeros and NaNs, each with its two neighbours on either side, and random bit patterns,
    half of them of the format's magnitude. Formats too wide for `fpsim.reference.table` are sampled on a grid of
    significands in every binade instead. Stochastic rounding is compared with `fpsim.reference.round` for the random
    numbers that `fpsim.round` draws: the topmost bits of the elements' words.
    On the CPU, as many threads work side by side as torch has; torch's own setting is 1 meanwhile.

    Args:
        format: a name or a `FloatFormat`.
        rounding, overflow: as in `fpsim.round`.
        exhaustive: whether to check all inputs of ``dtype``.
        samples: how many random inputs a sample has, at least; None means 4 million, or where there is no table
            and `fpsim.reference.round` computes each result, 65536.
        seed: of the random inputs, and of stochastic rounding.
        paths: which of `PATHS`: ``eager`` calls, ``compiled`` code as in training (it needs a C++ compiler), or both.
        dtype: of the inputs: float64, float32, bfloat16 or float16.
        device: a torch device, where the inputs are rounded.
        progress: called with how many inputs are done, and of how many, now and then.

    Raises:
        ValueError: an unknown format, mode, path or device, a format that ``dtype`` cannot carry, or an exhaustive
            check of a format too wide for a table, of stochastic rounding, or of float64 inputs.
        TypeError: ``dtype`` is not a carrier.
        CompilationError: ``torch.compile`` does not work here.

    >>> verify("e4m3fn", samples=1000, paths=["eager"]).mismatches
    0
    """
    group = Group((mode_of(format, rounding, overflow),), dtype, _check_paths(paths))
    start = _now()
    check_carrier(dtype, group.modes[0].format)
    ways = _rounding_functions(group)
    _check_device(device)
    questions = _all_inputs(group) if exhaustive else _sample(group, samples, seed, _TABLE_BITS_OF_SAMPLES)
    [verdict] = _ask(group, questions, ways, device, exhaustive, start, progress)
    return verdict


def verify_together(
    group: Group,
    *,
    samples: int = _MANY_SAMPLES,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Verdict, ...]:
    """`verify` many modes of one carrier on one sample of inputs, compiled as one function.

    The modes that `fpsim.reference.round` judges one by one (those of formats too wide for a quick table, and
    stochastic ones) get the first 4096 inputs: chosen and random ones, half and half.

    Args:
        group: from `plan`, or `Group` of modes from `mode_of`.
        samples: how many random inputs a sample has, at least.
        seed, device, progress: as in `verify`.

    Raises:
        ValueError, TypeError, CompilationError: as `verify`.

    >>> verdicts = verify_together(Group((mode_of("e4m3fn"), mode_of("e5m2", "up")), torch.float32, ("eager",)))
    >>> [(verdict.format, verdict.mismatches) for verdict in verdicts]
    [('e4m3fn', 0), ('e5m2', 0)]
    """
    start = _now()
    for mode in group.modes:
        check_carrier(group.dtype, mode.format)
    ways = _rounding_functions(group)
    _check_device(device)
    questions = _sample(group, samples, seed, _TABLE_BITS_OF_MANY, _MANY_BATCH)
    return _ask(group, questions, ways, device, False, start, progress)


def verify_groups(
    groups: Sequence[Group],
    *,
    jobs: int = 1,
    samples: int = _MANY_SAMPLES,
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[tuple[Verdict, ...]]:
    """`verify_together` for each group, in order, in as many processes side by side.

    Args:
        groups: from `plan`.
        jobs: how many processes; 1 means this one. Others start anew (the main module is imported there: guard it by
            ``if __name__ == "__main__"``), and each computes in one thread.
        samples, seed, device: as in `verify_together`.

    Raises:
        ValueError: ``jobs`` is not positive, or as `verify_together`.
        TypeError, CompilationError: as `verify_together`.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: use 1 process or more")
    _check_device(device)
    check = partial(verify_together, samples=samples, seed=seed, device=device)
    if jobs == 1 or len(groups) == 1:
        yield from map(check, groups)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(groups)), context, _use_one_thread)
    try:
        yield from pool.map(check, groups)
    finally:
        pool.shutdown(cancel_futures=True)


def _use_one_thread() -> None:
    """In a process beside others: compute in one thread, and compile without further processes."""
    import torch._inductor.config

    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _check_device(device: str) -> None:
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here: use "
            "device='cpu' (on the command line --device cpu), or a CUDA build of torch on a machine with a GPU"
        )


def _ask(
    group: Group,
    questions: _Questions,
    ways: dict[str, _Way],
    device: str,
    exhaustive: bool,
    start: tuple[float, float],
    progress: Callable[[int, int], None] | None,
) -> tuple[Verdict, ...]:
    """Put the questions to every way of rounding, and give a verdict for every mode."""
    mismatches = [0] * len(group.modes)
    examples: list[list[_Found]] = [[] for _ in group.modes]
    with _one_thread_per_operation() as workers:
        if "compiled" in ways:
            _compile(ways["compiled"], questions, group.dtype, device)
        for answers in _in_batches(questions, ways, group.dtype, device, workers, progress):
            for number, (count, found) in enumerate(answers):
                mismatches[number] += count
                examples[number] += found[: MAX_EXAMPLES - len(examples[number])]
    seconds, cpu_seconds = ((b - a) / len(group.modes) for a, b in zip(start, _now(), strict=True))
    digits = CARRIERS[group.dtype].bits // 4 + 2
    return tuple(
        Verdict(
            format=mode.format.name,
            rounding=mode.rounding,
            overflow=mode.overflow,
            carrier=_name_of(group.dtype),
            device=device,
            paths=tuple(ways),
            exhaustive=exhaustive,
            inputs=total,
            mismatches=mismatches[number],
            examples=tuple(
                Mismatch(
                    path,
                    *_hexadecimal(codes, digits),
                    _random_number(questions.seed, position, questions.batch, number, mode.rounding),
                )
                for path, position, *codes in examples[number]
            ),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )
        for number, (mode, total) in enumerate(zip(group.modes, questions.totals, strict=True))
    )


def _hexadecimal(codes: Sequence[int], digits: int) -> tuple[str, str, str]:
    source, got, want = (f"{code:#0{digits}x}" for code in codes)
    return source, got, want


_Way = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]  # of inputs and a seed: a result per mode
_Found = tuple[str, int, int, int, int]  # path, position among the inputs, input, got, want


class _Questions(NamedTuple):
    """Inputs and the outputs that they must have, in batches.

    Attributes:
        totals: for every mode how many inputs there are, from the first on; multiples of ``batch``.
        batch: how many inputs a batch has.
        seed: of stochastic rounding, to which the number of a batch's first input is added.
        fill: called with the number of the first input, an array, and one array per mode, it writes a batch of inputs
            into the former and the expected outputs into the latter, and returns for every mode ranges of positions
            with NaN (others may have it too). What it writes beyond a mode's total has no meaning.
    """

    totals: tuple[int, ...]
    batch: int
    seed: int
    fill: Callable[[int, Codes, Sequence[Codes]], list[list[tuple[int, int]]]]

    @property
    def total(self) -> int:
        return max(self.totals)


def _all_inputs(group: Group) -> _Questions:
    carrier = CARRIERS[group.dtype]
    if carrier.bits > 32:
        raise ValueError(
            f"{group.dtype} has 2**{carrier.bits} bit patterns, too many to check them all: use dtype=torch.float32, "
            "or a sample (exhaustive=False)"
        )
    for mode in group.modes:
        if split_rounding(mode.rounding)[1]:
            raise ValueError(
                f"rounding={mode.rounding!r} has no table to expand, its results depend on random numbers: use a "
                "sample (exhaustive=False), which asks fpsim.reference.round directly"
            )
        if not _has_table(mode, MAX_BITS):
            raise ValueError(
                f"{mode.format.name} has too many values to expand its table (at most {MAX_BITS} exponent and "
                "mantissa bits): use a sample (exhaustive=False), which asks fpsim.reference.round directly"
            )
    judges = [judge(*mode, group.dtype) for mode in group.modes]
    batch = min(_BATCH, 1 << carrier.bits)
    offsets = np.arange(batch, dtype=judges[0].starts.dtype)

    def fill(first: int, codes: Codes, wants: Sequence[Codes]) -> list[list[tuple[int, int]]]:
        np.add(offsets, offsets.dtype.type(first), out=codes)
        return [judged.expand(first, want) for judged, want in zip(judges, wants, strict=True)]

    return _Questions((1 << carrier.bits,) * len(group.modes), batch, 0, fill)


def _sample(group: Group, samples: int | None, seed: int, table_bits: int, head: int | None = None) -> _Questions:
    """A sample of inputs, and what they must become; ``head``: how many of them the reference judges one by one."""
    tabular = [_has_table(mode, table_bits) for mode in group.modes]
    if samples is None:
        samples = 1 << 22 if all(tabular) else 1 << 16
    rng = np.random.default_rng(seed)
    chosen = np.unique(np.concatenate([_chosen(mode, group.dtype, table_bits, head, rng) for mode in group.modes]))
    if head is not None:
        rng.shuffle(chosen)
    batch = head or min(_SAMPLE_BATCH, 1 << (len(chosen) + samples - 1).bit_length())
    samples += -(len(chosen) + samples) % batch
    random = _random_codes([mode.format for mode in group.modes], group.dtype, samples, rng)
    first = min(len(chosen), len(chosen) if head is None else head // 2)
    inputs = np.concatenate([chosen[:first], random, chosen[first:]])
    asked = len(inputs) if head is None else min(head, len(inputs))
    outputs = [
        judge(*mode, group.dtype).expected(inputs)
        if has_table
        else _by_reference(mode, number, inputs[:asked], group.dtype, batch, seed)
        for number, (mode, has_table) in enumerate(zip(group.modes, tabular, strict=True))
    ]

    def fill(first: int, codes: Codes, wants: Sequence[Codes]) -> list[list[tuple[int, int]]]:
        codes[:] = inputs[first : first + batch]
        for output, want in zip(outputs, wants, strict=True):
            if first < len(output):
                want[:] = output[first : first + batch]
        return [[] for _ in outputs]

    return _Questions(tuple(map(len, outputs)), batch, seed, fill)


def _has_table(mode: Mode, most_bits: int) -> bool:
    return mode.rounding in ROUNDINGS and mode.format.exponent_bits + mode.format.mantissa_bits <= most_bits


def _chosen(mode: Mode, dtype: torch.dtype, table_bits: int, most: int | None, rng: np.random.Generator) -> Codes:
    """The inputs where an error is likeliest; of a grid, at most so many."""
    deterministic = mode if mode.rounding in ROUNDINGS else mode._replace(rounding="nearest_even")
    if _has_table(deterministic, table_bits):
        return judge(*deterministic, dtype).probes()
    grid = significand_grid(mode.format, CARRIERS[dtype])
    return grid if most is None else rng.choice(grid, min(most, len(grid)), replace=False)


def _random_codes(formats: Sequence[FloatFormat], dtype: torch.dtype, count: int, rng: np.random.Generator) -> Codes:
    """Random bit patterns: half of them anything, half of the magnitudes of the formats, and a little beyond."""
    carrier, unsigned = CARRIERS[dtype], _WIDTHS[dtype.itemsize * 8][1]
    codes = rng.integers(0, 1 << carrier.bits, count, dtype=unsigned, endpoint=False)
    near = codes[::2]  # a view
    low = max(min(fmt.emin - fmt.mantissa_bits for fmt in formats) - 3 + carrier.bias, 0)
    high = min(max(fmt.max_exponent for fmt in formats) + 3 + carrier.bias, (1 << carrier.exponent_bits) - 1)
    fields = rng.integers(low, high, len(near), dtype=unsigned, endpoint=True) << unsigned(carrier.mantissa_bits)
    near &= unsigned(carrier.sign_code | ((1 << carrier.mantissa_bits) - 1))
    near |= fields
    return codes


def _by_reference(mode: Mode, number: int, inputs: Codes, dtype: torch.dtype, batch: int, seed: int) -> Codes:
    """What `fpsim.reference.round` says of each input, and in stochastic rounding of the random number it meets."""
    carrier, unsigned = CARRIERS[dtype], _WIDTHS[dtype.itemsize * 8][1]
    values = tensor_of(inputs, dtype).double().tolist()
    bits = split_rounding(mode.rounding)[1]
    draws: list[int] | list[None] = [None] * len(values)
    if bits:
        starts = range(0, len(values), batch)
        draws = np.concatenate([random_numbers(seed + start, batch, bits, salt=number) for start in starts]).tolist()
    exact = (reference.round(value, *mode, random=draw) for value, draw in zip(values, draws, strict=True))
    return np.array([_code_of_result(value, carrier) for value in exact], unsigned)


def random_numbers(seed: int, count: int, bits: int, salt: int = 0) -> NDArray[np.int64]:
    """The random numbers that stochastic rounding with ``bits`` random bits draws for elements 0 to ``count - 1``.

    They are the topmost bits of the elements' words: what `fpsim.reference.round` takes as ``random``.

    >>> rounded = round_tensor(torch.full((1000,), 1.25), "e2m1fn", rounding="stochastic:1", seed=0)
    >>> np.array_equal(rounded == 1.5, random_numbers(0, 1000, 1) == 1)
    True
    """
    words = words_of(random_key_op(torch.tensor(seed), salt), 0, count).numpy().view(np.uint32)
    return words.astype(np.int64) >> (32 - bits)


def _random_number(seed: int, position: int, batch: int, salt: int, rounding: str) -> str:
    """What stochastic rounding drew for the input at this position, in hexadecimal; empty for other roundings."""
    bits = split_rounding(rounding)[1]
    start = position - position % batch
    return hex(random_numbers(seed + start, batch, bits, salt)[position - start]) if bits else ""


def significand_grid(fmt: FloatFormat, carrier: FloatFormat) -> Codes:
    """Codes of ``carrier`` in every binade, both signs, of few significands: ties of ``fmt`` and neighbours among them.

    In the manner of Berkeley TestFloat, both the bits that ``fmt`` keeps and those that it drops take a few patterns:
    near zero, near one half, near one.
    """
    dropped = carrier.mantissa_bits - fmt.mantissa_bits
    kept = {code & ((1 << fmt.mantissa_bits) - 1) for code in (0, 1, 2, 1 << fmt.mantissa_bits >> 1, -2, -1)}
    half = 1 << dropped >> 1
    rest = {code & ((1 << dropped) - 1) for code in (0, 1, half - 1, half, half + 1, -1)}
    significands = [(k << dropped) | r for k in sorted(kept) for r in sorted(rest)]
    fields = range(1 << (1 + carrier.exponent_bits))  # with the sign
    codes = [(field << carrier.mantissa_bits) | significand for field in fields for significand in significands]
    return np.array(codes, _WIDTHS[carrier.bits][1])


def _rounding_functions(group: Group) -> dict[str, _Way]:
    calls = [(*mode, split_rounding(mode.rounding)[1] > 0) for mode in group.modes]

    def rounded(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = []
        for salt, (fmt, rounding, overflow, stochastic) in enumerate(calls):
            draw: dict[str, Any] = {"seed": seed, "salt": salt} if stochastic else {}
            results.append(round_tensor(x, fmt, rounding=rounding, overflow=overflow, **draw))
        return tuple(results)

    # torch.compile keeps what it compiled, a limited number per code object: every combination gets its own.
    rounded.__code__ = rounded.__code__.replace(co_name=f"round_{hash(group):x}")
    every: dict[str, _Way] = {"eager": rounded, "compiled": torch.compile(rounded, fullgraph=True, dynamic=False)}
    return {path: every[path] for path in _check_paths(group.paths)}


def _compile(function: _Way, questions: _Questions, dtype: torch.dtype, device: str) -> None:
    """Let ``function`` compile itself, for tensors as long as a batch."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    try:
        function(torch.zeros(questions.batch, dtype=dtype, device=device), torch.tensor(0, device=device))
    except (BackendCompilerFailed, InductorError) as error:
        raise CompilationError(
            f"torch.compile does not work here ({str(error).strip().splitlines()[0]}): install a C++ compiler, "
            "or verify the eager path alone (paths=['eager'], on the command line --path eager)"
        ) from error


@contextmanager
def _one_thread_per_operation() -> Iterator[int]:
    """Have torch run every operation in one thread; gives the number of threads it had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _in_batches(
    questions: _Questions,
    ways: dict[str, _Way],
    dtype: torch.dtype,
    device: str,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[list[tuple[int, list[_Found]]]]:
    """For every stretch of inputs in order, and every mode: how many outputs are wrong, and the first of them."""
    carrier, unsigned, local = CARRIERS[dtype], _WIDTHS[dtype.itemsize * 8][1], threading.local()
    modes, batch = len(questions.totals), questions.batch
    stretch = batch * max(1, questions.total // batch // _STRETCHES)

    def check_stretch(start: int) -> list[tuple[int, list[_Found]]]:
        if not hasattr(local, "codes"):
            local.codes, *local.wants = np.empty((1 + modes, batch), unsigned)
        counts = [0] * modes
        found: list[list[_Found]] = [[] for _ in range(modes)]
        for first in range(start, min(start + stretch, questions.total), batch):
            nans = questions.fill(first, local.codes, local.wants)
            x = tensor_of(local.codes, dtype).to(device)
            seed = torch.tensor(questions.seed + first, device=device)
            for path, function in ways.items():
                for number, result in enumerate(function(x, seed)):
                    if first >= questions.totals[number]:
                        continue
                    got, want = codes_of(result.cpu()), local.wants[number]
                    wrong = _wrong(got, want, nans[number], carrier)
                    counts[number] += len(wrong)
                    found[number] += [
                        (path, first + int(i), int(local.codes[i]), int(got[i]), int(want[i]))
                        for i in wrong[:MAX_EXAMPLES]
                    ]
        return [(count, each[:MAX_EXAMPLES]) for count, each in zip(counts, found, strict=True)]

    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        starts = range(0, questions.total, stretch)
        for start, result in zip(starts, pool.map(check_stretch, starts), strict=True):
            if progress is not None:
                progress(min(start + stretch, questions.total), questions.total)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _wrong(got: Codes, want: Codes, nans: list[tuple[int, int]], carrier: FloatFormat) -> NDArray[np.intp]:
    """`differences`, fast where there are none; overwrites NaNs in ``want`` by the NaNs got instead."""
    for start, end in nans:
        if _is_nan(got[start:end], carrier).all():
            want[start:end] = got[start:end]
    return np.empty(0, np.intp) if np.array_equal(got, want) else differences(got, want, carrier)
