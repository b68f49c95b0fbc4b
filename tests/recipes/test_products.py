"""The products of one linear layer under each recipe, bit for bit those of the source's formulas in plain torch.

The formulas below share nothing with fpsim. Casts to 8-bit floating point and to bfloat16 are torch's, those to 4 bits
and to integers are written out. A formula gives the codes of an operand and its scales; products of codes are
`torch.mm` in float32, as the recipes' are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fpsim import recipes
from fpsim.policy import Policy

TOKENS, INPUTS, OUTPUTS = 160, 128, 96
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


# -- formulas of the sources -------------------------------------------------------------------------------------------


def fp8(x: Tensor, dtype: torch.dtype) -> Tensor:
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).float()


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def amax(x: Tensor, axis: int | None = None) -> Tensor:
    return x.abs().amax() if axis is None else x.abs().amax(axis, keepdim=True)


def encode_scale(largest: float, a: Tensor) -> Tensor:
    """max / amax in float32, 1 for zeros."""
    return torch.where(a == 0, 1.0, torch.tensor(largest) / a)


def floor_power_of_two(s: Tensor) -> Tensor:
    return (s.view(torch.int32) & 0x7F800000).view(torch.float32)


def scaled_fp8(x: Tensor, dtype: torch.dtype, axis: int | None, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """The codes of a tensor or of its rows, and the factors that multiply the result."""
    s = encode_scale(torch.finfo(dtype).max, amax(x, axis))
    s = floor_power_of_two(s) if power_of_two else s
    return fp8(x * s, dtype), 1 / s


def scaled_int(x: Tensor, bits: int, axis: int | None, rounded: Callable[[Tensor], Tensor] = torch.round) -> Any:
    largest = 2 ** (bits - 1) - 1
    s = encode_scale(largest, amax(x, axis))
    return rounded(x * s).clamp(-largest, largest), 1 / s


def in_blocks(x: Tensor, axis: int, size: int, f: Callable[[Tensor], Tensor]) -> Tensor:
    """``f`` of each block of ``size`` elements along an axis, blocks in rows; zeros fill the last one."""
    rows = x.movedim(axis, -1)
    padded = nn.functional.pad(rows, (0, -rows.shape[-1] % size))
    blocks = f(padded.reshape(-1, size)).reshape(padded.shape)
    return blocks[..., : rows.shape[-1]].movedim(-1, axis)


def in_tiles(x: Tensor, size: int, f: Callable[[Tensor], Tensor]) -> Tensor:
    height, width = x.shape
    padded = nn.functional.pad(x, (0, -width % size, 0, -height % size))
    tiles = padded.unfold(0, size, size).unfold(1, size, size)
    rows = f(tiles.reshape(-1, size * size)).reshape(tiles.shape)
    return rows.movedim(2, 1).reshape(padded.shape)[:height, :width]


def e8m0_block(rows: Tensor) -> Tensor:
    """MXFP8: the scale is the least power of two under which amax is at most 448 (RCEIL)."""
    a = amax(rows, -1).double()
    k = torch.where(a == 0, -127.0, torch.ceil(torch.log2(a.clamp(min=2.0**-140) / 448))).clamp(-127, 127)
    scale = torch.exp2(k)
    return (fp8((rows.double() / scale).float(), E4M3).double() * scale).float()


def e2m1(x: Tensor) -> Tensor:
    """Nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with ties as in Transformer Engine's reference."""
    m = x.abs()
    q = torch.zeros_like(m)
    for above, includes, value in (
        (0.25, False, 0.5), (0.75, True, 1.0), (1.25, False, 1.5), (1.75, True, 2.0), (2.5, False, 3.0),
        (3.5, True, 4.0), (5.0, False, 6.0),
    ):  # fmt: skip
        q = torch.where((m >= above) if includes else (m > above), value, q)
    return torch.copysign(q, x)


