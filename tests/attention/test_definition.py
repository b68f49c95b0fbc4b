"""Attention in tiles has the bits of its definition, of plain loops over tiles, and of the published code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fpsim
from fpsim import reference
from fpsim.reference import to_float

from . import plain

#: Roundings that differ at every step, so that a step at the wrong place changes bits.
MANY = {
    "inputs": "e5m4", "arithmetic": "e8m12", "scores": "e8m9", "exponentials": "e8m8",
    "probabilities": "e8m5/toward_zero", "sums": "e8m10/up", "accumulator": "e8m9/toward_zero",
    "output": "e8m6", "delta": "e8m7/down", "score_gradients": "e8m5", "block_q": 2, "block_k": 3,
    "late_scale": False,
}  # fmt: skip
TILES = {"block_q": 2, "block_k": 3}
BF16 = {"inputs": "bf16", "probabilities": "bf16", "score_gradients": "bf16", "output": "bf16", "arithmetic": "fp32"}
ALL_BF16 = {"inputs": "bf16", "arithmetic": "bf16", "late_scale": False}
FIELDS: dict[str, dict[str, Any]] = {
    "float32": TILES,
    "flash2_bf16": BF16 | TILES,
    "all_bf16": ALL_BF16 | TILES,
    "every step its own": MANY,
    "late scale": MANY | {"late_scale": True},
    "cure": ALL_BF16 | TILES | {"cure": 2.0},
    "offset": BF16 | TILES | {"probabilities": "e4m3fn", "offset": 8},
    "one tile": MANY | {"block_q": 64, "block_k": 64},
}


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def attention(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, fields: dict[str, Any], **options: Any
) -> list[Tensor]:
    """O, dQ, dK and dV."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    output = fpsim.flash_attention(*leaves, steps=fields, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


#: Where operands are float32 numbers, float32 products have the sums of torch, in its order.
EXACT_IN_FLOAT32 = [name for name in FIELDS if name != "float32"]
CASES = [(name, torch.float64) for name in FIELDS] + [(name, torch.float32) for name in EXACT_IN_FLOAT32]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_small_tensors_have_the_bits_of_the_reference(name: str, dtype: torch.dtype) -> None:
    """In float32 the operands are short numbers, so that products have exact sums."""
    fields = FIELDS[name]
    carrier = "fp64" if dtype == torch.float64 else "fp32"
    q, k, v, gradient = (fpsim.round(numbers(n, 2, seed=i), "e5m3").to(dtype) for i, n in enumerate((5, 7, 7, 5)))
    k[1] = k[4] = k[0]  # equal keys: scores repeat
    mask = torch.zeros(5, 7, dtype=dtype)
    mask[3, 2:5], mask[2] = -torch.inf, -torch.inf
    mask[4, 1] = 0.75
    scale = float(torch.tensor(1 / math.sqrt(2)))
    steps = reference.Steps(**fields)
    exact = [x.tolist() for x in (q, k, v)]
    options = {"scale": scale, "mask": mask.tolist(), "carrier": carrier}
    output, logarithms = reference.flash_forward(*exact, steps, **options)
    gradients = reference.flash_backward(gradient.tolist(), *exact, output, logarithms, steps, **options)
    wanted = [
        torch.tensor([[to_float(x) for x in row] for row in matrix], dtype=dtype) for matrix in (output, *gradients)
    ]
    for got, want in zip(attention(q, k, v, gradient, fields, attn_mask=mask), wanted, strict=True):
        assert torch.equal(got, want)
    assert not wanted[0][2].any() and wanted[0][0].all()  # the row without a key


def test_a_block_of_rows_has_one_scale_and_backward_its_own_roundings() -> None:
    fp8 = {"inputs": "e4m3fn/block:2x256", "probabilities": "e4m3fn", "output": "bf16", "offset": 8, "block_q": 2}
    fp8["block_k"] = 4
    fields = fp8 | {"backward": BF16 | TILES}
    q, k, v, gradient = (numbers(n, 3, seed=i) * 100 for i, n in enumerate((3, 5, 5, 3)))
    exact, mask = [x.tolist() for x in (q, k, v)], reference.causal(3, 5)
    options = {"scale": 2.0**-14, "mask": mask}
    output, logarithms = reference.flash_forward(*exact, reference.Steps(**fp8), **options)
    steps = reference.Steps(**BF16, **TILES)
    gradients = reference.flash_backward(gradient.tolist(), *exact, output, logarithms, steps, **options)
    got = attention(q, k, v, gradient, fields, is_causal=True, scale=2.0**-14)
    for ours, theirs in zip(got, (output, *gradients), strict=True):
        assert ours.tolist() == [[to_float(x) for x in row] for row in theirs]


