"""The proof at scale: rounding as shipped, compared bit for bit with the exact reference.

`verify` compares `fpsim.round`, eager and compiled, with the reference on a sample of the inputs or on all of them.
`verify_together` checks many modes at once, since compilation takes most of the time. `verify_groups` does so for many
groups of modes, in several processes.
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fpsim.formats import FloatFormat, split_rounding
from fpsim.processors import check_device
from fpsim.rounding.carriers import CARRIERS, check_carrier
from fpsim.tensor_functions import round as round_tensor
from fpsim.verify.cases import Cases, all_inputs, sample_of_inputs
from fpsim.verify.codes import Codes, codes_of, differences, is_nan, name_of, tensor_of, unsigned_of
from fpsim.verify.modes import PATHS, Group, check_paths, mode_of
from fpsim.verify.verdict import MAX_EXAMPLES, Mismatch, Verdict

# Threads report to the main one about so many times in all: each report costs a change of threads.
_STRETCHES = 1024
# Formats of more exponent and mantissa bits are sampled without a table, which would take half a minute to make.
_TABLE_BITS = 15
# The same where many modes are verified together, for tables that take milliseconds.
_TABLE_BITS_TOGETHER = 10
# Where many modes are verified together: inputs per call of `fpsim.round`, which is also the number of inputs that the
# reference judges one by one; and random inputs of the modes with a table.
_BATCH_TOGETHER = 1 << 12
_SAMPLES_TOGETHER = 1 << 15

_Way = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]  # from inputs and a seed to a result per mode
_Found = tuple[str, int, int, int, int]  # path, position among the inputs, input, got, want


class CompilationError(RuntimeError):
    """``torch.compile`` does not work on this machine."""


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

    Inputs are either all bit patterns of ``dtype``, or a sample. A sample holds every value of the format, every
    boundary between two results, infinities, zeros and NaNs, each with its two neighbours on either side. It also
    holds random bit patterns, half of them with magnitudes in the format's range. Formats too wide for
    `fpsim.reference.table` are sampled on a grid of significands in every binade instead. Stochastic rounding is
    compared with `fpsim.reference.round` for the random numbers that `fpsim.round` draws: the topmost bits of the
    elements' words. On the CPU, as many threads run as torch has; meanwhile torch runs each operation in one thread.

    Args:
        format: a name or a `FloatFormat`.
        rounding, overflow: as in `fpsim.round`.
        exhaustive: whether to check all inputs of ``dtype``.
        samples: the least number of random inputs in a sample. None means 4 million; where there is no table, and
            `fpsim.reference.round` computes each result, it means 65536.
        seed: of the random inputs, and of stochastic rounding.
        paths: which of `PATHS`: ``eager`` calls, ``compiled`` code as in training (it needs a C++ compiler), or both.
        dtype: of the inputs: float64, float32, bfloat16 or float16.
        device: the torch device that rounds the inputs.
        progress: called now and then with the number of inputs done and the number of all inputs.

    Raises:
        ValueError: an unknown format, mode, path or device, a format that ``dtype`` cannot carry, or an exhaustive
            check of a format too wide for a table, of stochastic rounding, or of float64 inputs.
        TypeError: ``dtype`` is not a carrier.
        CompilationError: ``torch.compile`` does not work here.

    >>> verify("e4m3fn", samples=1000, paths=["eager"]).mismatches
    0
    """
    group = Group((mode_of(format, rounding, overflow),), dtype, check_paths(paths))
    start = _now()
    check_carrier(dtype, group.modes[0].format)
    ways = _rounding_functions(group)
    check_device(device)
    cases = all_inputs(group) if exhaustive else sample_of_inputs(group, samples, seed, _TABLE_BITS)
    [verdict] = _verdicts(group, cases, ways, device, exhaustive, start, progress)
    return verdict


def verify_together(
    group: Group,
    *,
    samples: int = _SAMPLES_TOGETHER,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Verdict, ...]:
    """`verify` many modes of one carrier on one sample of inputs, compiled as one function.

    `fpsim.reference.round` judges stochastic modes, and modes of formats too wide for a quick table, one input at a
    time. These modes get the first 4096 inputs; half of them are random.

    Args:
        group: from `plan`, or a `Group` of modes from `mode_of`.
        samples: the least number of random inputs.
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
    check_device(device)
    cases = sample_of_inputs(group, samples, seed, _TABLE_BITS_TOGETHER, _BATCH_TOGETHER)
    return _verdicts(group, cases, ways, device, False, start, progress)


def verify_groups(
    groups: Sequence[Group],
    *,
    jobs: int = 1,
    samples: int = _SAMPLES_TOGETHER,
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[tuple[Verdict, ...]]:
    """`verify_together` for each group, in ``jobs`` processes; the verdicts come in the order of the groups.

    Args:
        groups: from `plan`.
        jobs: the number of processes; 1 means this one. Other processes import the main module (guard it by
            ``if __name__ == "__main__"``), and each computes in one thread.
        samples, seed, device: as in `verify_together`.

    Raises:
        ValueError: ``jobs`` is not positive, or as `verify_together`.
        TypeError, CompilationError: as `verify_together`.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: use 1 process or more")
    check_device(device)
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
    """Compute in one thread and compile without further processes; for one of several processes."""
    import torch._inductor.config

    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _verdicts(
    group: Group,
    cases: Cases,
    ways: dict[str, _Way],
    device: str,
    exhaustive: bool,
    start: tuple[float, float],
    progress: Callable[[int, int], None] | None,
) -> tuple[Verdict, ...]:
    """Round the inputs of the cases in every way, and give a verdict for every mode."""
    mismatches = [0] * len(group.modes)
    examples: list[list[_Found]] = [[] for _ in group.modes]
    with _one_thread_per_operation() as workers:
        if "compiled" in ways:
            _compile(ways["compiled"], cases, group.dtype, device)
        for stretch in _mismatches(cases, ways, group.dtype, device, workers, progress):
            for number, (count, found) in enumerate(stretch):
                mismatches[number] += count
                examples[number] += found[: MAX_EXAMPLES - len(examples[number])]
    seconds, cpu_seconds = ((b - a) / len(group.modes) for a, b in zip(start, _now(), strict=True))
    width = CARRIERS[group.dtype].bits // 4 + 2  # of a hexadecimal code

    def mismatch(number: int, path: str, position: int, *codes: int) -> Mismatch:
        source, got, want = (f"{code:#0{width}x}" for code in codes)
        drawn = cases.random_number(position, number, group.modes[number].rounding)
        return Mismatch(path, source, got, want, "" if drawn is None else hex(drawn))

    return tuple(
        Verdict(
            format=mode.format.name,
            rounding=mode.rounding,
            overflow=mode.overflow,
            carrier=name_of(group.dtype),
            device=device,
            paths=tuple(ways),
            exhaustive=exhaustive,
            inputs=total,
            mismatches=mismatches[number],
            examples=tuple(mismatch(number, *found) for found in examples[number]),
            seconds=seconds,
            cpu_seconds=cpu_seconds,
        )
        for number, (mode, total) in enumerate(zip(group.modes, cases.totals, strict=True))
    )


