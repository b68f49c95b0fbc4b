"""Scaled casts wherever a format may stand: derivatives, transforms, parameters, optimizers, hooks for gradients.

The expected numbers are those of the exact reference.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fpsim
from fpsim import reference
from fpsim.rounding.ops import SOURCE
from fpsim.scaling.ops import outer_scale_op

CASTS = ("mxfp8", "nvfp4", "int4", "e4m3fn/group:24", "e4m3fn/column", "dynamic8", "nf4/group:8:double")


def rounded(x: Tensor, cast: str, axis: int = -1) -> Tensor:
    values = reference.round_blocks(x.detach().flatten().tolist(), cast, tuple(x.shape), axis)
    return torch.tensor([reference.to_float(value) for value in values], dtype=torch.float64).to(x.dtype).view(x.shape)


@pytest.mark.parametrize("cast", CASTS)
def test_the_derivative_is_straight_through(cast: str) -> None:
    x = torch.randn(3, 40, requires_grad=True)
    weights = torch.randn(3, 40)
    y = fpsim.round(x, cast)
    (y * weights).sum().backward()
    assert torch.equal(y, rounded(x, cast)) and torch.equal(x.grad, weights)
    gradient = torch.func.grad(lambda x: fpsim.round(x, cast).square().sum())(x.detach())
    assert torch.equal(gradient, 2 * rounded(x, cast))


@pytest.mark.parametrize("cast", ["mxfp8", "nvfp4", "e4m3fn/tensor"])
def test_under_vmap_each_sample_has_its_own_scales(cast: str) -> None:
    xs = torch.randn(3, 5, 40) * torch.tensor([1.0, 100.0, 1e-5]).view(3, 1, 1)
    expected = torch.stack([rounded(x, cast) for x in xs])
    assert torch.equal(torch.vmap(lambda x: fpsim.round(x, cast))(xs), expected)
    assert torch.equal(torch.vmap(lambda x: fpsim.round(x, cast), in_dims=1)(xs.transpose(0, 1)), expected)


def test_under_vmap_with_one_seed_each_sample_has_its_own_draws() -> None:
    xs = torch.full((4, 32), 1.1)
    together = torch.vmap(lambda x: fpsim.round(x, "mxfp4", rounding="stochastic", seed=7))(xs)
    assert torch.equal(together, fpsim.round(xs, "mxfp4", rounding="stochastic", seed=7))
    assert len({tuple(row) for row in together.tolist()}) == 4


def test_the_outer_scale_is_a_quotient_in_the_working_dtype() -> None:
    """With values, without data, under vmap, and without elements, where it is one."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        working = torch.float64 if dtype == torch.float64 else torch.float32
        x = torch.tensor([[3.5, -7.0, 2.0], [0.5, 1.75, -1.0]], dtype=dtype)
        largest = np.float32([7.0, 1.75]) / np.float32(127)
        wanted = {"row": torch.from_numpy(largest).to(working)[:, None], "tensor": torch.tensor(largest[0]).to(working)}
        for scale, want in wanted.items():
            got = outer_scale_op(x, "int8", scale, [1], SOURCE)
            assert got.dtype == working and torch.equal(got, want)
            without_data = outer_scale_op(x.to("meta"), "int8", scale, [1], SOURCE)
            assert (without_data.dtype, without_data.shape) == (working, want.shape)
            empty = outer_scale_op(x[:, :0], "int8", scale, [1], SOURCE)
            assert empty.dtype == working and torch.equal(empty, torch.ones_like(want))
        by_column = torch.vmap(lambda row: outer_scale_op(row, "int8", "tensor", [0], SOURCE), in_dims=1)(x.T)
        assert by_column.dtype == working and torch.equal(by_column, wanted["row"][:, 0])