def nvfp4_codes(x: Tensor, arranged: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> tuple[Tensor, Tensor]:
    """Codes times block scales, and the factor 1/S that multiplies the result."""
    total = amax(x)
    s = torch.tensor(2688.0) / total if total > 0 else torch.tensor(1.0)
    s = s.clamp(max=torch.finfo(torch.float32).max)
    sixth = torch.tensor(1.0) / 6.0

    def block(rows: Tensor) -> Tensor:
        b = fp8(amax(rows, -1) * (s * sixth), E4M3)
        q = (1 / (b * (1 / s))).clamp(max=torch.finfo(torch.float32).max)
        return e2m1((rows * q).clamp(-6, 6)) * b

    return arranged(block), 1 / s


def hadamard(x: Tensor, axis: int, size: int, signs: str = "") -> Tensor:
    """Blocks rotated: Sylvester's matrix by butterflies, then 1/sqrt(size)."""

    def rotate(rows: Tensor) -> Tensor:
        y = rows * torch.tensor([-1.0 if sign == "-" else 1.0 for sign in signs]) if signs else rows
        h = 1
        while h < size:
            a, b = y.reshape(-1, size // (2 * h), 2, h).unbind(2)
            y = torch.stack([a + b, a - b], 2).reshape(-1, size)
            h *= 2
        return y * torch.tensor(float(size) ** -0.5)

    return in_blocks(x, axis, size, rotate)


def product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """The product of codes times the factors of rows and columns: one factor in all if both are of whole tensors."""
    codes, (s, t) = a[0] @ b[0], (a[1], b[1])
    return codes * (s * t) if s.numel() == t.numel() == 1 else codes * s * t


def plain(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.ones(())


def transposed(codes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return codes[0].t(), codes[1].t() if codes[1].dim() == 2 else codes[1]


# -- the recipes: fprop, dgrad and wgrad of y = x w^T with the gradient g ----------------------------------------------

Products = tuple[Tensor, Tensor, Tensor]


def of_tensors(x: Tensor, w: Tensor, g: Tensor, cast: Callable[[Tensor, str], tuple[Tensor, Tensor]]) -> Products:
    """All products of tensors that are rounded once."""
    qx, qw, qg = cast(x, "activation"), cast(w, "weight"), cast(g, "gradient")
    return product(qx, transposed(qw)), product(qg, qw), product(transposed(qg), qx)


def amp(round: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Products]:
    return lambda x, w, g: tuple(map(round, of_tensors(x, w, g, lambda t, role: plain(round(t)))))  # type: ignore


def te(
    x: Tensor, w: Tensor, g: Tensor, power_of_two: bool = False, high: Callable[[Tensor], Tensor] = bf16
) -> Products:
    def cast(t: Tensor, role: str) -> tuple[Tensor, Tensor]:
        return scaled_fp8(t, E5M2 if role == "gradient" else E4M3, None, power_of_two)

    return tuple(map(high, of_tensors(x, w, g, cast)))  # type: ignore[return-value]


def rows(x: Tensor, w: Tensor, g: Tensor, high_precision: bool) -> Products:
    def along(t: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        return scaled_fp8(t, E4M3, axis, True)

    fprop = product(along(x, 1), transposed(along(w, 1)))
    if high_precision:
        return bf16(fprop), bf16(product(along(g, 1), scaled_fp8(w, E4M3, None, True))), bf16(bf16(g).t() @ bf16(x))
    return bf16(fprop), bf16(product(along(g, 1), along(w, 0))), bf16(product(transposed(along(g, 0)), along(x, 0)))


def mx(x: Tensor, w: Tensor, g: Tensor) -> Products:
    def along(t: Tensor, axis: int) -> Tensor:
        return in_blocks(t, axis, 32, e8m0_block)

    return (
        bf16(along(x, 1) @ along(w, 1).t()), bf16(along(g, 1) @ along(w, 0)), bf16(along(g, 0).t() @ along(x, 0))
    )  # fmt: skip


def nv(x: Tensor, w: Tensor, g: Tensor) -> Products:
    def along(t: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        return nvfp4_codes(t, lambda f: in_blocks(t, axis, 16, f))

    def rotated(t: Tensor) -> tuple[Tensor, Tensor]:
        return along(hadamard(t, 0, 16, "+++-+------+-+--"), 0)

    qw = nvfp4_codes(w, lambda f: in_tiles(w, 16, f))
    return (
        bf16(product(along(x, 1), transposed(qw))), bf16(product(along(g, 1), qw)),
        product(transposed(rotated(g)), rotated(x)),
    )  # fmt: skip


def deepseek(x: Tensor, w: Tensor, g: Tensor) -> Products:
    def along(t: Tensor, axis: int) -> Tensor:
        return in_blocks(t, axis, 128, e8m0_block)

    qw = in_tiles(w, 128, e8m0_block)
    return bf16(along(x, 1) @ qw.t()), bf16(along(g, 1) @ qw), along(g, 0).t() @ along(x, 0)


def switchback_int8(x: Tensor, w: Tensor, g: Tensor) -> Products:
    qw = scaled_int(w, 8, None)
    fprop, dgrad = product(scaled_int(x, 8, 1), transposed(qw)), product(scaled_int(g, 8, 1), qw)
    return bf16(fprop), bf16(dgrad), bf16(bf16(g).t() @ bf16(x))


def switchback_fp8(x: Tensor, w: Tensor, g: Tensor) -> Products:
    qw = scaled_fp8(w, E4M3, None)
    fprop, dgrad = product(scaled_fp8(x, E4M3, 1), transposed(qw)), product(scaled_fp8(g, E5M2, 1), qw)
    return bf16(fprop), bf16(dgrad), bf16(bf16(g).t() @ bf16(x))


def halo_cast(t: Tensor, role: str, format: str) -> tuple[Tensor, Tensor]:
    scale = amax(t) / (448 if format == "fp8" else 127)
    return (fp8(t / scale, E4M3) if format == "fp8" else torch.round(t / scale)), scale


def halo(level: int, format: str, size: int = INPUTS) -> Callable[[Tensor, Tensor, Tensor], Products]:
    def products(x: Tensor, w: Tensor, g: Tensor) -> Products:
        def cast(t: Tensor, role: str) -> tuple[Tensor, Tensor]:
            return halo_cast(t, role, format)

        fprop, dgrad, wgrad = of_tensors(x, w, g, cast)
        if level > 0:
            xh, wh = (hadamard(t, 1, size) for t in (x, w))
            fprop = product(cast(xh, ""), transposed(cast(wh, "")))
        if level > 1:  # along the tokens
            dgrad = hadamard(product(cast(hadamard(g, 0, size), ""), cast(w, "")), 0, size)
        return bf16(fprop), bf16(dgrad), bf16(wgrad)

    return products


def fixed_point(bits: int) -> Callable[[Tensor], Tensor]:
    """The nearest integers of ``bits`` bits times the least power of two with which amax fits."""

    def cast(t: Tensor) -> Tensor:
        largest = 2 ** (bits - 1) - 1
        step = torch.exp2(torch.ceil(torch.log2(amax(t).double() / largest)))
        return (torch.round(t.double() / step) * step).float()

    return cast


def dfp(bits: int, chain: int) -> Callable[[Tensor, Tensor, Tensor], Products]:
    """Exact sums of ``chain`` products, each rounded to float32 and added to a float32 sum."""

    def spilled(a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(a.shape[0], b.shape[1])
        for start in range(0, a.shape[1], chain):
            part = slice(start, start + chain)
            total = total + (a[:, part].double() @ b[part].double()).float()
        return total

    def products(x: Tensor, w: Tensor, g: Tensor) -> Products:
        cast = fixed_point(bits)
        qx, qw, qg = map(cast, (x, w, g))
        return cast(spilled(qx, qw.t())), cast(spilled(qg, qw)), spilled(qg.t(), qx)

    return products


def dfp_wrapped(x: Tensor, w: Tensor, g: Tensor) -> Products:
    """Sums modulo 2^32 of integers of 16 bits."""

    def integers(t: Tensor) -> tuple[Tensor, Tensor]:
        step = torch.exp2(torch.ceil(torch.log2(amax(t).double() / 32767)))
        return torch.round(t.double() / step).to(torch.int64), step

    def wrapped(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        sums = (a[0] @ b[0]).to(torch.int32)
        return (sums.float().double() * a[1] * b[1]).float()

    cast, (qx, qw, qg) = fixed_point(16), map(integers, (x, w, g))
    first, second = wrapped(qx, transposed(qw)), wrapped(qg, qw)
    return cast(first), cast(second), wrapped(transposed(qg), qx)


def aqt_positive(x: Tensor, w: Tensor, g: Tensor) -> Products:
    """Factors of output channels and of input channels; backward has the rounded operands and the gradient itself."""

    def whole(codes: tuple[Tensor, Tensor]) -> Tensor:
        return codes[0] * codes[1]

    qw, qx = scaled_int(w, 4, 1), scaled_int(x, 5, 0, torch.floor)
    return whole(qx) @ whole(qw).t(), g @ whole(qw), (g.t() @ qx[0]) * qx[1]


CASES: dict[str, tuple[recipes.Recipe, Callable[[Tensor, Tensor, Tensor], Products]]] = {
    "amp_bf16": (recipes.amp_bf16(), amp(bf16)),
    "amp_fp16": (recipes.amp_fp16(), amp(lambda t: t.half().float())),
    "aqt": (recipes.aqt(), aqt_positive),
    "deepseek_v3": (recipes.deepseek_v3(accumulator=None), deepseek),
    "dfp16": (recipes.dfp16(), dfp(16, 2)),
    "dfp16 of 14 bits": (recipes.dfp16(bits=14), dfp(14, 32)),
    "dfp16 that wraps around": (recipes.dfp16(overflow="wrap"), dfp_wrapped),
    "halo": (recipes.halo(), halo(0, "fp8")),
    "halo 1": (recipes.halo(level=1, format="int8"), halo(1, "int8")),
    "halo 2 in blocks": (recipes.halo(level=2, format="int8", block=32), halo(2, "int8", 32)),
    "mxfp8": (recipes.mxfp8(), mx),
    "nvfp4 without stochastic rounding": (recipes.nvfp4(stochastic=False), nv),
    "switchback": (recipes.switchback(), switchback_int8),
    "switchback in fp8": (recipes.switchback(format="fp8"), switchback_fp8),
    "te_current": (recipes.te_current(), te),
    "te_current with float32 results": (recipes.te_current(high=None), lambda *t: te(*t, high=torch.clone)),
    "te_current of powers of two": (recipes.te_current(power_of_two=True), lambda *t: te(*t, power_of_two=True)),
    "torchao_rowwise": (recipes.torchao_rowwise(), lambda *t: rows(*t, high_precision=False)),
    "torchao_rowwise_gw_hp": (recipes.torchao_rowwise_gw_hp(), lambda *t: rows(*t, high_precision=True)),
    "torchao_tensorwise": (recipes.torchao_tensorwise(), te),
}


def operands(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """An activation with channels and a token of other magnitudes, a weight, and a small gradient.

    Without signs after a ReLU; without signs and outliers where sums are to wrap around.
    """
    generator = torch.Generator().manual_seed(5)
    x, w, g = (
        torch.randn(*shape, generator=generator) for shape in ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, OUTPUTS))
    )
    if "wraps" in name:
        return x.abs(), w.abs(), g.abs()
    x[:, 3] *= 30
    x[7] *= 2.0**-12
    g[:, :16] = 0
    return (x.relu() if name == "aqt" else x), w / INPUTS**0.5, g * 1e-4


def compiled_layer(policy: Policy, w: Tensor) -> nn.Module:
    """A linear layer with the weight ``w`` that is compiled with a policy."""
    layer = nn.Linear(w.shape[1], w.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(w)
    torch._dynamo.reset()
    return torch.compile(layer, backend="fpsim_eager", options={"policy": policy})  # type: ignore[return-value]


def products_of(layer: nn.Module, x: Tensor, g: Tensor) -> Products:
    """The three products of the layer."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(g)
    [weight] = layer.parameters()
    assert x.grad is not None and weight.grad is not None
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("name", CASES)
def test_the_products_are_those_of_the_source(name: str) -> None:
    recipe, formula = CASES[name]
    assert recipe.policy is not None
    given = operands(name)
    assert_same(products_of(compiled_layer(recipe.policy, given[1]), given[0], given[2]), formula(*given))


def assert_same(got: Products, want: Products) -> None:
    for kind, a, b in zip(("fprop", "dgrad", "wgrad"), got, want, strict=True):
        wrong = int((a != b).sum())
        assert a.shape == b.shape and not wrong, f"{kind}: {wrong} of {a.numel()} differ\n{a}\n{b}"


def test_delayed_scaling_takes_the_factors_of_the_step_before() -> None:
    policy = recipes.te_delayed(history=2, high=None).policy
    assert policy is not None
    x, w, g = operands("te_delayed")
    layer = compiled_layer(policy, w)
    unscaled = [fp8(x, E4M3), fp8(w, E4M3), fp8(g, E5M2)]
    first = of_tensors(x, w, g, lambda t, role: plain(unscaled[("activation", "weight", "gradient").index(role)]))
    assert_same(products_of(layer, x, g), first)

    def cast(t: Tensor, role: str) -> tuple[Tensor, Tensor]:
        s = encode_scale(
            57344 if role == "gradient" else 448, amax({"activation": x, "weight": w, "gradient": g}[role])
        )
        return fp8(t * s, E5M2 if role == "gradient" else E4M3), 1 / s

    # 64 times larger: every element beyond the largest one of the step before saturates, exactly once.
    assert_same(products_of(layer, 64 * x, 64 * g), of_tensors(64 * x, w, 64 * g, cast))
    products_of(layer, x, g)
    x, g = 64 * x, 64 * g  # the largest magnitudes of the last two steps
    assert_same(products_of(layer, x / 8, g / 8), of_tensors(x / 8, w, g / 8, cast))


def test_gradients_of_nvfp4_are_neighbours_and_right_on_average() -> None:
    """Stochastic rounding in dgrad: with a weight of ones in one place, the result is the rounded gradient itself."""
    policy = recipes.nvfp4(high=None).policy
    assert policy is not None
    layer = compiled_layer(policy, torch.eye(16))
    block = torch.tensor([6.0, 5.5, 4.75, 3.25, 2.2, 1.7, 1.3, 0.9, 0.6, 0.3, 0.1, -0.1, -0.4, -2.9, -4.1, 0.0])
    g = block.repeat(4096, 1)
    _, product, _ = products_of(layer, torch.ones(4096, 16), g)
    # S = 2688/6 = 448 and b = 448, so that the block has the scale 1, but for the last bits of 1/S.
    rounded = (2 * product).round() / 2
    assert torch.allclose(product, rounded, rtol=1e-6)
    grid = torch.tensor([-6.0, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
    below = grid[torch.bucketize(block, grid, right=True) - 1]
    above = grid[torch.bucketize(block, grid)]
    assert ((rounded == below) | (rounded == above)).all()
    assert (rounded != rounded[0]).any(0).tolist() == (below != above).tolist()
    # 8 random bits: the probability is a multiple of 1/256, within 1/256 of the distance. 5 standard errors of 4096.
    error = (rounded.mean(0) - block).abs() / (above - below).clamp(min=0.5)
    assert (error < 1 / 256 + 5 * 0.5 / 64).all(), error
