"""Hadamard transforms: rotations of blocks by orthogonal matrices whose elements are all 1 or -1, over a square root.

A block of n = m 2^k elements is multiplied by its signs, by Sylvester's matrix of 2^k rows, by Paley's matrix of m rows
if m > 1, and by 1/sqrt(n). The order of the additions is defined, so that every executor gives the same bits.

Source: K. J. Horadam, "Hadamard Matrices and Their Applications" (2007), chapter 2; for random signs, QuIP#
(arXiv 2402.04396); for fixed signs and blocks of 16, the NVFP4 recipe of Transformer Engine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fpsim.formats import ElementFormat
from fpsim.rounding.carriers import working_dtype
from fpsim.rounding.definitions import pieces
from fpsim.rounding.ops import SOURCE, round_op
from fpsim.scaling.scale import Scale
from fpsim.transforms.rounding import in_dtype, rounded_plainly
from fpsim.transforms.transform import Transform

#: The signs of Transformer Engine's NVFP4 recipe.
TE_SIGNS = "+++-+------+-+--"
#: The largest size of a block.
LARGEST_SIZE = 1 << 20

_SEED = re.compile(r"seed=[0-9]{1,19}")
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Hadamard(Transform):
    """A rotation of blocks of ``size`` elements along an axis.

    Attributes:
        size: the elements of a block; None means the whole axis. A power of two, or one times 12, 20, 28, or another
            size of Paley's constructions.
        signs: the factors of the elements of a block before the rotation: ``""`` for none; ``te`` for those of
            Transformer Engine, for blocks of 16; ``seed=N``: the sign of element i is negative if output number i of
            SplitMix64 with this seed is 2^63 or more; or ``+`` and ``-``, one for each element.
        bf16: whether the rotated numbers are rounded to bfloat16, as in Transformer Engine's fused kernels.
        of_kept_axis: whether the first operand is rotated along the axis that the product keeps, such as the tokens of
            a gradient in dgrad, and the result is rotated back (``kept``; HALO, arXiv 2501.02625).

    The additions of a block, all in the working dtype: for h = 1, 2, 4, ... below 2^k, elements a and b whose indices
    differ in bit h only become a + b and a - b. Then, if m > 1, row i of Paley's matrix is summed over j = 0, 1, ...,
    m-1 in this order. One multiplication by 1/sqrt(n), rounded to the working dtype, ends it. The way back is the
    transpose: the same additions with the transposed matrix, the same multiplication, and then the signs.

    If the axis is no multiple of the size, the elements that remain are rotated in blocks of powers of two, the
    largest first: 13 elements in blocks of 8, 4 and 1. The product is unchanged, and so are all shapes.

    Raises:
        ValueError: no Hadamard matrix of this size is known here, or the signs are unknown or have another length.
    """

    size: int | None
    signs: str = ""
    bf16: bool = False
    of_kept_axis: bool = False

    is_of_products: ClassVar[bool] = True
    is_of_casts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.size is not None:
            if isinstance(self.size, bool) or not isinstance(self.size, int):
                raise TypeError(f"the size of a Hadamard transform is an int or None, got {self.size!r}")
            factor_of(self.size)
        signs = self.signs
        if signs == "te":
            if self.size != len(TE_SIGNS):
                raise ValueError(
                    f"the signs 'te' are for blocks of 16, and the size is {self.size or 'full'}: use hadamard:16:te, "
                    "or signs such as seed=0"
                )
        elif signs and not set(signs) - set("+-"):
            if self.size != len(signs):
                raise ValueError(
                    f"{len(signs)} signs {signs!r} do not go with blocks of {self.size or 'the whole axis'}: give one "
                    "sign for each element of a block, or signs such as seed=0"
                )
        elif signs and not (_SEED.fullmatch(signs) and int(signs[5:]) < 1 << 63):
            raise ValueError(
                f"unknown signs {signs!r}: use te (for 16 elements), seed=N with N from 0 to 2**63 - 1, or one + or - "
                "for each element of a block"
            )

    def __str__(self) -> str:
        parts = ["hadamard", "full" if self.size is None else str(self.size), self.signs]
        parts += ["bf16" * self.bf16, "kept" * self.of_kept_axis]
        return ":".join(part for part in parts if part)

    def check_axis(self, length: int) -> None:
        if self.size is None and length:
            factor_of(length)

    def check_cast(self, element: ElementFormat, scale: Scale | None) -> None:
        if self.of_kept_axis:
            raise ValueError(f"{str(self)!r} changes the result of a product too: leave ':kept' out of a cast")

    def operand(self, x: Tensor, number: int, axis: int, parameters: Tensor | None, out: Tensor) -> None:
        is_result = self.of_kept_axis and number == 1
        self._rotate(x, out, axis, back=is_result)
        if self.bf16 and not is_result:
            out.copy_(round_op(out, "e8m7", "nearest_even", "ovf_inf", SOURCE))

    def linear(self, x: Tensor, number: int, axis: int, parameters: Tensor | None = None) -> Tensor:
        identity = torch.eye(x.shape[axis], dtype=x.dtype, device=x.device)
        rotation = torch.empty_like(identity)
        self._rotate(identity, rotation, 1, back=self.of_kept_axis and number == 1)
        return (x.movedim(axis, -1) @ rotation).movedim(-1, axis)

    def rounded(
        self,
        x: Tensor,
        element: ElementFormat,
        rounding: str,
        overflow: str,
        scale: Scale | None,
        axes: list[int],
        words: Tensor | None,
    ) -> Tensor:
        axis = max(axes, default=-1)
        rotated, out = (torch.empty_like(x, dtype=working_dtype(x.dtype)) for _ in range(2))
        self.operand(x, 0, axis, None, rotated)
        rounded = rounded_plainly(rotated, element, rounding, overflow, scale, axes, words)
        self._rotate(rounded, out, axis, back=True)
        return in_dtype(out, x.dtype)

    def _rotate(self, x: Tensor, out: Tensor, axis: int, back: bool = False) -> None:
        length = x.shape[axis]
        self.check_axis(length)
        size = length if self.size is None else self.size
        given = signs_of(self.signs, size) if length > 1 else ()
        signs = torch.tensor(given, dtype=out.dtype, device=x.device) if given else None
        moved, moved_out = x.movedim(axis, -1), out.movedim(axis, -1)
        for start, count, n in _blocks(length, size):
            source, target = (y.narrow(-1, start, count * n).unflatten(-1, (count, n)) for y in (moved, moved_out))
            first = start % size
            own = None if signs is None else signs[first : first + n]
            for part, result in pieces(source, target, keep=1):
                rotated = _rotated(part.movedim(-1, 0), own, out.dtype, back)
                result.copy_(rotated.movedim(0, -1))


def _blocks(length: int, size: int) -> Iterator[tuple[int, int, int]]:
    """The first index, the number and the size of consecutive blocks of one size that fill an axis."""
    start = length - length % size if length else 0
    if start:
        yield 0, start // size, size
    while start < length:
        n = 1 << ((length - start).bit_length() - 1)
        yield start, 1, n
        start += n


def _rotated(x: Tensor, signs: Tensor | None, working: torch.dtype, back: bool) -> Tensor:
    """The blocks ``x``, whose elements lie along the first axis, rotated: a contiguous tensor in the working dtype."""
    n = x.shape[0]
    value, spare = (torch.empty(x.shape, dtype=working, device=x.device) for _ in range(2))
    column = None if signs is None else signs.view(-1, *[1] * (x.dim() - 1))
    if column is None or back:
        value.copy_(x)
    else:
        torch.mul(x, column, out=value)
    m = factor_of(n)
    h = 1
    while h < n // m:
        pairs, results = (y.unflatten(0, (n // (2 * h), 2, h)) for y in (value, spare))
        torch.add(pairs[:, 0], pairs[:, 1], out=results[:, 0])
        torch.sub(pairs[:, 0], pairs[:, 1], out=results[:, 1])
        value, spare = spare, value
        h *= 2
    if m > 1:
        rows, sums = (y.unflatten(0, (m, n // m)) for y in (value, spare))
        matrix = _paley(m)
        for i in range(m):
            row = [matrix[j][i] for j in range(m)] if back else matrix[i]
            torch.mul(rows[0], row[0], out=sums[i])
            for j in range(1, m):
                sums[i].add_(rows[j]) if row[j] > 0 else sums[i].sub_(rows[j])
        value = spare
    if n > 1:
        value.mul_(inverse_root(n))
    if column is not None and back:
        value.mul_(column)
    return value


@lru_cache(maxsize=1024)
def inverse_root(n: int) -> float:
    """1/sqrt(n), correctly rounded."""
    return float(Fraction(math.isqrt((1 << 320) // n), 1 << 160))


@lru_cache(maxsize=64)
def signs_of(signs: str, size: int) -> tuple[int, ...]:
    """The factors 1 and -1 of the elements of a block, from the text `Hadamard.signs`; empty for none."""
    text = TE_SIGNS if signs == "te" else signs
    if text.startswith("seed="):
        seed = int(text[5:])
        negative = [_splitmix64(seed, i) >> 63 for i in range(size)]
    else:
        negative = [int(sign == "-") for sign in text]
    return tuple(1 - 2 * each for each in negative)


def _splitmix64(seed: int, i: int) -> int:
    """Output number ``i``, from 0, of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): an int of 64 bits."""
    x = (seed + (i + 1) * 0x9E3779B97F4A7C15) & _MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


# -- sizes -------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def factor_of(size: int) -> int:
    """The rows m of the matrix of Paley in the Hadamard matrix of ``size`` = m 2^k rows; 1 for a power of two.

    Raises:
        ValueError: the construction has no matrix of this size. The message names the largest size that divides it.
    """
    if not 1 <= size <= LARGEST_SIZE:
        raise ValueError(f"the size of a Hadamard transform is 1 to {LARGEST_SIZE}, got {size}")
    power = size & -size
    if power == size:
        return 1
    odd = size // power
    for m in (odd * 4, odd * 8, odd * 16):
        if m <= size and _is_paley(m):
            return m
    remedy = f"hadamard:{power}, whose blocks divide it" if power > 1 else "hadamard:16, in blocks"
    raise ValueError(f"no Hadamard matrix of {size} rows is built here: use {remedy}")


def _is_paley(m: int) -> bool:
    return (m % 4 == 0 and _is_prime(m - 1)) or (m % 4 == 0 and (m // 2 - 1) % 4 == 1 and _is_prime(m // 2 - 1))


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


@lru_cache(maxsize=16)
def _paley(m: int) -> tuple[tuple[int, ...], ...]:
    """Paley's Hadamard matrix of m rows: construction I if m - 1 is prime, else II.

    With the Jacobsthal matrix Q[i][j] = chi(i - j) modulo q, bordered by a row and a column of ones (the column of -1
    if q is 3 modulo 4) around a zero, I is S + 1, and II replaces the elements 0, 1, -1 of S by A, B and -B with A =
    [[1, -1], [-1, -1]] and B = [[1, 1], [1, -1]].
    """
    first = _is_prime(m - 1)
    q = m - 1 if first else m // 2 - 1
    squares = {x * x % q for x in range(1, q)}

    def chi(x: int) -> int:
        return 0 if x % q == 0 else 1 if x % q in squares else -1

    edge = -1 if first else 1
    core = [[0, *[1] * q], *([edge, *(chi(i - j) for j in range(q))] for i in range(q))]
    if first:
        return tuple(tuple(v + (i == j) for j, v in enumerate(row)) for i, row in enumerate(core))
    blocks = {0: ((1, -1), (-1, -1)), 1: ((1, 1), (1, -1)), -1: ((-1, -1), (-1, 1))}
    return tuple(tuple(v for cell in row for v in blocks[cell][half]) for row in core for half in (0, 1))
