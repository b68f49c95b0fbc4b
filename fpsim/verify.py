"""The proof at scale: rounding as shipped, compared bit for bit with the exact reference.

`fpsim.reference.table` cuts the real line into intervals of inputs with the same result. In the order of their bit
patterns the inputs of a carrier are monotone (the positive ones, then the negative ones), so a table becomes a list
of *runs* of codes, and what every code must become is a run-length expansion: `Judge`. `verify` compares it with
`fpsim.round`, eager and compiled, on a sample of the inputs or on all of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fpsim import reference
from fpsim.formats import FloatFormat, Overflow, Rounding, check_rounding, parse_format, resolve_overflow
from fpsim.reference.tables import MAX_BITS
from fpsim.reference.values import Value, is_negative, magnitude, negate
from fpsim.rounding import round as round_tensor
from fpsim.rounding_op import CARRIERS, check_carrier

Codes = NDArray[np.unsignedinteger]  #: bit patterns of a carrier

#: The ways to run `fpsim.round` that `verify` checks.
PATHS: tuple[str, ...] = ("eager", "compiled")
#: How many mismatches a `Verdict` shows.
MAX_EXAMPLES = 10

# Inputs per call of `fpsim.round`: what they need stays in the cache, and torch's overhead per call is small.
_BATCH = 1 << 18
# The same for samples, which are padded to a multiple of it.
_SAMPLE_BATCH = 1 << 15
# Threads report to the main one about so many times in all: each time costs a change of threads.
_STRETCHES = 1024
# Formats of more exponent and mantissa bits are sampled without a table, whose making would take half a minute.
_TABLE_BITS_OF_SAMPLES = 15

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


# -- the proof -------------------------------------------------------------------------------------------------


class CompilationError(RuntimeError):
    """``torch.compile`` does not work on this machine."""


class Mismatch(NamedTuple):
    """An input whose output is wrong, as hexadecimal codes of the carrier.

    Attributes:
        path: which of `PATHS` it was.
        input, got, want: the input, what came out, and what the reference says (NaN as the canonical NaN).
    """

    path: str
    input: str
    got: str
    want: str

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
        seconds: wall-clock time, compilation and the reference's table included.
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
    two results, infinities, zeros and NaNs, each with its two neighbours on either side, and random bit patterns.
    Formats too wide for `fpsim.reference.table` are sampled on a grid of significands in every binade instead.
    On the CPU, as many threads work side by side as torch has; torch's own setting is 1 meanwhile.

    Args:
        format: a name or a `FloatFormat`.
        rounding, overflow: as in `fpsim.round`.
        exhaustive: whether to check all inputs of ``dtype``.
        samples: how many random inputs a sample has, at least; None means 4 million, or where there is no table
            and `fpsim.reference.round` computes each result, 65536.
        seed: of the random inputs.
        paths: which of `PATHS`: ``eager`` calls, ``compiled`` code as in training (it needs a C++ compiler), or both.
        dtype: of the inputs: float64, float32, bfloat16 or float16.
        device: a torch device, where the inputs are rounded.
        progress: called with how many inputs are done, and of how many, now and then.

    Raises:
        ValueError: an unknown format, mode or path, a format that ``dtype`` cannot carry, or an exhaustive check of
            a format too wide for a table, or of float64 inputs.
        TypeError: ``dtype`` is not a carrier.
        CompilationError: ``torch.compile`` does not work here.

    >>> verify("e4m3fn", samples=1000, paths=["eager"]).mismatches
    0
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    fmt = parse_format(format)
    mode = resolve_overflow(fmt, overflow)
    carrier = check_carrier(dtype, fmt)
    ways = _rounding_functions(fmt, check_rounding(rounding), mode, paths)
    if exhaustive:
        questions: _Questions = _all_inputs(fmt, rounding, mode, dtype)
    else:
        questions = _sample(fmt, rounding, mode, dtype, samples, seed)
    with _one_thread_per_operation() as workers:
        if "compiled" in ways:
            _compile(ways["compiled"], questions, dtype, device)
        mismatches = 0
        examples: list[_Found] = []
        for count, found in _in_batches(questions, ways, dtype, device, workers, progress):
            mismatches += count
            examples += found[: MAX_EXAMPLES - len(examples)]
    return Verdict(
        format=fmt.name,
        rounding=rounding,
        overflow=mode,
        carrier=str(dtype).removeprefix("torch."),
        device=device,
        paths=tuple(ways),
        exhaustive=exhaustive,
        inputs=questions.total,
        mismatches=mismatches,
        examples=tuple(Mismatch(path, *(f"{code:#0{carrier.bits // 4 + 2}x}" for code in e)) for path, *e in examples),
        seconds=time.perf_counter() - start,
        cpu_seconds=time.process_time() - cpu_start,
    )


_Found = tuple[str, int, int, int]  # path, input, got, want


class _Questions(NamedTuple):
    """Inputs and the outputs that they must have, in batches.

    Attributes:
        total: how many inputs there are, a multiple of ``batch``.
        batch: how many inputs a batch has.
        fill: called with the number of the first input and two arrays, it writes a batch of inputs into one and the
            expected outputs into the other, and returns ranges of positions with NaN (others may have it too).
    """

    total: int
    batch: int
    fill: Callable[[int, Codes, Codes], list[tuple[int, int]]]


def _all_inputs(fmt: FloatFormat, rounding: str, overflow: str, dtype: torch.dtype) -> _Questions:
    carrier = CARRIERS[dtype]
    if carrier.bits > 32:
        raise ValueError(
            f"{dtype} has 2**{carrier.bits} bit patterns, too many to check them all: use dtype=torch.float32, "
            "or a sample (exhaustive=False)"
        )
    if not _has_table(fmt, MAX_BITS):
        raise ValueError(
            f"{fmt.name} has too many values to expand its table (at most {MAX_BITS} exponent and mantissa bits): "
            "use a sample (exhaustive=False), which asks fpsim.reference.round directly"
        )
    judged = judge(fmt, rounding, overflow, dtype)
    batch = min(_BATCH, 1 << carrier.bits)
    offsets = np.arange(batch, dtype=judged.starts.dtype)

    def fill(first: int, codes: Codes, want: Codes) -> list[tuple[int, int]]:
        np.add(offsets, offsets.dtype.type(first), out=codes)
        return judged.expand(first, want)

    return _Questions(1 << carrier.bits, batch, fill)


def _sample(
    fmt: FloatFormat, rounding: str, overflow: str, dtype: torch.dtype, samples: int | None, seed: int
) -> _Questions:
    carrier = CARRIERS[dtype]
    unsigned = _WIDTHS[carrier.bits][1]
    has_table = _has_table(fmt, _TABLE_BITS_OF_SAMPLES)
    samples = (1 << 22 if has_table else 1 << 16) if samples is None else samples
    chosen = judge(fmt, rounding, overflow, dtype).probes() if has_table else significand_grid(fmt, carrier)
    batch = min(_SAMPLE_BATCH, 1 << (len(chosen) + samples - 1).bit_length())
    samples += -(len(chosen) + samples) % batch
    generator = np.random.default_rng(seed)
    random = generator.integers(0, 1 << carrier.bits, samples, dtype=unsigned, endpoint=False)
    inputs = np.concatenate([chosen, random])
    if has_table:
        outputs = judge(fmt, rounding, overflow, dtype).expected(inputs)
    else:
        numbers = tensor_of(inputs, dtype).double().tolist()
        exact = (reference.round(number, fmt, rounding, overflow) for number in numbers)
        outputs = np.array([_code_of_result(value, carrier) for value in exact], unsigned)

    def fill(first: int, codes: Codes, want: Codes) -> list[tuple[int, int]]:
        codes[:], want[:] = inputs[first : first + batch], outputs[first : first + batch]
        return []

    return _Questions(len(inputs), batch, fill)


def _has_table(fmt: FloatFormat, most_bits: int) -> bool:
    return fmt.exponent_bits + fmt.mantissa_bits <= most_bits


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


def _rounding_functions(
    fmt: FloatFormat, rounding: Rounding, overflow: Overflow, paths: Sequence[str]
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    unknown = [path for path in paths if path not in PATHS]
    if unknown or not paths:
        raise ValueError(f"unknown path {unknown[0]!r}: use {' or '.join(PATHS)}" if unknown else "no path to verify")

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return round_tensor(x, fmt, rounding=rounding, overflow=overflow)

    # torch.compile keeps what it compiled, a limited number per code object: every combination gets its own.
    name = f"round_{fmt.name}_{rounding}_{overflow}"
    rounded.__code__ = rounded.__code__.replace(co_name=name)
    every = {"eager": rounded, "compiled": torch.compile(rounded, fullgraph=True, dynamic=False)}
    return {path: every[path] for path in dict.fromkeys(paths)}


def _compile(
    function: Callable[[torch.Tensor], torch.Tensor], questions: _Questions, dtype: torch.dtype, device: str
) -> None:
    """Let ``function`` compile itself, for tensors as long as a batch."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    try:
        function(torch.zeros(questions.batch, dtype=dtype, device=device))
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
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]],
    dtype: torch.dtype,
    device: str,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, list[_Found]]]:
    """For every stretch of inputs in order, how many outputs are wrong, and the first of them."""
    carrier, unsigned, local = CARRIERS[dtype], _WIDTHS[dtype.itemsize * 8][1], threading.local()
    stretch = questions.batch * max(1, questions.total // questions.batch // _STRETCHES)

    def check_stretch(start: int) -> tuple[int, list[_Found]]:
        if not hasattr(local, "codes"):
            local.codes, local.want = np.empty((2, questions.batch), unsigned)
        count = 0
        found: list[_Found] = []
        for first in range(start, min(start + stretch, questions.total), questions.batch):
            nans = questions.fill(first, local.codes, local.want)
            for path, function in ways.items():
                got = codes_of(function(tensor_of(local.codes, dtype).to(device)).cpu())
                wrong = _wrong(got, local.want, nans, carrier)
                count += len(wrong)
                found += [(path, int(local.codes[i]), int(got[i]), int(local.want[i])) for i in wrong[:MAX_EXAMPLES]]
        return count, found[:MAX_EXAMPLES]

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
