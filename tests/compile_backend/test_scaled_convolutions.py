"""Convolutions whose blocks of channels have scales, with the sums of a machine, against `fpsim.reference.dot`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fpsim
from fpsim.reference import Aligned, dot, to_float

#: For each unit the policy, the format of elements, that of scales, the block, and the unit in the reference.
UNITS: dict[str, tuple[dict[str, Any], str, str, int, dict[str, Any]]] = {
    "hopper_fp8": (
        {"format": "e4m3fn/block:32", "accumulator": "hopper_fp8", "promote": 32}, "e4m3fn", "", 32,
        {"accumulator": "e8m13", "order": Aligned(32, 13), "promote": 32}),
    "hopper_fp8 with wide blocks": (
        {"format": "e4m3fn/block:128", "accumulator": "hopper_fp8", "promote": 128}, "e4m3fn", "", 128,
        {"accumulator": "e8m13", "order": Aligned(32, 13), "promote": 128}),
    "blackwell_mxfp8": (
        {"format": "mxfp8", "accumulator": "blackwell_mxfp8"}, "e4m3fn", "e8m0fnu", 32,
        {"accumulator": "fp32", "order": Aligned(32, 25, -133)}),
    "blackwell_nvfp4": (
        {"format": "nvfp4", "accumulator": "blackwell_nvfp4"}, "e2m1fn", "e4m3fn", 16,
        {"accumulator": "fp32", "order": Aligned(64, 35, -139, group=16)}),
}  # fmt: skip

#: The function, its arguments beside image and weight, the shapes of these two, and the unit.
CONVOLUTIONS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], tuple[int, ...], tuple[int, ...], str]] = {
    "stride and padding": (
        nn.functional.conv1d, {"stride": 2, "padding": 1}, (2, 36, 6), (34, 36, 3), "hopper_fp8"),
    "two dimensions with dilation": (
        nn.functional.conv2d, {"dilation": (1, 2), "padding": (0, 1)}, (1, 35, 3, 4), (20, 35, 2, 2),
        "blackwell_mxfp8"),
    "few channels": (
        nn.functional.conv1d, {"padding": 2}, (1, 3, 5), (40, 3, 3), "hopper_fp8 with wide blocks"),
    "groups of whole blocks": (
        nn.functional.conv1d, {"padding": 1, "groups": 2}, (1, 64, 4), (64, 32, 3), "blackwell_mxfp8"),
    "blocks of whole groups": (
        nn.functional.conv1d, {"groups": 4}, (1, 32, 4), (32, 8, 2), "hopper_fp8"),
    "transposed": (
        nn.functional.conv_transpose1d, {"stride": 2, "padding": 1, "output_padding": 1}, (1, 34, 3), (34, 20, 3),
        "hopper_fp8"),
    "scales of tensors": (
        nn.functional.conv1d, {"stride": 2}, (1, 20, 5), (18, 20, 2), "blackwell_nvfp4"),
}  # fmt: skip


def decoded(x: Tensor, cast: str, element: str, scale: str, axis: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The elements of ``x``, for each the scale of its block along ``axis``, and the scale of the tensor."""
    codes, scales = fpsim.encode_blocks(x, cast, axis=axis, packed=False)
    of_tensor = torch.ones(())
    if isinstance(scales, tuple):
        scales, of_tensor = scales[0], 1 / scales[1]
    of_blocks = fpsim.decode(scales, scale) if scale else scales
    of_elements = of_blocks.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return fpsim.decode(codes, element), of_elements, of_tensor


def taps(
    place: Sequence[int], kernel: Sequence[int], sizes: Sequence[int], spread: bool, given: dict[str, Any]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...] | None]]:
    """The taps of the pixel ``place`` of a result, in order: each with its pixel of the image that is read, or None.

    ``spread`` is a transposed convolution, or the gradient of an image. It reads the taps from the last to the first.
    """
    numbers = [given.get(name, usual) for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1))]
    strides, paddings, dilations = ([n] * len(kernel) if isinstance(n, int) else n for n in numbers)
    for tap in itertools.product(*(range(k)[:: -1 if spread else 1] for k in kernel)):
        rows = zip(place, tap, strides, paddings, dilations, strict=True)
        if spread:
            pixel = [Fraction(p + padding - k * dilation, stride) for p, k, stride, padding, dilation in rows]
        else:
            pixel = [Fraction(p * stride - padding + k * dilation) for p, k, stride, padding, dilation in rows]
        is_inside = all(q.denominator == 1 and 0 <= q < size for q, size in zip(pixel, sizes, strict=True))
        yield tap, tuple(map(int, pixel)) if is_inside else None