@pytest.mark.parametrize(
    "sums", [{"products": "e8m13/toward_zero chunk=2"}, {"products": "e8m9 order=pairwise"}, {"reductions": "bf16"}]
)
def test_sums_are_those_of_their_accumulator(sums: dict[str, str]) -> None:
    fields = BF16 | TILES | sums
    q, k, v, gradient = (fpsim.round(numbers(5, 8, seed=i).float(), "bf16") for i in range(4))
    got = attention(*(x.unsqueeze(0) for x in (q, k, v, gradient)), fields, scale=0.25)
    output, logarithms = plain.forward(q, k, v, 0.25, None, fields)
    wanted = (output, *plain.backward(gradient, q, k, v, output, logarithms, 0.25, None, fields))
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours[0], theirs)
    assert not torch.equal(
        got[0], attention(*(x.unsqueeze(0) for x in (q, k, v, gradient)), BF16 | TILES, scale=0.25)[0]
    )


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_heads_have_the_bits_of_plain_loops_over_tiles(name: str, dtype: torch.dtype) -> None:
    """Lengths are no multiples of tiles. Short operands make the sums of float32 products exact, in any order."""
    fields = FIELDS[name]
    rounded = "e5m2" if dtype == torch.float32 else "bf16"
    q, gradient = (fpsim.round(numbers(2, 2, 13, 4, seed=i, dtype=dtype), rounded) for i in (0, 1))
    k, v = (fpsim.round(numbers(2, 2, 11, 4, seed=i, dtype=dtype), rounded) for i in (2, 3))
    k[:, :, 5] = k[:, :, 2]
    is_seen = torch.rand(2, 1, 13, 11, generator=torch.Generator().manual_seed(4)) < 0.7
    got = attention(q, k, v, gradient, fields, attn_mask=is_seen)
    added = torch.zeros(is_seen.shape, dtype=dtype).masked_fill(~is_seen, -torch.inf)
    for batch, head in ((0, 1), (1, 0)):
        one = [x[batch, head] for x in (q, k, v)]
        output, logarithms = plain.forward(*one, 0.5, added[batch, 0], fields)
        given = (gradient[batch, head], *one, output, logarithms, 0.5, added[batch, 0], fields)
        for ours, theirs in zip(got, (output, *plain.backward(*given)), strict=True):
            assert torch.equal(ours[batch, head], theirs)


def plain_bfloat16(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, size: int) -> list[Tensor]:
    """Causal attention of one head in bfloat16 tensors, with the arithmetic of torch and nothing of fpsim."""
    scale, outputs, logarithms = q.shape[1] ** -0.5, [], []
    unseen = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
    for i in range(0, len(q), size):
        rows = slice(i, i + size)
        m = torch.full((len(q[rows]), 1), -torch.inf, dtype=q.dtype)
        total, o = torch.zeros_like(m), torch.zeros(len(m), v.shape[1], dtype=q.dtype)
        for j in range(0, len(k), size):
            s = ((q[rows] @ k[j : j + size].T) * scale).masked_fill(unseen[rows, j : j + size], -torch.inf)
            new = torch.maximum(m, s.amax(1, keepdim=True))
            p, a = torch.exp(s - new), torch.exp(m - new)
            total = a * total + p.sum(1, keepdim=True)
            o = a * o + p @ v[j : j + size]
            m = new
        outputs.append(o / total)
        logarithms.append(total.log() + m)
    output, total = torch.cat(outputs), torch.cat(logarithms)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (gradient * output).sum(1, keepdim=True)
    for i in range(0, len(q), size):
        for j in range(0, len(k), size):
            rows, columns = slice(i, i + size), slice(j, j + size)
            s = ((q[rows] @ k[columns].T) * scale).masked_fill(unseen[rows, columns], -torch.inf)
            p = torch.exp(s - total[rows])
            ds = p * scale * (gradient[rows] @ v[columns].T - delta[rows])
            dq[rows] += ds @ k[columns]
            dk[columns] += ds.T @ q[rows]
            dv[columns] += p.T @ gradient[rows]
    return [output, dq, dk, dv]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_bf16_has_the_bits_of_plain_torch_code_on_bfloat16_tensors(dtype: torch.dtype) -> None:
    q, k, v, gradient = (fpsim.round(numbers(2, 11, 8, seed=i), "bf16").bfloat16() for i in range(4))
    fields = {"preset": "all_bf16", "block_q": 4, "block_k": 4}
    got = attention(*(x.to(dtype) for x in (q, k, v, gradient)), fields, is_causal=True)
    for head in range(2):
        wanted = plain_bfloat16(q[head], k[head], v[head], gradient[head], 4)
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.equal(ours[head].float(), theirs.float())
