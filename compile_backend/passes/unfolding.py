"""Convolutions as products of matrices, so that their sums can have an accumulator.

The columns of an image hold, for every output pixel, the pixels under the kernel, in the order of
`torch.nn.functional.unfold`: channels, then taps. A convolution is the product of the columns and the kernel. The
gradient of the weight is the product of the gradient and the columns: it sums over images, then pixels. The gradient of
the image is a convolution too: that of the gradient, with zeros between its pixels where the stride is not 1, and the
reversed kernel. A transposed convolution exchanges the two.

Blocks of channels that share a scale lie together in a sum only if it runs over taps, then channels. Then the columns
and the kernel have that order, and zeros fill the last block of every tap. A gradient of a weight sums over pixels. Its
blocks are those of the flattened images, and only a kernel of one tap leaves them whole (`moves_pixels`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph.convolution import INPUT

aten = torch.ops.aten

#: The size of a dimension that `aten.reshape` finds out.
_ANY = -1
#: Calls an operator with arguments: inserts a node into the graph.
Call = Callable[..., fx.Node]


@dataclass(frozen=True)
class Geometry:
    """The numbers of a convolution, each of the first three with one entry for every dimension of the image.

    ``block`` is 0, or the number of channels of a tap to a multiple of which zeros fill them up.
    """

    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    block: int = 0


def moves_pixels(node: fx.Node) -> bool:
    """Whether an output pixel of a call of ``aten.convolution_backward`` takes others than the same input pixel."""
    _, _, weight, _, stride, padding, _, _, output_padding, *_ = node.args
    kernel = weight.meta["val"].shape[2:]  # type: ignore[union-attr]
    return any(size != 1 for size in (*kernel, *stride)) or any((*padding, *output_padding))  # type: ignore[misc]


def convolution(node: fx.Node, image: fx.Node, weight: fx.Node, call: Call, multiply: Call, block: int = 0) -> fx.Node:
    """The result of the call ``node`` of ``aten.convolution`` for these operands, without its bias.

    Args:
        block: how many channels of a tap share a scale; 0 if there are no such scales.
    """
    _, _, _, stride, padding, dilation, transposed, _, groups = node.args
    geometry = Geometry(stride, padding, dilation, groups, block)  # type: ignore[arg-type]
    return (_spread if transposed else _gathered)(image, weight, _shape(node.meta["val"]), geometry, call, multiply)


def gradient(node: fx.Node, index: int, call: Call, multiply: Call, block: int = 0) -> fx.Node:
    """The gradient of the image or of the weight that the call ``node`` of ``aten.convolution_backward`` computes.

    Args:
        multiply: takes two matrices, and whether the first is of the second operand.
        block: as for `convolution`. The gradient of the weight does not sum over channels.
    """
    tangent, image, weight, _, stride, padding, dilation, transposed, _, groups, _ = node.args
    geometry = Geometry(stride, padding, dilation, groups, block if index == INPUT else 0)  # type: ignore[arg-type]
    shape = _shape(node.meta["val"][index])
    if index == INPUT:
        return (_gathered if transposed else _spread)(tangent, weight, shape, geometry, call, multiply)
    if transposed:
        return _of_weight(image, tangent, shape, geometry, call, lambda a, b: multiply(a, b, True))
    return _of_weight(tangent, image, shape, geometry, call, multiply)


def _gathered(
    image: Any, weight: Any, result: Sequence[int], geometry: Geometry, call: Call, multiply: Call
) -> fx.Node:
    """The convolution of ``image`` (N, C, ...) and ``weight`` (O, C / groups, ...)."""
    out_channels, channels, *kernel = _shape(weight.meta["val"])
    columns = _columns(image, kernel, result[2:], geometry, call)
    groups, per_group = geometry.groups, out_channels // geometry.groups
    matrix = call(aten.reshape.default, weight, [groups, per_group, channels, math.prod(kernel)])
    rows = _terms(matrix, geometry, call)
    return _image(multiply(columns, call(aten.permute.default, rows, [0, 2, 1])), result, call)


def _spread(
    tangent: Any, weight: Any, result: Sequence[int], geometry: Geometry, call: Call, multiply: Call
) -> fx.Node:
    """The transposed convolution of ``tangent`` (N, O, ...) and ``weight`` (O, C / groups, ...)."""
    out_channels, channels, *kernel = _shape(weight.meta["val"])
    dims = range(len(kernel))
    for dim in dims:
        tangent = _with_zeros_between(tangent, dim + 2, geometry.stride[dim], call)
    padding = [geometry.dilation[i] * (kernel[i] - 1) - geometry.padding[i] for i in dims]
    columns = _columns(tangent, kernel, result[2:], replace(geometry, stride=[1] * len(kernel), padding=padding), call)
    groups, per_group = geometry.groups, out_channels // geometry.groups
    reversed_ = call(torch.ops.prims.rev.default, weight, [dim + 2 for dim in dims])
    matrix = call(aten.reshape.default, reversed_, [groups, per_group, channels, math.prod(kernel)])
    rows = _terms(call(aten.permute.default, matrix, [0, 2, 1, 3]), geometry, call)
    return _image(multiply(columns, call(aten.permute.default, rows, [0, 2, 1])), result, call)


def _of_weight(
    tangent: Any, image: Any, shape: Sequence[int], geometry: Geometry, call: Call, multiply: Call
) -> fx.Node:
    """The gradient of a weight of ``shape`` (O, C / groups, ...), from those of the results (N, O, ...)."""
    images, out_channels, *pixels = _shape(tangent.meta["val"])
    groups = geometry.groups
    columns = _columns(image, shape[2:], pixels, geometry, call)
    rows = call(aten.reshape.default, tangent, [images, groups, out_channels // groups, math.prod(pixels)])
    rows = call(aten.permute.default, rows, [1, 2, 0, 3])
    rows = call(aten.reshape.default, rows, [groups, out_channels // groups, _times(images, math.prod(pixels))])
    return call(aten.reshape.default, multiply(rows, columns), list(shape))


def _columns(image: Any, kernel: Sequence[int], pixels: Sequence[int], geometry: Geometry, call: Call) -> fx.Node:
    """The columns of ``image`` (N, C, ...), of shape (groups, N * pixels, terms), in the order of `_terms`."""
    images, channels, *sizes = _shape(image.meta["val"])
    dims = range(len(kernel))
    reach = [geometry.dilation[i] * (kernel[i] - 1) + 1 for i in dims]
    margins: list[int] = []
    for i in reversed(dims):
        after = (pixels[i] - 1) * geometry.stride[i] + reach[i] - sizes[i] - geometry.padding[i]
        margins += [geometry.padding[i], after]
    x = call(aten.constant_pad_nd.default, image, margins) if any(margins) else image
    for i in dims:
        x = call(aten.unfold.default, x, i + 2, reach[i], geometry.stride[i])
        if geometry.dilation[i] > 1:
            x = call(aten.slice.Tensor, x, len(sizes) + 2 + i, 0, reach[i], geometry.dilation[i])
    groups, count = geometry.groups, len(sizes)
    x = call(aten.reshape.default, x, [images, groups, channels // groups, *pixels, *kernel])
    places = [3 + i for i in range(count)]
    x = call(aten.permute.default, x, [1, 0, *places, 2, *(place + count for place in places)])
    rows = _times(images, math.prod(pixels))
    x = call(aten.reshape.default, x, [groups, rows, channels // groups, math.prod(kernel)])
    return _terms(x, geometry, call)


def _terms(x: fx.Node, geometry: Geometry, call: Call) -> fx.Node:
    """The last two axes of ``x`` (groups, rows, channels, taps) as one, in the order in which a sum adds its terms."""
    groups, rows, channels, taps = (size if isinstance(size, int) else _ANY for size in x.meta["val"].shape)
    if geometry.block:
        x = call(aten.permute.default, x, [0, 1, 3, 2])
        if missing := -channels % geometry.block:
            x, channels = call(aten.constant_pad_nd.default, x, [0, missing]), channels + missing
    return call(aten.reshape.default, x, [groups, rows, channels * taps])


def _image(product: fx.Node, result: Sequence[int], call: Call) -> fx.Node:
    """The image of shape ``result`` whose pixels are the rows of ``product`` (groups, N * pixels, C / groups)."""
    images, channels, *pixels = result
    groups = product.meta["val"].shape[0]
    x = call(aten.reshape.default, product, [groups, images, *pixels, channels // groups])
    x = call(aten.permute.default, x, [1, 0, len(pixels) + 2, *range(2, len(pixels) + 2)])
    return call(aten.reshape.default, x, list(result))


def _with_zeros_between(image: Any, dim: int, stride: int, call: Call) -> Any:
    """``image`` with ``stride`` - 1 zeros between its pixels along ``dim``."""
    if stride == 1:
        return image
    shape = _shape(image.meta["val"])
    x = call(aten.unsqueeze.default, image, dim + 1)
    x = call(aten.constant_pad_nd.default, x, [0, 0] * (len(shape) - dim - 1) + [0, stride - 1])
    x = call(aten.reshape.default, x, [*shape[:dim], shape[dim] * stride, *shape[dim + 1 :]])
    return call(aten.slice.Tensor, x, dim, 0, (shape[dim] - 1) * stride + 1)


def _shape(tensor: torch.Tensor) -> list[int]:
    """The sizes of ``tensor``; `_ANY` for a symbolic number of images.

    Raises:
        UnroundedError: another size is symbolic.
    """
    images, *others = tensor.shape
    if not all(isinstance(size, int) for size in others):
        raise UnroundedError(
            f"a convolution of images of any size, {tuple(tensor.shape)}, has no accumulator: compile with "
            "dynamic=False"
        )
    return [images if isinstance(images, int) else _ANY, *others]


def _times(images: int, count: int) -> int:
    return _ANY if images == _ANY else images * count
