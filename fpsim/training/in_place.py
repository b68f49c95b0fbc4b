"""Casts of many tensors in place, eager or compiled, and the random draws of a training step."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from fpsim.casts import Arguments, Cast, apply_arguments
from fpsim.rounding.random_words import random_key, to_signed

#: The number of elements rounded per step from which rounding is compiled by default.
COMPILE_FROM = 1 << 20

# Tensors with fewer elements are concatenated and rounded together, because each call costs some microseconds.
_SMALL = 1 << 14
# Tensors with fewer elements have 32-bit indices.
_SHORT = 1 << 31
# The number of tensors that one call of compiled code rounds. A call costs tens of microseconds.
_BATCH = 4


@dataclass(frozen=True)
class Job:
    """A tensor to round in place, its cast, and the number of its draw in the step."""

    tensor: Tensor
    cast: Cast
    draw: int


def draw_of_step(seed: int, step: int) -> int:
    """The seed of the first draw of a step, a 64-bit hash of both arguments; later draws add their number to it."""
    return int(random_key(torch.tensor(seed), step))


def round_in_place(jobs: Sequence[Job], draw: int | None, compiled: bool | None = False) -> None:
    """Round each tensor in place, with the result of `fpsim.round`.

    Args:
        jobs: the tensors and their casts.
        draw: for stochastic rounding the result of `draw_of_step`. The seed of a job is ``draw + job.draw`` (modulo
            2**64).
        compiled: whether Inductor compiles the rounding, once for every cast. None means that it does if the tensors on
            the CPU have at least `COMPILE_FROM` elements in total.
    """
    if compiled is None:
        compiled = sum(job.tensor.numel() for job in jobs if job.tensor.device.type == "cpu") >= COMPILE_FROM
    small, large = defaultdict(list), defaultdict(list)
    for job, key in zip(jobs, keys_of(jobs, draw), strict=True):
        x, cast = job.tensor, job.cast
        if key is None and cast.scale is None and cast.transform is None and x.numel() < _SMALL:
            small[cast, x.dtype, x.device].append(x)
        elif compiled and not cast.has_axis and x.is_contiguous() and 1 < x.numel() < _SHORT:
            large[cast, x.dtype, x.device, key is not None].append((x.view(-1), key))
        else:
            write(x, x, key, cast.arguments)

    joined = {kind: torch.cat([x.reshape(-1) for x in tensors]) for kind, tensors in small.items()}
    for (cast, dtype, device), x in joined.items():
        if compiled and x.numel() > 1:
            large[cast, dtype, device, False].append((x, None))
        else:
            write(x, x, None, cast.arguments)
    for compilation, pairs in large.items():
        _compiled_rounding(*compilation)(pairs)
    for kind, tensors in small.items():
        parts = joined[kind].split([x.numel() for x in tensors])
        torch._foreach_copy_(tensors, [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)])


def keys_of(jobs: Sequence[Job], draw: int | None) -> Sequence[Tensor | None]:
    """The key of each job's random numbers, int32 of shape (2,); None for deterministic rounding."""
    drawn = [i for i, job in enumerate(jobs) if job.cast.is_stochastic]
    keys: list[Tensor | None] = [None] * len(jobs)
    if drawn:
        key = random_key(torch.tensor([to_signed((draw or 0) + jobs[i].draw) for i in drawn]), 0)
        for i, halves in zip(drawn, torch.stack([key, key >> 32], 1).to(torch.int32), strict=True):
            keys[i] = halves.to(jobs[i].tensor.device)
    return keys


def write(target: Tensor, value: Tensor, key: Tensor | None, arguments: Arguments | None) -> None:
    """Write ``value`` to ``target``, cast; ``arguments`` is `Cast.arguments`, and None leaves the value as it is."""
    if key is not None and torch.compiler.is_compiling():
        torch._check(value.numel() < _SHORT)  # tells Inductor that 32-bit indices suffice, whatever the size
    axes = (-1,) if value.dim() else ()  # a number is a row of its own
    target.copy_(value if arguments is None else apply_arguments(value, arguments, axes=axes, key=key))


def _round_batch(xs: Sequence[Tensor], keys: Sequence[Tensor] | None, arguments: Arguments) -> None:
    for i, x in enumerate(xs):
        write(x, x, None if keys is None else keys[i], arguments)


@cache
def _compiled_rounding(
    cast: Cast, dtype: torch.dtype, device: torch.device, stochastic: bool
) -> Callable[[Sequence[tuple[Tensor, Tensor | None]]], None]:
    """The compiled `_round_batch`, as a function of pairs of a one-dimensional tensor and its key."""
    arguments = cast.arguments
    compiled = compile_alone(_round_batch, "_".join(("round", *map(str, arguments))))
    no_key = torch.zeros(2, dtype=torch.int32, device=device) if stochastic else None

    def run_batch(xs: Sequence[Tensor], keys: Sequence[Tensor]) -> None:
        compiled(xs, torch.stack(list(keys)) if stochastic else None, arguments)

    return in_batches(run_batch, lambda length: (torch.zeros(length, dtype=dtype, device=device), no_key), _BATCH)


def compile_alone(function: Callable[..., None], name: str) -> Callable[..., None]:
    """``function``, compiled for tensors of any length as a function of its own, called ``name``.

    Dynamo limits the number of recompilations per function.
    """
    assert isinstance(function, FunctionType)
    name = re.sub(r"\W+", "_", name)
    own = FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)
    return torch.compile(own, dynamic=True)


def in_batches(
    run_batch: Callable[..., None], example: Callable[[int], tuple[Any, ...]], size: int
) -> Callable[[Sequence[tuple[Any, ...]]], None]:
    """A function of any number of items, which calls compiled code for some of them at a time.

    Args:
        run_batch: the compiled code, as a function of one sequence for each part of an item.
        example: an item whose tensors have a given length.
        size: the number of items of a call.
    """
    fillers = [example(2) for _ in range(size)]  # distinct tensors: Dynamo compiles anew for the same one twice

    def run(items: Sequence[tuple[Any, ...]]) -> None:
        for start in range(0, len(items), size):
            batch = [*items[start : start + size], *fillers[len(items) - start :]]
            run_batch(*zip(*batch, strict=True))

    # Compile with long tensors, or the code uses one thread, and of different lengths, or it requires equal lengths.
    run([example(COMPILE_FROM + i) for i in range(size)])
    return run


def check_seed(seed: int | None, casts: Sequence[Cast]) -> None:
    """Raise ValueError if a stochastic cast has no seed, a seed has no stochastic cast, or the seed is not 64 bits."""
    stochastic = [cast for cast in casts if cast.is_stochastic]
    if stochastic and seed is None:
        raise ValueError(f"the cast {stochastic[0]} is stochastic and needs a seed: an int")
    if seed is not None and not stochastic:
        raise ValueError(f"seed={seed} has no meaning without stochastic rounding: use rounding='stochastic'")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        raise ValueError(f"a seed is an int of 64 bits, got {seed!r}")
