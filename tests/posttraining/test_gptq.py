"""GPTQ against the Optimal Brain Surgeon's definition: column by column, with a dense inverse in 50 digits."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

import fpsim
from fpsim.posttraining import gptq, input_hessians, power_of_two_ratios, power_of_two_scales, round_weights
from tests.shared.plain_numbers import ratio_of, to_e2m1, to_integers

ROWS, COLUMNS = 5, 12
#: A function of the columns of a group as they are when it starts. It gives the function that rounds one column.
Rounder = Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]


def int4(group: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    ratio = ratio_of(group, 7)[:, 0]
    return lambda column: to_integers(column, ratio, 7)


def mxfp4(group: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    scale = np.exp2(np.ceil(np.log2(np.abs(group).max(1).astype(float) / 6)))
    return lambda column: to_e2m1(column / scale) * scale


def e2m1_m2(group: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Ratios amax / 6, each a power of two below the largest of its two rows."""
    ratio = ratio_of(group, 6)[:, 0]
    for first in range(0, ROWS, 2):
        part = ratio[first : first + 2]
        part[:] = [part.max() / np.float32(2 ** math.ceil(math.log2(float(part.max()) / float(d)))) for d in part]
    return lambda column: to_e2m1(column / ratio).astype(np.float32) * ratio


