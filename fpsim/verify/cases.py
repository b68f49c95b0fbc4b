"""Cases: inputs with their right results, in batches, for one or more modes of rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fpsim.formats import ROUNDINGS, split_rounding
from fpsim.reference.tables import MAX_BITS
from fpsim.rounding.carriers import CARRIERS
from fpsim.rounding.definitions import random_words_at
from fpsim.rounding.ops import random_key_op
from fpsim.verify.codes import Codes
from fpsim.verify.inputs import random_codes, significand_grid
from fpsim.verify.judges import has_table, judge, results_one_by_one
from fpsim.verify.modes import Group, Mode

# Inputs per batch: their temporaries stay in the cache, and torch's overhead per call is small.
_BATCH = 1 << 18
# The same for samples, which are padded to a multiple of it.
_SAMPLE_BATCH = 1 << 15


class Cases(NamedTuple):
    """Inputs and the outputs that they must have, in batches.

    Attributes:
        totals: for every mode the number of its inputs, counted from the first; multiples of ``batch``.
        batch: the number of inputs in a batch.
        seed: of stochastic rounding. A batch is rounded with this seed plus the position of its first input.
        fill: called with the position of a batch's first input, an array, and one array per mode. It writes the
            inputs into the former and the right outputs into the latter. It returns for every mode ranges of positions
            with NaN; there may be NaNs elsewhere too. Outputs beyond a mode's total have no meaning.
    """

    totals: tuple[int, ...]
    batch: int
    seed: int
    fill: Callable[[int, Codes, Sequence[Codes]], list[list[tuple[int, int]]]]

    @property
    def total(self) -> int:
        """The number of inputs."""
        return max(self.totals)

    def random_number(self, position: int, mode: int, rounding: str) -> int | None:
        """The random number that stochastic rounding draws for the input at ``position``; None for other roundings."""
        bits = split_rounding(rounding)[1]
        start = position - position % self.batch
        return int(random_numbers(self.seed + start, self.batch, bits, mode)[position - start]) if bits else None


def all_inputs(group: Group) -> Cases:
    """Every bit pattern of a carrier, with the results from the tables of the modes.

    Raises:
        ValueError: a carrier of 64 bits, or a mode without a table.
    """
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
        if not has_table(mode.format, mode.rounding, MAX_BITS):
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

    return Cases((1 << carrier.bits,) * len(group.modes), batch, 0, fill)


def sample_of_inputs(
    group: Group, samples: int | None, seed: int, table_bits: int, most_one_by_one: int | None = None
) -> Cases:
    """A sample of inputs, and their results.

    The sample holds the inputs where an error is likeliest, and random ones.

    Args:
        group: modes of one carrier.
        samples: the least number of random inputs; None: 4 million, or 65536 if a mode has no table.
        seed: of the random inputs, and of stochastic rounding.
        table_bits: formats of more exponent and mantissa bits are judged without a table.
        most_one_by_one: the most inputs per mode that `fpsim.reference.round` judges one by one, half of them random;
            None: all.
    """
    carrier = CARRIERS[group.dtype]
    tabular = [has_table(mode.format, mode.rounding, table_bits) for mode in group.modes]
    if samples is None:
        samples = 1 << 22 if all(tabular) else 1 << 16
    rng = np.random.default_rng(seed)
    likeliest = [_likeliest(mode, group.dtype, table_bits, most_one_by_one, rng) for mode in group.modes]
    chosen = np.unique(np.concatenate(likeliest))
    if most_one_by_one is not None:
        rng.shuffle(chosen)
    batch = most_one_by_one or min(_SAMPLE_BATCH, 1 << (len(chosen) + samples - 1).bit_length())
    samples += -(len(chosen) + samples) % batch
    random = random_codes([mode.format for mode in group.modes], carrier, samples, rng)
    ahead = len(chosen) if most_one_by_one is None else min(len(chosen), most_one_by_one // 2)
    inputs = np.concatenate([chosen[:ahead], random, chosen[ahead:]])
    asked = inputs[:most_one_by_one]
    outputs = [
        judge(*mode, group.dtype).expected(inputs)
        if in_table
        else results_one_by_one(*mode, asked, group.dtype, _draws(mode, number, len(asked), batch, seed))
        for number, (mode, in_table) in enumerate(zip(group.modes, tabular, strict=True))
    ]

    def fill(first: int, codes: Codes, wants: Sequence[Codes]) -> list[list[tuple[int, int]]]:
        codes[:] = inputs[first : first + batch]
        for output, want in zip(outputs, wants, strict=True):
            if first < len(output):
                want[:] = output[first : first + batch]
        return [[] for _ in outputs]

    return Cases(tuple(map(len, outputs)), batch, seed, fill)


def _likeliest(mode: Mode, dtype: torch.dtype, table_bits: int, most: int | None, rng: np.random.Generator) -> Codes:
    """The inputs where an error is likeliest; without a table, at most ``most`` of a grid."""
    deterministic = mode if mode.rounding in ROUNDINGS else mode._replace(rounding="nearest_even")
    if has_table(mode.format, deterministic.rounding, table_bits):
        return judge(*deterministic, dtype).probes()
    grid = significand_grid(mode.format, CARRIERS[dtype])
    return grid if most is None else rng.choice(grid, min(most, len(grid)), replace=False)


def _draws(mode: Mode, number: int, count: int, batch: int, seed: int) -> list[int] | None:
    """The random numbers that the first ``count`` inputs meet, in whole batches; None unless rounding is stochastic."""
    bits = split_rounding(mode.rounding)[1]
    if not bits:
        return None
    starts = range(0, count, batch)
    return np.concatenate([random_numbers(seed + start, batch, bits, salt=number) for start in starts]).tolist()


def random_numbers(seed: int, count: int, bits: int, salt: int = 0) -> NDArray[np.int64]:
    """The random numbers that stochastic rounding with ``bits`` random bits draws for elements 0 to ``count - 1``.

    They are the topmost bits of the elements' words: the argument ``random`` of `fpsim.reference.round`.

    >>> from fpsim import round
    >>> rounded = round(torch.full((1000,), 1.25), "e2m1fn", rounding="stochastic:1", seed=0)
    >>> np.array_equal(rounded == 1.5, random_numbers(0, 1000, 1) == 1)
    True
    """
    words = random_words_at(random_key_op(torch.tensor(seed), salt), 0, count).numpy().view(np.uint32)
    return words.astype(np.int64) >> (32 - bits)