def filled(values: Tensor, block: int, value: float = 0.0) -> list[float]:
    """The numbers of one tap, and behind them as many times ``value`` as the last block lacks."""
    return [*values.tolist(), *[value] * (-len(values) % block)]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_sums_run_over_taps_and_then_blocks_of_channels(name: str) -> None:
    """Forward and for the image. Each tap has blocks of its own, the last of which zeros fill."""
    function, given, of_image, of_weight, unit_name = CONVOLUTIONS[name]
    policy, element, scale, block, unit = UNITS[unit_name]
    machine = {kind: policy["accumulator"] for kind in ("fprop", "dgrad")}
    promote = {"promote": dict.fromkeys(machine, policy["promote"])} if "promote" in policy else {}
    draw = torch.Generator().manual_seed(1)
    image, weight = (torch.randn(shape, generator=draw) for shape in (of_image, of_weight))
    image[..., -1] *= 2.0**-9
    own = image.clone().requires_grad_()
    compiled = torch.compile(function, backend="fpsim_eager", options={**policy, "accumulator": machine, **promote})
    result = compiled(own, weight, **given)
    tangent = torch.randn(result.shape, generator=draw)
    result.backward(tangent)
    assert own.grad is not None
    is_transposed, groups = function is nn.functional.conv_transpose1d, given.get("groups", 1)
    for got, read, spread in ((result, image, is_transposed), (own.grad, tangent, not is_transposed)):
        encoding = policy["format"], element, scale
        x, scales_x, of_x = decoded(read, *encoding, 1, block)
        w, scales_w, of_w = decoded(weight, *encoding, 0 if spread else 1, block)
        channels, per_group = read.shape[1] // groups, got.shape[1] // groups
        for flat in torch.randperm(got.numel(), generator=draw)[:24].tolist():
            number, channel, *place = (int(i) for i in torch.unravel_index(torch.tensor(flat), got.shape))
            first = channel // per_group * channels
            some = slice(first, first + channels)
            left, right, scales_left, scales_right = (list[float]() for _ in range(4))
            for tap, pixel in taps(place, of_weight[2:], read.shape[2:], spread, given):
                kernel = (some, channel % per_group, *tap) if spread else (channel, slice(None), *tap)
                inside = (number, some, *(pixel or [0] * len(tap)))
                left += filled(x[inside] * (pixel is not None), block)
                scales_left += filled(scales_x[inside], block, 1.0)
                right += filled(w[kernel], block)
                scales_right += filled(scales_w[kernel], block, 1.0)
            if "promote" in unit:
                scales = {"part_scales": (scales_left[::block], scales_right[::block])}
            else:
                scales = {"scales": (scales_left, scales_right)}
            options: dict[str, Any] = {**unit, **scales, "operands": element, "scale_format": scale or "e8m0fnu"}
            wanted = torch.tensor(to_float(dot(left, right, "fp32", "toward_zero", **options))) * (of_x * of_w)
            assert got.flatten()[flat] == wanted, (name, spread, flat)


def test_the_gradient_of_a_kernel_of_one_pixel_sums_over_the_pixels_of_all_images() -> None:
    """`fpsim.matmul`, whose judge is the reference, gets the flattened images: of any number, in groups."""
    policy = {"format": "e4m3fn/block:32", "accumulator": "hopper_fp8", "promote": 32, "gradient": "e5m2/block:32"}
    draw = torch.Generator().manual_seed(1)
    image, tangent = torch.randn(3, 8, 5, 7, generator=draw), torch.randn(3, 6, 5, 7, generator=draw)
    rows, columns = (x.transpose(0, 1).flatten(1) for x in (tangent, image))
    options: dict[str, Any] = {
        "accumulator": "hopper_fp8",
        "promote": 32,
        "format": ("e5m2/block:32", "e4m3fn/block:32"),
    }
    for function, shape, groups in (
        (nn.functional.conv2d, (6, 4, 1, 1), 2), (nn.functional.conv_transpose2d, (8, 3, 1, 1), 2)
    ):  # fmt: skip
        torch._dynamo.reset()
        weight = torch.randn(shape, generator=draw).requires_grad_()
        convolve = torch.compile(partial(function, groups=groups), backend="fpsim_eager", options=policy)
        for x in (image, tangent):
            torch._dynamo.mark_dynamic(x, 0)
        convolve(image, weight).backward(tangent)
        parts = []
        for a, b in zip(rows.chunk(groups), columns.chunk(groups), strict=True):
            product = fpsim.matmul(a, b.T, **options)
            parts.append(product.T if function is nn.functional.conv_transpose2d else product)
        assert weight.grad is not None and torch.equal(weight.grad[..., 0, 0], torch.cat(parts))


@pytest.mark.parametrize(
    ("message", "given", "of_weight"),
    [
        (r"wgrad product aten.convolution_backward.*32 in a row share a scale.*Leave wgrad out", {}, (4, 48, 3)),
        (r"reach from one group of 48 channels into the next.*divides 48", {"groups": 2}, (4, 48, 1)),
    ],
)
def test_steps_without_one_scale_for_each_operand_are_refused(
    message: str, given: dict[str, int], of_weight: tuple[int, ...]
) -> None:
    image, weight = torch.randn(1, 48 * given.get("groups", 1), 5), torch.randn(of_weight).requires_grad_()
    policy = {"format": "mxfp8", "accumulator": "blackwell_mxfp8"}
    convolve = torch.compile(nn.functional.conv1d, backend="fpsim_eager", options=policy)
    with pytest.raises(Exception, match=message):
        convolve(image, weight, **given)
