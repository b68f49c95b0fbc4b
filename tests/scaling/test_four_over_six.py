"""NVFP4 with Four Over Six, judged by its formulas written out in NumPy, in the order of Transformer Engine."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

import fpsim
from fpsim import reference
from fpsim.posttraining import round_weights
from fpsim.reference.blocks import quantize_block

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=np.float32)
#: All values of e4m3fn from 0 on: the 3 mantissa bits of 15 binades, and subnormal numbers.
E4M3 = np.array(
    [m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 10) for e in range(1, 16) for m in range(8)][:-1],
    dtype=np.float32,
)


def nearest(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``x`` rounded to the nearest of ``values`` and their negatives; of equally near ones to that of even index."""
    y = np.abs(x).astype(np.float64)
    high = np.searchsorted(values, y).clip(1, len(values) - 1)
    low = high - 1
    below, above = y - values[low], values[high] - y
    index = np.where(below < above, low, np.where(above < below, high, np.where(low % 2 == 0, low, high)))
    return np.copysign(values[index], x)


def four_over_six(x: np.ndarray, rule: str, tile: bool) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of whole blocks, float32, rounded; and for each element whether the scale of 4 was taken."""
    f = np.float32
    rows, columns = x.shape
    height = 16 if tile else 1
    blocks = x.reshape(rows // height, height, columns // 16, 16)
    whole = np.abs(x).max()
    s = f(6 * 256) / whole
    amax = np.abs(blocks).max((1, 3), keepdims=True)
    base = amax / f(6) * s
    found = []
    for factor in (f(1.5), f(1)):
        scale = nearest(base * factor, E4M3)
        q = nearest((blocks * (f(1) / (scale * (f(1) / s)))).clip(-6, 6), E2M1)
        difference = q * scale * whole / f(6 * 256) - blocks
        terms = np.abs(difference) if rule == "mae" else difference * difference
        error = np.zeros_like(terms[..., 0])
        for i in range(16):
            error = error + terms[..., i]
        while error.shape[1] > 1:
            half = error.shape[1] // 2
            error = error[:, :half] + error[:, half:]
        found.append((error, q * scale / s))
    is_four = (found[0][0] < found[1][0])[..., None]
    result = np.where(is_four, found[0][1], found[1][1])
    return result.reshape(x.shape), np.broadcast_to(is_four, blocks.shape).reshape(x.shape)


def numbers(seed: int) -> np.ndarray:
    """A matrix of tiles of different magnitudes."""
    random = np.random.default_rng(seed)
    tiles = 2.0 ** random.integers(-4, 4, (6, 1, 4, 1))
    return (random.standard_normal((6, 16, 4, 16)) * tiles).reshape(96, 64).astype(np.float32)


@pytest.mark.parametrize("rule", ["mae", "mse"])
def test_the_block_has_the_scale_with_the_smaller_error(rule: str) -> None:
    x = numbers(0)
    chosen = []
    for tile, scale in ((False, f"nv:{rule}"), (True, f"nv:16x16:{rule}")):
        wanted, is_four = four_over_six(x, rule, tile)
        for dtype in (torch.float32, torch.float64):
            got = fpsim.round(torch.tensor(x, dtype=dtype), f"e2m1fn/{scale}")
            assert torch.equal(got.float(), torch.tensor(wanted))
        chosen.append(is_four.mean())
    assert all(0 < share < 1 for share in chosen)


def test_the_rules_differ_where_one_error_is_large() -> None:
    x = numbers(1)
    of = {rule: four_over_six(x, rule, False)[1][:, ::16] for rule in ("mae", "mse")}
    assert 0 < (of["mae"] != of["mse"]).mean() < 0.5
    assert not torch.equal(fpsim.round(torch.tensor(x), "e2m1fn/nv:mae"), fpsim.round(torch.tensor(x), "e2m1fn/nv:mse"))


def test_both_orientations_of_a_tile_have_the_same_codes() -> None:
    """The sum of errors runs along the rows of the tensor first, whatever the axis: here the order decides.

    0.5 has the error 0.25 under 4, and 0.75 has it under 6. The errors 2^-28 are lost beside 0.25 in their row, which
    is that of 0.5. In the transposed tensor they add up first, and both sums are equal.
    """
    x = torch.zeros(16, 16)
    x[0, :2], x[0, 2:], x[1, 1] = torch.tensor([6.0, 0.5]), 2.0**-28, 0.75
    for axis in (0, 1):
        assert fpsim.round(x, "e2m1fn/nv:16x16:mae", axis=axis)[:2, 1].tolist() == [0.75, 0.75]
        assert fpsim.round(x.T.contiguous(), "e2m1fn/nv:16x16:mae", axis=axis)[1, :2].tolist() == [0.5, 1.0]
    compiled = torch.compile(lambda x: fpsim.round(x, "e2m1fn/nv:16x16:mae", axis=0))
    assert compiled(x)[:2, 1].tolist() == [0.75, 0.75]
    tile = reference.round_blocks(x.flatten().tolist(), "e2m1fn/nv:16x16:mae", (16, 16), 0)
    assert (tile[1], tile[17]) == (Fraction(3, 4), Fraction(3, 4))


def test_examples_of_the_definition() -> None:
    """A maximum of 40 with the scale 6.5 loses 30; with 10 nothing. Equal errors take the scale of 6."""
    tens = [10, 20, 30, 40]
    for rule in ("mae", "mse"):
        block = quantize_block(tens, "e2m1fn", f"nv:{rule}", tensor_amax=1536)
        assert (block.scale, block.tensor_scale, block.elements, block.decoded()) == (10, 1, (1, 2, 3, 4), tuple(tens))
        assert quantize_block([6, Fraction(1, 2)], "e2m1fn", f"nv:{rule}", tensor_amax=1536).scale == 1
        assert quantize_block([6, 3, Fraction(3, 2)], "e2m1fn", f"nv:{rule}", tensor_amax=1536).scale == 1
    x = torch.zeros(2, 16)
    x[0, :4], x[1, 0] = torch.tensor([10.0, 20.0, 30.0, 40.0]), 1536.0
    assert torch.equal(fpsim.round(x, "e2m1fn/nv:mse"), x)
    assert fpsim.round(x, "e2m1fn/nv")[0, :4].tolist() != x[0, :4].tolist()


def test_an_infinity_or_nan_in_a_tensor_takes_the_scale_of_6() -> None:
    x = torch.zeros(2, 16)
    x[0, :4] = torch.tensor([10.0, 20.0, 30.0, 40.0])
    for special in (torch.inf, torch.nan):
        x[1, 0] = special
        assert fpsim.round(x, "e2m1fn/nv:mse")[0, :4].tolist() == [9.75, 19.5, 26.0, 39.0]


def test_weights_rounded_after_training_have_these_scales() -> None:
    """By the code that rounds column by column."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 96))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(numbers(3)))
    round_weights(model, "e2m1fn/nv:mse", method="nearest")
    assert torch.equal(model[0].weight, torch.tensor(four_over_six(numbers(3), "mse", False)[0]))
