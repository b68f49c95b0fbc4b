"""Rotary positions in narrow formats: tables of angles, rotation, and how much attention depends on the origin.

With rotary positions the attention between two tokens depends on their distance alone. In bfloat16 it also depends on
where the sequence begins (Wang et al., When Precision Meets Position, arXiv 2411.13476).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fpsim

#: What is rounded: nothing; cosines, sines and the products of the rotation; or positions and frequencies too.
PRECISIONS = ("fp32", "products", "positions")


def check_precision(precision: str) -> None:
    """Raise ValueError if there is no such precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r} of rotary positions: use one of {', '.join(PRECISIONS)}")


def frequencies(dim: int, base: float = 10000.0) -> Tensor:
    """The inverse frequencies of ``dim`` / 2 pairs of channels, float32: base^(-2 i / dim)."""
    return 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)


def rotary_tables(
    positions: Tensor, frequencies: Tensor, precision: str = "products", format: str = "bf16"
) -> tuple[Tensor, Tensor]:
    """The cosines and sines of the angles at ``positions``.

    Args:
        positions: integers, any shape.
        frequencies: the inverse frequencies, shape (d / 2,).
        precision: ``"fp32"`` rounds nothing, ``"products"`` the cosines and sines, and ``"positions"`` also the
            positions, the frequencies and the angles.
        format: the format of what is rounded.

    Returns:
        Two float32 tensors of shape (*positions, d); the second half of channels repeats the first.

    Raises:
        ValueError: an unknown precision or format.
    """
    check_precision(precision)

    def narrow(x: Tensor, where: Sequence[str]) -> Tensor:
        return fpsim.round(x, format) if precision in where else x

    positions, frequencies = (narrow(x.float(), ("positions",)) for x in (positions, frequencies))
    angles = narrow(positions[..., None] * frequencies, ("positions",))
    angles = torch.cat((angles, angles), -1)
    cos, sin = (narrow(table, ("products", "positions")) for table in (angles.cos(), angles.sin()))
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor, precision: str = "products", format: str = "bf16") -> Tensor:
    """``x`` rotated by the angles of a table: x cos + half(x) sin, where half swaps the halves of channels.

    Args:
        x: shape (..., d), with the table's positions in the axis before the last one.
        cos, sin: as from `rotary_tables`.
        precision: ``"fp32"`` rounds nothing, the others round x, both products and their sum.
        format: the format of what is rounded.
    """
    check_precision(precision)

    def narrow(x: Tensor) -> Tensor:
        return x if precision == "fp32" else fpsim.round(x, format)

    x = narrow(x)
    first, second = x.chunk(2, -1)
    return narrow(narrow(x * cos) + narrow(torch.cat((-second, first), -1) * sin))


@dataclass(frozen=True)
class ShiftDistance:
    """How much attention depends on the origin of positions.

    Attributes:
        distance: the mean over the rows of attention of the sum of |A(p + shift) - A(p)|; 0 in exact arithmetic.
        first_key: the share of the first key in it.
    """

    distance: float
    first_key: float


def shift_distance(
    q: Tensor, k: Tensor, shift: int, precision: str = "products", *, base: float = 10000.0, format: str = "bf16"
) -> ShiftDistance:
    """How much causal attention changes when all positions are shifted.

    Queries and keys are rotated in ``precision``; the scores and the softmax are float32. (Measure D of arXiv
    2411.13476, section 3.)

    Args:
        q, k: shape (tokens, d).
        shift: what is added to the positions 0, 1, ...
        precision, format: as in `rotary_tables`.
        base: that of the frequencies.

    Raises:
        ValueError: an unknown precision or format.
    """
    causal = torch.ones(len(q), len(k), dtype=torch.bool).tril()

    def attention(first: int) -> Tensor:
        positions = torch.arange(first, first + len(q))
        cos, sin = rotary_tables(positions, frequencies(q.shape[-1], base), precision, format)
        rotated = [rotate(x, cos, sin, precision, format) for x in (q, k)]
        scores = rotated[0] @ rotated[1].mT / q.shape[-1] ** 0.5
        return scores.masked_fill(~causal, -torch.inf).softmax(-1)

    change = (attention(shift) - attention(0)).abs().double()
    total = change.sum()
    return ShiftDistance(float(total / len(q)), float(change[:, 0].sum() / total) if total else 0.0)


def anchor_mask(lengths: Sequence[int]) -> Tensor:
    """The mask of AnchorAttention for documents that are packed behind one shared first token.

    Every token sees the first token, and the tokens of its own document up to itself. Positions go on through all
    documents.

    Args:
        lengths: the number of tokens of each document, without the first token.

    Returns:
        A boolean tensor of shape (n, n), n = 1 + sum(lengths), True where the query (row) sees the key.

    >>> anchor_mask([2, 1]).int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 0, 1]], dtype=torch.int32)
    """
    if any(length < 1 for length in lengths):
        raise ValueError(f"a document has at least one token, got lengths {list(lengths)}")
    document = torch.repeat_interleave(torch.arange(1 + len(lengths)), torch.tensor([1, *lengths]))
    mask = document[:, None] == document
    mask[:, 0] = True
    return mask.tril()
