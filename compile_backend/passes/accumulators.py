"""Replacing matrix products by products with the accumulators that a policy names.

The operands have been rounded by then. A product becomes ``fpsim::accumulate_mm``; what its operator adds to it (a
bias) is added afterwards, in float32 for 16-bit operands, as matrix libraries do before they store the result.

A machine multiplies elements. Where blocks of operands have scales, ``fpsim::scaled_part`` computes elements and scales
from the value that was rounded, and both go through the rearrangements of the operand.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from fpsim.accumulators.accumulator import Accumulator
from fpsim.accumulators.matmul import operand_format, takes_factor
from fpsim.accumulators.ops import accumulate_grouped_op, accumulate_op, accumulate_scaled_op
from fpsim.accumulators.parts import scaled_part_op
from fpsim.accumulators.scaled import block_of, takes_scales
from fpsim.casts import Cast
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.metadata import describe
from fpsim.compile_backend.graph.products import product_operator
from fpsim.compile_backend.graph.views import is_view
from fpsim.compile_backend.observe.lost_sums import observe_sum
from fpsim.compile_backend.observe.product_error import result_of
from fpsim.compile_backend.passes.inserter import Inserter
from fpsim.compile_backend.passes.unfolding import convolution, gradient, moves_pixels
from fpsim.compile_backend.plan import Sum
from fpsim.formats import FloatFormat
from fpsim.rounding.carriers import CARRIERS
from fpsim.rounding.ops import SOURCE, round_op
from fpsim.scaling.ops import SCALE_OPERATORS, round_scaled_op
from fpsim.scaling.scale import NV_RULES, parse_scale

aten = torch.ops.aten

#: Calls an operator with arguments: inserts a node into the graph.
Call = Callable[..., fx.Node]


@dataclass(frozen=True)
class Summed:
    """A product whose sum has an accumulator, and the formats of its operands.

    Attributes:
        formats: formats that have all values of the operands.
        factors: for each operand the value of which a power of two is the scale, before rounding, and the format; None
            if the operand has no such scale.
        block: how many elements along the summed axis share a scale that joins the sum, or multiplies a partial sum; 0
            if there is no such scale.
        width: how many products of the sum are those of a block: fewer than ``block`` where a convolution has fewer
            channels.
    """

    product: Product
    accumulator: Accumulator
    formats: tuple[FloatFormat, FloatFormat]
    factors: tuple[tuple[fx.Node, str] | None, ...]
    block: int = 0
    width: int = 0

    @property
    def sum(self) -> Sum:
        """The product's line in the plan."""
        product, text = self.product, str(self.accumulator)
        machine = self.accumulator.machine
        if self.block:
            where = "in the sum" if machine is not None and machine.blocks else "times partial sums"
            text += f", scales of {self.block} {where}"
        return Sum(product.path or "", product.operator, product.kind, text)


def summed(
    product: Product, exact: Sequence[fx.Node], casts: Sequence[Cast | None], accumulator: Accumulator
) -> Summed:
    """``product`` with the formats of its operands. ``exact`` are the operands before ``casts`` have rounded them.

    Raises:
        UnroundedError: the operator's sums cannot be simulated.
        ValueError: the accumulator does not add products of these formats.
    """
    call = product.node
    if call.target not in (*_PRODUCTS, *_CONVOLUTIONS, aten.mul.Tensor):
        where = f" in module {product.path!r}" if product.path else ""
        raise UnroundedError(
            f"the sums of {product.operator}{where} cannot be simulated with an accumulator: give the module a rule "
            f"without one, such as modules={{{product.path or '<module>'!r}: 'e4m3fn'}}, or leave out accumulator"
        )
    try:
        if takes_scales(casts, accumulator):
            own, block = block_of(casts, accumulator)
            width = _width_in_convolution(product, block, accumulator) if call.target in _CONVOLUTIONS else block
            return Summed(product, accumulator, own, (None, None), block, width)
        formats = tuple(_format(product, number, casts[number], accumulator) for number in (0, 1))
        accumulator.check_operands(*formats)
    except ValueError as error:
        raise ValueError(
            f"{product.kind} product {product.operator} in module {product.path or ''!r}: {error}"
        ) from None
    factors = tuple(
        (node, by.grid.name) if by is not None and by.grid is not None and takes_factor(by, accumulator) else None
        for node, by in zip(exact, casts, strict=True)
    )
    return Summed(product, accumulator, cast(tuple[FloatFormat, FloatFormat], formats), factors)