def _rounding_functions(group: Group) -> dict[str, _Way]:
    """For each path a function that rounds in every mode of the group."""
    calls = [(*mode, split_rounding(mode.rounding)[1] > 0) for mode in group.modes]

    def rounded(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = []
        for salt, (fmt, rounding, overflow, stochastic) in enumerate(calls):
            draw: dict[str, Any] = {"seed": seed, "salt": salt} if stochastic else {}
            results.append(round_tensor(x, fmt, rounding=rounding, overflow=overflow, **draw))
        return tuple(results)

    # torch.compile keeps a limited number of compiled functions per code object: every group gets its own code object.
    rounded.__code__ = rounded.__code__.replace(co_name=f"round_{hash(group):x}")
    whole = torch.compile(rounded, fullgraph=True, dynamic=False)
    compiled = torch.compile(rounded, dynamic=False)

    def compiled_whole(x: torch.Tensor, seed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # Dynamo counts compiled frames for ``fullgraph`` in a variable of the whole process: other threads must not.
        return (whole if threading.current_thread() is threading.main_thread() else compiled)(x, seed)

    every: dict[str, _Way] = {"eager": rounded, "compiled": compiled_whole}
    return {path: every[path] for path in check_paths(group.paths)}


def _compile(function: _Way, cases: Cases, dtype: torch.dtype, device: str) -> None:
    """Compile ``function`` for tensors as long as a batch, by calling it."""
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError

    try:
        function(torch.zeros(cases.batch, dtype=dtype, device=device), torch.tensor(0, device=device))
    except (BackendCompilerFailed, InductorError) as error:
        raise CompilationError(
            f"torch.compile does not work here ({str(error).strip().splitlines()[0]}): install a C++ compiler, "
            "or verify the eager path alone (paths=['eager'], on the command line --path eager)"
        ) from error


@contextmanager
def _one_thread_per_operation() -> Iterator[int]:
    """Torch runs every operation in one thread meanwhile; yields the number of threads it had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _mismatches(
    cases: Cases,
    ways: dict[str, _Way],
    dtype: torch.dtype,
    device: str,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> Iterator[list[tuple[int, list[_Found]]]]:
    """For each stretch of inputs, in order, and each mode: the number of wrong outputs, and the first of them."""
    carrier, unsigned, local = CARRIERS[dtype], unsigned_of(CARRIERS[dtype]), threading.local()
    modes, batch = len(cases.totals), cases.batch
    stretch = batch * max(1, cases.total // batch // _STRETCHES)

    def check_stretch(start: int) -> list[tuple[int, list[_Found]]]:
        if not hasattr(local, "codes"):
            local.codes, *local.wants = np.empty((1 + modes, batch), unsigned)
        counts = [0] * modes
        found: list[list[_Found]] = [[] for _ in range(modes)]
        for first in range(start, min(start + stretch, cases.total), batch):
            nans = cases.fill(first, local.codes, local.wants)
            x = tensor_of(local.codes, dtype).to(device)
            seed = torch.tensor(cases.seed + first, device=device)
            for path, function in ways.items():
                for number, result in enumerate(function(x, seed)):
                    if first >= cases.totals[number]:
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
        starts = range(0, cases.total, stretch)
        for start, result in zip(starts, pool.map(check_stretch, starts), strict=True):
            if progress is not None:
                progress(min(start + stretch, cases.total), cases.total)
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def _wrong(got: Codes, want: Codes, nans: list[tuple[int, int]], carrier: FloatFormat) -> NDArray[np.intp]:
    """`differences`, but fast where there are none; it replaces NaNs in ``want`` by the NaNs in ``got``."""
    for start, end in nans:
        if is_nan(got[start:end], carrier).all():
            want[start:end] = got[start:end]
    return np.empty(0, np.intp) if np.array_equal(got, want) else differences(got, want, carrier)