@pytest.mark.parametrize(
    ("format", "given", "message"),
    [
        ("mxfp8", {"scale": "row"}, "names scale 'mx:32:rceil': leave out scale='row:fp32'"),
        ("e4m3fn/up", {"rounding": "down"}, "names rounding 'up': leave out rounding='down'"),
        ("e5m2/ovf_inf", {"overflow": "sat_finite"}, "names overflow 'ovf_inf': leave out overflow='sat_finite'"),
        ("int8/unscaled", {"scale": "row"}, "names scale 'None': leave out scale='row:fp32'"),
    ],
)
def test_an_argument_that_a_format_overrides_is_an_error(format: str, given: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fpsim.round(torch.ones(2, 3), format, **given)


def test_an_argument_that_a_format_repeats_is_none() -> None:
    x = torch.randn(2, 40)
    assert torch.equal(fpsim.round(x, "mxfp8/up", rounding="up", scale="mx"), rounded(x, "mxfp8/up"))


@pytest.fixture
def subnormals_kept() -> Iterator[None]:
    """Code that is compiled for unsafe mathematics sets the flag that flushes subnormals when it is loaded."""
    yield
    torch.set_flush_denormal(False)


@pytest.mark.usefixtures("subnormals_kept")
def test_ratios_are_refused_where_divisions_are_inexact() -> None:
    options = {"cpp.enable_unsafe_math_opt_flag": True}
    for cast in ("int8", "nvfp4"):
        torch._dynamo.reset()
        with pytest.raises(Exception, match="needs divisions as IEEE 754 rounds them"):
            torch.compile(lambda x, cast=cast: fpsim.round(x, cast), options=options)(torch.randn(2, 40))
    torch._dynamo.reset()
    x = torch.randn(2, 40)
    assert torch.equal(torch.compile(lambda x: fpsim.round(x, "mxfp8"), options=options)(x), rounded(x, "mxfp8"))


#: Every rule of a scale, and every form of the sets of elements that share one.
OF_SIXTEEN_BITS = (
    "e4m3fn/power_of_two", "e4m3fn/mx:4", "e2m1fn/mx:2x4:even", "e4m3fn/row:ceil", "e5m2/tensor:floor",
    "e4m3fn/tensor", "e4m3fn/tensor:encode", "e5m2/column", "int8/channel", "int4/block:4x8:bf16",
    "nf4/group:16:double", "uint4/group:16:asymmetric", "int8/tensor:range", "nvfp4", "e2m1fn/nv:16x16:torchao",
)  # fmt: skip


def test_compiled_code_scales_the_sixteen_bit_numbers_that_eager_code_has() -> None:
    """Plain Inductor goes on with results of 16 bits in float32, unrounded. A scale of these numbers is another one."""
    torch.manual_seed(0)
    x = torch.randn(32, 64).bfloat16()

    def roundings(x: Tensor) -> list[Tensor]:
        return [fpsim.round(x * (1 + (i + 1) / 64), cast) for i, cast in enumerate(OF_SIXTEEN_BITS)]

    for cast, got, want in zip(OF_SIXTEEN_BITS, torch.compile(roundings)(x), roundings(x), strict=True):
        assert torch.equal(got, want), cast
    with pytest.raises(Exception, match="scaled rounding of float16 tensors would overflow: convert them to bfloat16"):
        torch.compile(lambda x: fpsim.round(x * 2, "e4m3fn/tensor"))(x.half())


@pytest.mark.parametrize("cast", CASTS)
def test_parameters(cast: str) -> None:
    layer = nn.Linear(40, 6)
    expected = {"weight": rounded(layer.weight, cast), "bias": layer.bias.detach().clone()}
    fpsim.round_parameters(layer, {"weight": cast})
    assert all(torch.equal(parameter, expected[name]) for name, parameter in layer.named_parameters())


@pytest.mark.parametrize("cast", ["mxfp8", "e4m3fn/group:24", "int8"])
@pytest.mark.parametrize("compiled", [False, True])
def test_optimizer_states(cast: str, compiled: bool) -> None:
    p = nn.Parameter(torch.randn(5, 40))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    fpsim.round_optimizer(optimizer, {"momentum_buffer": cast}, compiled=compiled)
    buffer = torch.zeros(5, 40)
    for _ in range(2):
        p.grad = torch.randn(5, 40)
        buffer = rounded(buffer * 0.9 + p.grad, cast)
        optimizer.step()
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffer)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("dynamic8", "dynamic8:unsigned"),
        ("dynamic4", "linear4:unsigned"),
        ("mxfp8", "nvfp4"),
        ("nf4/group:64:double", "uint8/group:32:asymmetric"),
    ],
)
def test_the_states_of_adam(first: str, second: str) -> None:
    """The step uses the states as they were rounded after the last one. A parameter may be a number."""
    p, number = nn.Parameter(torch.randn(6, 50)), nn.Parameter(torch.tensor(1.5))
    optimizer = torch.optim.Adam([p, number], foreach=False, betas=(0.9, 0.99))
    fpsim.round_optimizer(optimizer, {"exp_avg": first, "exp_avg_sq": second}, compiled=False)
    mean, square = torch.zeros(6, 50), torch.zeros(6, 50)
    for _ in range(2):
        p.grad, number.grad = torch.randn(6, 50), torch.tensor(0.5)
        mean = rounded(mean.lerp(p.grad, 1 - 0.9), first)
        square = rounded((square * 0.99).addcmul(p.grad, p.grad, value=1 - 0.99), second)
        optimizer.step()
        state = optimizer.state[p]
        assert torch.equal(state["exp_avg"], mean) and torch.equal(state["exp_avg_sq"], square)


def test_fused_optimizers_round_along_the_axes_of_the_state() -> None:
    """The compiled step sees a state as vectors of 16, whose blocks would be others. All sums here are exact."""
    p = nn.Parameter(torch.zeros(1024, 80))
    optimizer = torch.optim.SGD([p], lr=0.5, momentum=0.5, fused=True)
    fpsim.round_optimizer(optimizer, {"momentum_buffer": "mxfp4"}, compiled=True)
    sizes = torch.tensor([1.0, 64.0]).repeat_interleave(16).repeat(3)[:80]  # two magnitudes in a block of 32
    generator, buffer = torch.Generator().manual_seed(0), torch.zeros(1024, 80)
    for _ in range(2):
        p.grad = torch.randint(-8, 9, (1024, 80), generator=generator) * sizes
        exact = buffer * 0.5 + p.grad
        buffer = fpsim.round(exact, "mxfp4")
        assert torch.equal(buffer[:3], rounded(exact[:3], "mxfp4"))
        optimizer.step()
        assert torch.equal(optimizer.state[p]["momentum_buffer"], buffer)
