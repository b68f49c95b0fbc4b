"""Casts of the recipes on numbers whose results are published or computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

import fpsim
from fpsim import recipes
from fpsim.recipes import Recipe

INFINITY = math.inf


def rounded(recipe: Recipe, kind: str, role: str, values: list[float]) -> list[float]:
    """Numbers along the summed axis, rounded by the cast of an operand."""
    assert recipe.policy is not None
    cast = recipe.policy.cast(kind, role)
    assert cast is not None
    return fpsim.round(torch.tensor(values), str(cast)).tolist()


def test_the_rule_of_mxfp8_decides_about_the_largest_element() -> None:
    """microxcaling#4: 957 saturates to 448 under the scale 2 of the specification, and is 480 under the scale 4."""
    assert rounded(recipes.mxfp8(rule="floor"), "fprop", "weight", [957.0, 1.0]) == [896.0, 1.0]
    assert rounded(recipes.mxfp8(), "fprop", "weight", [957.0, 1.0]) == [960.0, 1.0]
    # ao#2035: amax 150 has the E8M0 code 126 under rceil, and 127 under ceil.
    codes = {rule: fpsim.encode_blocks(torch.tensor([150.0]), f"e4m3fn/mx:32:{rule}")[1] for rule in ("rceil", "ceil")}
    assert {rule: code.tolist() for rule, code in codes.items()} == {"rceil": [126], "ceil": [127]}


def test_a_power_of_two_for_amax_1_is_256() -> None:
    """The largest magnitude becomes 256. A half of the unit below 1/16 is a tie, 2^-5 of 2^-4."""
    half_unit = 2.0**-8 / 256 / 4  # between 0 and the least value 2^-9, times 256
    recipe = recipes.te_current(power_of_two=True)
    assert rounded(recipe, "fprop", "activation", [1.0, 3 * half_unit, half_unit]) == [1.0, 4 * half_unit, 0.0]


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([0.0] * 16, [0.0] * 16),
        ([0.0] * 16 + [6.0], [0.0] * 16 + [6.0]),
        # The scale of a tensor with an infinity is 1, that of the block 448: the infinity counts as 6.
        ([INFINITY, 300.0, 100.0], [2688.0, 224.0, 0.0]),
        ([-INFINITY] + [0.0] * 15 + [3.0], [-2688.0] + [0.0] * 15 + [3.0]),
        # A tensor below 2^-126 counts as zeros.
        ([1e-38, -1e-38], [0.0, 0.0]),
        # Ties go to even: 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5 under the scale 1.
        ([6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]),
    ],
)
def test_blocks_of_nvfp4(values: list[float], want: list[float]) -> None:
    assert rounded(recipes.nvfp4(), "fprop", "activation", values) == want


def test_an_infinity_leaves_the_rest_of_a_tensor_alone_under_current_scaling() -> None:
    """Transformer Engine: the factor is 1, and the infinity saturates. So is it for zeros."""
    assert rounded(recipes.te_current(), "dgrad", "gradient", [INFINITY, 1.5, 0.3]) == [57344.0, 1.5, 0.3125]
    assert rounded(recipes.te_current(), "dgrad", "gradient", [0.0, -0.0]) == [0.0, 0.0]
    # 448 and 448/3 of amax 3, whose factor is RN(448/3) and whose reciprocal is not RN(3/448).
    s = torch.tensor(448.0) / 3
    assert rounded(recipes.te_current(), "fprop", "weight", [3.0, 1.0]) == [
        (448 * (1 / s)).item(),
        (144 * (1 / s)).item(),
    ]


def test_integers_of_switchback_reach_127() -> None:
    assert rounded(recipes.switchback(), "fprop", "weight", [127.0, -127.0, 0.5, 1.5, 63.49]) == [127, -127, 0, 2, 63]


def test_dynamic_fixed_point_has_one_exponent_in_a_tensor() -> None:
    """amax 32767 has the step 1, amax 32768 the step 2."""
    assert rounded(recipes.dfp16(), "wgrad", "activation", [32767.0, 0.5, 1.5]) == [32767.0, 0.0, 2.0]
    assert rounded(recipes.dfp16(), "wgrad", "activation", [32768.0, 1.0, 3.0]) == [32768.0, 0.0, 4.0]


def test_the_longest_chain_cannot_overflow() -> None:
    sums = {bits: recipes.dfp16(bits=bits).policy.to_dict()["accumulator"] for bits in (16, 14, 13)}  # type: ignore
    assert {bits: int(text.rpartition("=")[2]) for bits, text in sums.items()} == {16: 2, 14: 32, 13: 128}
    with pytest.raises(ValueError, match=r"a chain of 3 products of int16 may overflow: use 1 to 2"):
        recipes.dfp16(chain=3)