def e4m3(group: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    def round_column(column: np.ndarray) -> np.ndarray:
        step = np.exp2(np.maximum(np.floor(np.log2(np.abs(column))), -6) - 3)
        return np.rint(column / step) * step

    return round_column


def surgeon(
    weight: np.ndarray, hessian: np.ndarray, rounder: Rounder, width: int, damping: float, by_activation: bool
) -> np.ndarray:
    """The rounded weight: each error is spread over the columns to come by the inverse Hessian of what remains."""
    diagonal = np.diag(hessian)
    order = sorted(range(COLUMNS), key=lambda j: -diagonal[j]) if by_activation else list(range(COLUMNS))
    rounders: dict[int, Callable[[np.ndarray], np.ndarray]] = {}
    with mpmath.workdps(50):
        matrix = mpmath.matrix(hessian.tolist()) + mpmath.eye(COLUMNS) * (damping * diagonal.sum() / COLUMNS)
        work = [[mpmath.mpf(float(x)) for x in row] for row in weight]
        result = np.zeros_like(weight)
        for k, j in enumerate(order):
            now = np.array([[float(x) for x in row] for row in work]).astype(np.float32)
            group = j // width
            rounders.setdefault(group, rounder(now[:, group * width : (group + 1) * width]))
            result[:, j] = rounders[group](now[:, j])
            remaining = order[k:]
            inverse = mpmath.matrix([[matrix[a, b] for b in remaining] for a in remaining]) ** -1
            for i in range(ROWS):
                error = (work[i][j] - mpmath.mpf(float(result[i, j]))) / inverse[0, 0]
                for position, other in enumerate(remaining):
                    work[i][other] -= error * inverse[0, position]
    return result


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(40, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    inputs = inputs.double()
    return torch.randn(ROWS, COLUMNS, generator=generator), 2 * inputs.T @ inputs


@pytest.mark.parametrize("order", ["given", "activation"])
@pytest.mark.parametrize(
    ("cast", "rounder", "width", "constraint"),
    [
        ("int4/block:4", int4, 4, None),
        ("int4/row", int4, COLUMNS, None),
        ("int4/group:6", int4, 6, None),
        ("e2m1fn/mx:4", mxfp4, 4, None),
        ("e2m1fn/block:5", e2m1_m2, 5, lambda ratios: power_of_two_ratios(ratios, 2)),
        ("e4m3fn", e4m3, COLUMNS, None),
    ],
)
def test_gptq_is_the_surgeons_definition(cast, rounder, width, constraint, order, layer) -> None:
    weight, hessian = layer
    want = surgeon(weight.numpy(), hessian.numpy(), rounder, width, 0.01, order == "activation")
    for block in (1, 5, 128):
        got = gptq(weight, hessian, cast, block=block, order=order, constraint=constraint)
        assert np.array_equal(got.numpy(), want), block
    assert not torch.equal(got, torch.from_numpy(rounder(weight.numpy())(weight.numpy().T[0])))


@pytest.mark.parametrize(
    "cast",
    [
        "int4/block:32", "nf4/group:32", "nf4/group:32:double", "mxfp4", "e2m1fn/row", "nvfp4", "e2m1fn/nv:torchao",
        "e2m1fn/nv:16x16", "uint4/block:16:asymmetric", "e4m3fn", "e4m3fn/power_of_two", "int8/tensor", "int4/column",
        "e4m3fn/block:16x40", "int3/group:192", "e5m2/up", "int8/group:32:bf16", "int8/row:encode", "int8/channel",
        "uint4/row:range",
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_with_a_diagonal_hessian_gptq_is_plain_rounding(cast: str, dtype: torch.dtype) -> None:
    """Every kind of scale; some inputs are always zero; the last group of columns is short."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator).to(dtype)
    weight[3] = 0
    diagonal = torch.rand(96, generator=generator).clamp_min(0.2) - 0.2
    for order in ("given", "activation"):
        got = gptq(weight, torch.diag(diagonal), cast, order=order, block=20)
        assert got.dtype == dtype and torch.equal(got, fpsim.round(weight, cast))


def test_the_error_of_the_outputs_is_smaller_than_that_of_plain_rounding(layer) -> None:
    weight, hessian = layer
    errors = [
        ((rounded - weight).double() @ hessian @ (rounded - weight).double().T).trace()
        for rounded in (gptq(weight, hessian, "int4/block:4"), fpsim.round(weight, "int4/block:4"))
    ]
    assert errors[0] < 0.8 * errors[1]


class TestConstraints:
    def test_m1_and_m2_are_their_formulas(self) -> None:
        ratios = torch.tensor([[0.3, 0.5], [3.0, 1.0], [0.75, 0.0], [2.0**-20, 1.5]])
        assert power_of_two_scales(ratios).tolist() == [[0.5, 0.5], [4.0, 1.0], [1.0, 1.0], [2.0**-20, 2.0]]
        m2 = power_of_two_ratios(ratios).tolist()
        assert m2 == [[0.1875, 0.375], [3.0, 0.75], [0.75, 3.0], [3.0 * 2.0**-22, 1.5]]
        up = power_of_two_ratios(ratios, up=True).tolist()
        assert up == [[0.375, 0.75], [3.0, 1.5], [0.75, 3.0], [3.0 * 2.0**-21, 1.5]]
        assert power_of_two_ratios(ratios, 1).tolist() == [
            [0.25, 0.5],
            [3.0, 0.75],
            [0.75, 0.75],
            [1.5 * 2.0**-21, 1.5],
        ]

    def test_fp4_values_with_power_of_two_scales_are_fp8_values(self) -> None:
        """The cast from FP4 to FP8 is exact: M1's scales, and under M2 the ratios to the largest scale."""
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        for exponent in range(-8, 7):
            scaled = values * 2.0**exponent
            assert torch.equal(fpsim.round(scaled, "e4m3fn"), scaled), exponent
        weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(2)) * torch.logspace(-1, 1, 64)
        hessian = torch.eye(64)
        m1 = gptq(weight, hessian, "e2m1fn/block:16", constraint=power_of_two_scales)
        assert torch.equal(m1, fpsim.round(weight, "e2m1fn/block:16:rceil"))
        assert torch.equal(fpsim.round(m1, "e4m3fn"), m1)
        m2 = gptq(weight.double(), hessian, "e2m1fn/block:16", constraint=power_of_two_ratios)  # a ratio times a value
        largest = weight.abs().unflatten(1, (4, 16)).amax(2).amax(0) / 6  # the scale of each compute block
        relative = m2 / largest.double().repeat_interleave(16)
        assert torch.equal(fpsim.round(relative, "e4m3fn"), relative) and relative.unique().numel() > 16


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"cast": "none"}, "rounds nothing"),
            ({"cast": "int4/row/stochastic"}, "nearest values"),
            ({"cast": "nvfp4/hadamard:16"}, "mixes them"),
            ({"cast": "e4m3fn/tensor/history:4"}, "keeps no state"),
            ({"cast": "nf4/group:8"}, "within its rows of 12: use block:8"),
            ({"cast": "e4m3fn", "constraint": power_of_two_scales}, "has none"),
            ({"hessian": torch.eye(11)}, r"shape \(12, 12\), got \(11, 11\)"),
            ({"hessian": torch.eye(12) - 2}, "symmetric, with a diagonal of 0 or more"),
            ({"hessian": torch.full((12, 12), math.nan)}, "NaN"),
            ({"hessian": torch.ones(12, 12), "damping": 0.0}, "larger damping such as 0.01"),
            ({"weight": torch.full((2, 12), math.inf)}, "infinity"),
            ({"weight": torch.zeros(2, 3, 4)}, "matrix"),
            ({"damping": -1.0}, "damping"),
            ({"block": 0}, "block"),
            ({"order": "random"}, "given, activation"),
        ],
    )
    def test_wrong_arguments_are_named(self, changes, message) -> None:
        arguments = {"weight": torch.ones(2, 12), "hessian": torch.eye(12), "cast": "int4/row", **changes}
        with pytest.raises(ValueError, match=message):
            gptq(**arguments)

    def test_wrong_types_are_named(self) -> None:
        with pytest.raises(TypeError, match="float64 or float32"):
            gptq(torch.ones(2, 2), torch.eye(2, dtype=torch.int32), "int4/row")
        with pytest.raises(TypeError, match="float32 tensor"):
            power_of_two_scales(torch.ones(2, dtype=torch.float64))
        with pytest.raises(ValueError, match="positive or 0"):
            power_of_two_scales(-torch.ones(2))