def _width_in_convolution(product: Product, block: int, accumulator: Accumulator) -> int:
    """How many products of a convolution's sum are those of a block, for each tap.

    Zeros fill the last block of a tap; where partial sums are multiplied, no more of them than fill a step.

    Raises:
        ValueError: no step of a machine has one scale for each operand.
    """
    call, machine = product.node, accumulator.machine
    assert machine is not None, "only machines multiply elements without their scales"
    if product.contracted[0] != (1,):  # a gradient of a weight
        if moves_pixels(call):
            others = f"accumulator={{'fprop': {machine.name!r}, 'dgrad': {machine.name!r}}}"
            if accumulator.promote is not None:
                others += f" with promote={{'fprop': {accumulator.promote}, 'dgrad': {accumulator.promote}}}"
            raise ValueError(
                f"the gradient of a convolution's weight sums over pixels, of which {block} in a row share a scale. "
                "Taps, strides and padding shift the rows of both operands against each other, so that no step of a "
                "machine has one scale for each. Only a kernel of 1 with stride 1 and no padding shifts nothing. Leave "
                f"wgrad out, such as {others}, or give the module an unscaled format"
            )
        return block
    groups = cast(int, call.args[8 if call.target is aten.convolution.default else 9])
    channels = cast(fx.Node, call.args[product.operands[0]]).meta["val"].shape[1] // groups
    if groups > 1 and channels % block and block % channels:
        raise ValueError(
            f"blocks of {block} channels that share a scale reach from one group of {channels} channels into the next: "
            f"use blocks of a size that divides {channels}, or is a multiple of it"
        )
    return block if machine.blocks else min(block, -(-channels // machine.longest) * machine.longest)


def _format(product: Product, number: int, cast_: Cast | None, accumulator: Accumulator) -> FloatFormat:
    if cast_ is not None:
        return operand_format(cast_, accumulator)
    operand = cast(fx.Node, product.node.args[product.operands[number]])
    own = CARRIERS[operand.meta["val"].dtype]
    if not own.is_subset_of(CARRIERS[torch.float32]):
        raise ValueError(f"an unrounded operand is {operand.meta['val'].dtype}: name a format for it, or use float32")
    return own


def insert_accumulators(products: Sequence[Summed], inserter: Inserter) -> None:
    """Replace every product in ``products``, for all of its users."""
    for each in products:
        _replace(each, inserter)


def _replace(each: Summed, inserter: Inserter) -> None:
    node = each.product.node
    end = result_of(each.product)
    key = inserter.random_key(node) if each.accumulator.is_stochastic else None
    meta = {name: value for name, value in end.meta.items() if name not in ("val", "tensor_meta", "eager_input_vals")}

    def call(target: Callable[..., Any], *arguments: Any) -> fx.Node:
        with inserter.graph.inserting_before(end):
            new = inserter.graph.call_function(target, arguments)
        new.meta = dict(meta)
        describe(new)
        inserter.sources[new] = inserter.sources[end]
        return new

    def observed(result: fx.Node, *arguments: Any) -> fx.Node:
        if inserter.recorder is None:
            return result
        return call(observe_sum, result, *arguments, inserter.recorder.number_of(each.product))

    def multiply(a: fx.Node, b: fx.Node, exchanged: bool = False, ends: fx.Node | None = None) -> fx.Node:
        """The product of matrices of the first and the second operand; ``exchanged``: of the second and the first.

        ``ends`` are those of groups.
        """
        order = (1, 0) if exchanged else (0, 1)
        if each.block:
            elements, rest = _scaled(each, (a, b), order, inserter, call)
            if ends is not None:
                result = call(accumulate_grouped_op, *elements, ends, key, *rest, SOURCE)
            else:
                result = call(accumulate_scaled_op, *elements, *rest, SOURCE)
            return observed(result, *elements, ends, key, *rest)
        operands = [
            x if scales[i] is None else call(aten.mul.Tensor, x, scales[i]) for i, x in zip(order, (a, b), strict=True)
        ]
        names = [each.formats[i].name for i in order]
        if ends is None:
            result = call(accumulate_op, *operands, key, str(each.accumulator), *names, SOURCE)
        else:
            rest = (None, None, 0, str(each.accumulator), *names, SOURCE)
            result = call(accumulate_grouped_op, *operands, ends, key, *rest)
        result = observed(result, *operands, ends, key, None, None, 0, str(each.accumulator), *names)
        for scale in scales:
            result = result if scale is None else call(aten.div.Tensor, result, scale)
        return result

    scales = [
        None if factor is None else call(SCALE_OPERATORS["power_of_two"], *factor, SOURCE) for factor in each.factors
    ]

    if node.target is aten.convolution_backward.default:
        result = gradient(node, cast(int, end.args[1]), call, multiply, each.width)
    elif node.target is aten.mul.Tensor:
        result = _decomposed(node, end, call, multiply)
    else:
        result = _product(node, call, multiply, each.width)
    wanted = end.meta["val"].dtype
    if result.meta["val"].dtype != wanted:
        result = call(torch.ops.prims.convert_element_type.default, result, wanted)
    end.replace_all_uses_with(result)


def _scaled(
    each: Summed, operands: Sequence[fx.Node], order: Sequence[int], inserter: Inserter, call: Call
) -> tuple[list[fx.Node], tuple[Any, ...]]:
    """The elements of operands whose blocks have scales; and the rest of the arguments.

    ``order`` tells for each of the matrices the number of its operand.
    """
    parts = [[_part(x, part, inserter, call) for part in ("elements", "scales")] for x in operands]
    axes = (x.meta["val"].dim() + back for x, back in zip(operands, (-1, -2), strict=True))
    scales = [
        call(aten.slice.Tensor, part[1], axis, 0, sys.maxsize, each.width)
        for part, axis in zip(parts, axes, strict=True)
    ]
    rest = (*scales, each.width, str(each.accumulator), *(each.formats[i].name for i in order))
    return [part[0] for part in parts], rest


def _part(node: fx.Node, part: str, inserter: Inserter, call: Call) -> fx.Node:
    """One part of ``node``, which rearranges a value that was rounded with scales of blocks."""
    if node.target is round_scaled_op:
        x, *cast_, source = node.args[:7]
        words, outside = (*node.args[7:8], None)[0], node.args[9:10] == (True,)
        if parse_scale(cast(str, cast_[3])).rule in NV_RULES and not outside:  # type: ignore[union-attr]
            raise UnroundedError(f"the tensor's scale of {node.name} is in its elements, not in the product's result")
        return inserter.part(node, scaled_part_op, (x, *cast_, part, source, words))
    if node.target is torch.ops.prims.convert_element_type.default:  # parts are float32
        (source,) = node.all_input_nodes
        is_stored = source.target is round_op and source.args[1] == CARRIERS[node.meta["val"].dtype].name
        return _part(source.all_input_nodes[0] if is_stored else source, part, inserter, call)
    if not is_view(node) and node.target not in _REARRANGEMENTS:
        raise UnroundedError(f"the scales of {node.name} cannot be taken apart from its elements")
    base, *rest = node.args
    return call(node.target, _part(cast(fx.Node, base), part, inserter, call), *rest)


#: Rearrangements beside views that products of batches, of vectors and of unfolded images are made of. Pixels and
#: channels that they add have elements and scales of zero.
_REARRANGEMENTS = (
    aten.squeeze.dim, aten.unsqueeze.default, aten.constant_pad_nd.default, aten.unfold.default, aten.slice.Tensor,
    torch.ops.prims.rev.default,
)  # fmt: skip


def _product(node: fx.Node, call: Call, multiply: Call, width: int) -> fx.Node:
    """The result of an operator of `_PRODUCTS`, with what it adds to its product. ``width`` is that of `Summed`."""
    entry = product_operator(node.target)
    assert entry is not None, "the operator is in the table of products"
    a, b = (cast(fx.Node, node.args[i]) for i in entry.multiplications[0].operands)
    adds = entry.addend is not None and node.args[entry.addend] is not None
    wanted = node.meta["val"].dtype
    if wanted != a.meta["val"].dtype or (adds and wanted.itemsize < 4):
        a, b = (call(torch.ops.prims.convert_element_type.default, x, torch.float32) for x in (a, b))
    if node.target is aten.convolution.default:
        result = convolution(node, a, b, call, multiply, width)
    elif node.target is aten._grouped_mm.default:
        result = multiply(a, b, ends=cast(fx.Node, node.args[2]) if len(node.args) > 2 else None)
    else:
        result = _PRODUCTS[node.target](a, b, call, multiply)
    if not adds:
        return result
    addend = cast(fx.Node, node.args[cast(int, entry.addend)])
    if node.target is aten.convolution.default:
        addend = call(aten.reshape.default, addend, [-1, *[1] * (result.meta["val"].dim() - 2)])
    if addend.meta["val"].dtype != result.meta["val"].dtype:
        addend = call(torch.ops.prims.convert_element_type.default, addend, result.meta["val"].dtype)
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    if alpha != 1:
        result = call(aten.mul.Tensor, result, alpha)
    if beta == 0:  # torch ignores the addend then, NaN included
        return result
    if beta != 1:
        addend = call(aten.mul.Tensor, addend, beta)
    return call(aten.add.Tensor, result, addend)


def _decomposed(node: fx.Node, end: fx.Node, call: Call, multiply: Call) -> fx.Node:
    """A multiplication, and the sum over some of its axes, as products of rows: one for each element of the result."""
    shape = _sizes(node, call)
    axes = list(range(len(shape)))
    summed_axes: list[int] = []
    if end is not node:
        given = cast(Sequence[int], end.args[1]) if len(end.args) > 1 and end.args[1] else axes
        summed_axes = [axis % len(shape) for axis in given]
    kept_axes = [axis for axis in axes if axis not in summed_axes]
    kept, summed_ = (_product_of([shape[axis] for axis in group], call) for group in (kept_axes, summed_axes))
    rows = []
    for operand, last in zip(node.args, ([kept, 1, summed_], [kept, summed_, 1]), strict=True):
        expanded = call(aten.expand.default, operand, shape)
        if kept_axes + summed_axes != axes:
            expanded = call(aten.permute.default, expanded, kept_axes + summed_axes)
        rows.append(call(aten.reshape.default, expanded, last))
    own = [shape[axis] for axis in kept_axes]
    if len(end.meta["val"].shape) == len(shape):  # the sum keeps its axes, with one element
        own = [1 if axis in summed_axes else shape[axis] for axis in axes]
    return call(aten.reshape.default, multiply(*rows), own)


def _sizes(node: fx.Node, call: Call) -> list[Any]:
    """The sizes of ``node``: ints, and nodes for symbolic sizes."""
    sizes = node.meta["val"].shape
    return [size if isinstance(size, int) else call(aten.sym_size.int, node, i) for i, size in enumerate(sizes)]


def _product_of(sizes: Sequence[Any], call: Call) -> Any:
    result: Any = 1
    for size in sizes:
        is_known = isinstance(size, int) and isinstance(result, int)
        result = size if result == 1 else result * size if is_known else call(operator.mul, result, size)
    return result


def _of_batch(a: fx.Node, b: fx.Node, call: Call, multiply: Call) -> fx.Node:
    """The sum of the products of a batch: one product that sums over the batch too."""
    batch, rows, depth = _sizes(a, call)
    columns, both = _sizes(b, call)[2], _product_of([batch, depth], call)
    left = call(aten.reshape.default, call(aten.permute.default, a, [1, 0, 2]), [rows, both])
    return multiply(left, call(aten.reshape.default, b, [both, columns]))


def _of_vector(a: fx.Node, b: fx.Node, call: Call, multiply: Call) -> fx.Node:
    return call(aten.squeeze.dim, multiply(a, call(aten.unsqueeze.default, b, 1)), 1)


def _of_vectors(a: fx.Node, b: fx.Node, call: Call, multiply: Call) -> fx.Node:
    product = multiply(call(aten.unsqueeze.default, a, 0), call(aten.unsqueeze.default, b, 1))
    return call(aten.reshape.default, product, [])


def _outer(a: fx.Node, b: fx.Node, call: Call, multiply: Call) -> fx.Node:
    return multiply(call(aten.unsqueeze.default, a, 1), call(aten.unsqueeze.default, b, 0))


def _plain(a: fx.Node, b: fx.Node, call: Call, multiply: Call) -> fx.Node:
    return multiply(a, b)


_CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
#: For every other operator that can have an accumulator, its product of two matrices or batches.
_PRODUCTS: dict[Any, Callable[[fx.Node, fx.Node, Call, Call], fx.Node]] = {
    **{
        getattr(packet, overload): _plain
        for packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm)
        for overload in ("default", "dtype")
        if hasattr(packet, overload)
    },
    aten.addbmm.default: _of_batch,
    aten.mv.default: _of_vector,
    aten.addmv.default: _of_vector,
    aten.dot.default: _of_vectors,
    aten.vdot.default: _of_vectors,
    aten.addr.default: _outer,
    aten._grouped_mm.default: _plain,
}