class TwoLayers(nn.Module):
    """Two layers with one input, and a third one behind them that is GPT-2's."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), Conv1D(4, 8)

    def forward(self, x: torch.Tensor, *, factor: float = 1.0) -> torch.Tensor:
        return self.c(torch.relu(self.a(x)) * self.b(x) * factor)


@pytest.fixture
def model() -> TwoLayers:
    torch.manual_seed(0)
    return TwoLayers().double()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, 5, 6, generator=generator).double() for _ in range(3)]


class TestModels:
    def test_hessians_are_sums_over_all_rows_of_all_batches(self, model: TwoLayers) -> None:
        x = torch.cat(batches()).reshape(-1, 6)
        got = input_hessians(model, [{"x": batches()[0], "factor": 1.0}, (batches()[1],), batches()[2]])
        assert list(got) == ["a", "b", "c"] and model.training
        inner = torch.relu(model.a(x)) * model.b(x)
        for path, rows in {"a": x, "b": x, "c": inner}.items():
            want = sum(2 * torch.outer(row, row) for row in rows.detach())
            torch.testing.assert_close(got[path], want, rtol=1e-12, atol=1e-12)
        single = input_hessians(model, batches(), skip=["b", "c"], dtype=torch.float32)
        assert single["a"].dtype == torch.float32 and list(single) == ["a"]

    @pytest.mark.parametrize("sequential", [True, False])
    def test_all_weights_are_rounded_from_the_inputs_that_reach_them(self, model: TwoLayers, sequential: bool) -> None:
        x = torch.cat(batches()).reshape(-1, 6)
        a, b, c = model.a.weight.clone(), model.b.weight.clone(), model.c.weight.T.clone()
        inner = torch.relu(model.a(x)) * model.b(x)
        round_weights(model, {"c": "int4/row", "*": "int4/block:3"}, batches(), sequential=sequential)
        first = 2 * x.T @ x
        assert torch.equal(model.a.weight, gptq(a, first, "int4/block:3"))
        assert torch.equal(model.b.weight, gptq(b, first, "int4/block:3"))
        if sequential:
            inner = torch.relu(model.a(x)) * model.b(x)
        second = 2 * inner.T @ inner
        assert torch.equal(model.c.weight.T, gptq(c, second.detach(), "int4/row"))

    def test_to_the_nearest_rounds_along_the_inputs(self, model: TwoLayers) -> None:
        weights = {path: module.weight.clone() for path, module in model.named_children()}
        round_weights(model, "int4/row", method="nearest", skip="b")
        assert torch.equal(model.a.weight, fpsim.round(weights["a"], "int4/row"))
        assert torch.equal(model.b.weight, weights["b"])
        assert torch.equal(model.c.weight, fpsim.round(weights["c"], "int4/row", axis=0))

    def test_what_cannot_be_rounded_is_named(self, model: TwoLayers) -> None:
        with pytest.raises(ValueError, match="needs batches"):
            round_weights(model, "int4/row")
        with pytest.raises(ValueError, match="read only once"):
            round_weights(model, "int4/row", iter(batches()))
        with pytest.raises(ValueError, match="no batch"):
            round_weights(model, "int4/row", [])
        with pytest.raises(ValueError, match="'d' matches no linear layer"):
            round_weights(model, {"d": "int4/row"}, batches())
        with pytest.raises(ValueError, match="skip='d' matches no module"):
            round_weights(model, "int4/row", batches(), skip="d")
        model.a.weight = model.b.weight
        with pytest.raises(ValueError, match=r"a\.weight and b\.weight are one parameter"):
            round_weights(model, "int4/row", batches())
        with pytest.raises(ValueError, match="the weight of 0 is computed"):
            round_weights(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))), "int4/row", [])
        attention = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        with pytest.raises(ValueError, match=r"no batch reaches self_attn\.out_proj"):
            input_hessians(attention, [torch.randn(1, 2, 8)])
