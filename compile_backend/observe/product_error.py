"""The error of a matrix product of rounded operands, relative to the product of the unrounded operands in float64.

For small products the whole product is compared. For large products that would cost several times the product itself,
so that random combinations of the columns are compared: for an error D and a vector g of random signs the mean of
|Dg|^2 is |D|^2 (Hutchinson, Communications in Statistics 19(2), 1990), and Dg costs two products of a matrix and a
vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fpsim.compile_backend.graph import convolution
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.operation_ends import mark
from fpsim.compile_backend.graph.products import Form, product_operator
from fpsim.compile_backend.graph.recognition import is_sum_of_product
from fpsim.compile_backend.observe.rounding_statistics import norm, piece_size

aten = torch.ops.aten

#: How many random combinations of columns are compared.
MIXTURES = 12
#: A product of matrices is large from this number of columns on, and a convolution, which is slow in float64, from this
#: number of images or channels.
LARGE = 128
LARGE_CONVOLUTION = 32

#: From the operator's result, the unrounded operands, the operator's other tensors and the seed of an estimate to two
#: norms: that of the difference from the product of the unrounded operands, and that of this product.
Comparison = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], int], tuple[float, float]]


def result_of(product: Product) -> fx.Node:
    """The node that holds the product; for a decomposed product the sum that completes it."""
    node = product.value
    while _is_decomposed(product) and len(node.users) == 1:
        (node,) = node.users
        if is_sum_of_product(node):
            return node
        if node.target not in (mark, torch.ops.prims.convert_element_type.default):
            break
    return product.value


def other_tensors(product: Product | None) -> list[fx.Node]:
    """The tensors among the arguments of a product's operator, in order, without its two operands."""
    if product is None:
        return []
    arguments = enumerate(product.node.args)
    return [node for i, node in arguments if isinstance(node, fx.Node) and i not in product.operands]


def comparison(product: Product, value: fx.Node, exact: bool) -> Comparison:
    """The function that compares a run of ``product``, whose result is ``value``, with the unrounded operands' product.

    Neither norm contains the addend of the operator. ``exact``: never estimate.
    """
    multiply, mixing, addend_of = _multiplication(product, value), _mixing(product, value), _addend(product)
    beta = cast(float, product.node.kwargs.get("beta", 1))

    def compare(got: Tensor, operands: Sequence[Tensor], others: Sequence[Tensor], seed: int) -> tuple[float, float]:
        addend = addend_of(others)
        if addend is not None:
            addend = (beta * addend.double()).expand(got.shape)
        if mixing is not None and not exact and got.numel() and got.shape[mixing.of_result] >= mixing.large:
            signs = _signs(got.shape[mixing.of_result], seed, got.device)
            mixed = list(operands)
            mixed[mixing.operand] = _mixed(operands[mixing.operand], mixing.of_operand, signs)
            estimate = _estimated(got, addend, mixing.of_result, signs, multiply(mixed, others))
            if all(map(math.isfinite, estimate)):
                return estimate
        reference = multiply(operands, others)
        got = got.double() if addend is None else got.double() - addend
        return norm(got - reference), norm(reference)

    return compare


def _estimated(
    got: Tensor, addend: Tensor | None, dim: int, signs: Tensor, mixed_reference: Tensor
) -> tuple[float, float]:
    """Estimates of the two norms from combinations along ``dim`` of the result and of the exact product.

    The norm of the result R is computed exactly. The norm of the exact product R - D follows from it and from the mean
    of (Rg)(Dg), which is the inner product of R and D.
    """
    rows, less = _rows(got, dim), None if addend is None else _rows(addend, dim)
    size = max(piece_size(got.device) // rows.shape[1], 1)
    results, norms = [], []
    for start in range(0, len(rows), size):
        piece = rows[start : start + size].double()
        if less is not None:
            piece = piece - less[start : start + size]
        results.append(piece @ signs)
        norms.append(norm(piece))
    result = torch.cat(results)
    difference = result - _rows(mixed_reference, dim)
    error = norm(difference) / math.sqrt(MIXTURES)
    inner = float((result * difference).sum()) / MIXTURES
    return error, math.sqrt(max(math.hypot(*norms) ** 2 - 2 * inner + error**2, 0.0))


@dataclass(frozen=True)
class _Mixing:
    """The dimensions of a product's operand and result whose combinations correspond, as the product is linear.

    Attributes:
        operand: 0 or 1, the operand whose combinations are multiplied.
        of_operand: the dimension of that operand.
        of_result: the dimension of the result.
        large: the size of that dimension from which on combinations are cheaper than the whole product.
    """

    operand: int
    of_operand: int
    of_result: int
    large: int = LARGE


def _mixing(product: Product, value: fx.Node) -> _Mixing | None:
    node, form = product.node, _form(product)
    if form in (Form.MATRICES, Form.SUM_OF_BATCH):
        return _Mixing(1, -1, -1)
    if form is Form.GROUPS:
        dims = [argument.meta["val"].dim() for argument in node.args[:2]]  # type: ignore[union-attr]
        return None if dims == [3, 2] else _Mixing(1, -1, -1)
    if form is Form.CONVOLUTION:  # combine images: unfolding them costs most of the time
        return _Mixing(0, 0, 0, LARGE_CONVOLUTION)
    if form is Form.CONVOLUTION_GRADIENT and node.args[9] == 1:
        transposed = bool(node.args[7])
        if value.args[1] == convolution.INPUT:
            return _Mixing(1, 0 if transposed else 1, 1, LARGE_CONVOLUTION)
        return _Mixing(1, 1, 0 if transposed else 1, LARGE_CONVOLUTION)
    return None


def _signs(size: int, seed: int, device: torch.device) -> Tensor:
    """Random signs, of shape (``size``, `MIXTURES`)."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return (2.0 * torch.randint(2, (size, MIXTURES), generator=generator, device="cpu") - 1).double().to(device)


def _rows(values: Tensor, dim: int) -> Tensor:
    """``values`` as a matrix whose columns are along ``dim``."""
    return values.movedim(dim, -1).reshape(-1, values.shape[dim])


def _mixed(values: Tensor, dim: int, signs: Tensor) -> Tensor:
    """Sums of ``values`` along ``dim`` in float64, one for each column of ``signs``."""
    shape = values.movedim(dim, -1).shape[:-1]
    return _times(_rows(values, dim), signs).reshape(*shape, -1).movedim(-1, dim)


def _times(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices, or of batches of matrices, in float64; ``a`` is widened piece by piece."""
    b = b.double()
    size = max(a.shape[0] * piece_size(a.device) // max(a.numel(), 1), 1)
    if a.dim() == 2 and a.stride(0) < a.stride(1):  # it lies in memory column by column
        size = max(piece_size(a.device) // max(a.shape[0], 1), 1)
        total = b.new_zeros(a.shape[0], b.shape[1])
        for columns, rows in zip(a.split(size, 1), b.split(size), strict=True):
            total.addmm_(columns.double(), rows)
        return total
    if a.dim() == 2:
        return torch.cat([rows.double() @ b for rows in a.split(size)])
    return torch.cat([x.double() @ y for x, y in zip(a.split(size), b.split(size), strict=True)])


def _addend(product: Product) -> Callable[[Sequence[Tensor]], Tensor | None]:
    """From the operator's other tensors to the one that it adds to the product, in a shape that broadcasts, or None.

    The graph may have lost the operator when this is called: a product with an accumulator is replaced.
    """
    entry = product_operator(product.node.target)
    if entry is None or entry.addend is None:
        return lambda others: None
    pixels = [1] * len(product.node.args[3]) if entry.form is Form.CONVOLUTION else None  # type: ignore[arg-type]

    def addend(others: Sequence[Tensor]) -> Tensor | None:
        if not others:
            return None
        return others[0] if pixels is None else others[0].view(-1, *pixels)

    return addend


def _multiplication(product: Product, value: fx.Node) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    """The product in float64, as a function of its operands and of the other tensors of its operator."""
    if _form(product) is Form.MATRICES:
        alpha = cast(float, product.node.kwargs.get("alpha", 1))
        return lambda operands, _: _times(*operands) if alpha == 1 else _times(*operands).mul_(alpha)
    of_wide = _wide_multiplication(product, value)
    return lambda operands, others: of_wide([operand.double() for operand in operands], others)


def _wide_multiplication(product: Product, value: fx.Node) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    """The product as a function of operands that are float64 already, for the rarer operators."""
    node, form = product.node, _form(product)
    packet = cast(OpOverload, node.target).overloadpacket
    if form is Form.CONVOLUTION:
        return lambda operands, _: packet(*operands, None, *node.args[3:])
    if form is Form.CONVOLUTION_GRADIENT:
        return partial(_convolution_gradient, node.args, cast(int, value.args[1]))
    if form is Form.GROUPS:
        return lambda operands, others: _grouped(*operands, *others[:1])
    if form is None and value is not product.value:
        return lambda operands, _: (operands[0] * operands[1]).sum(*value.args[1:])
    entry = product_operator(node.target)
    if entry is not None and entry.addend is not None:
        alpha = node.kwargs.get("alpha", 1)
        return lambda operands, _: packet(operands[0].new_zeros(1), *operands, beta=0, alpha=alpha)
    return lambda operands, _: packet(*operands)


def _form(product: Product) -> Form | None:
    """How the operator of ``product`` multiplies; None for one that is decomposed into a multiplication and a sum."""
    entry = product_operator(product.node.target)
    return None if entry is None else entry.form


def _is_decomposed(product: Product) -> bool:
    return _form(product) is None


def _convolution_gradient(
    arguments: Sequence[Any], index: int, operands: Sequence[Tensor], others: Sequence[Tensor]
) -> Tensor:
    """The gradient number ``index`` that a call of `aten.convolution_backward` with ``arguments`` computes.

    Only the shape of the argument that is no operand is used, with the number of channels of the operand.
    """
    gradient, operand = operands
    shape, transposed = list(others[0].shape), arguments[7]
    if index == convolution.INPUT:
        if arguments[9] == 1:
            shape[1] = operand.shape[0 if transposed else 1]
        tensors = gradient, operand.new_zeros(shape), operand
    else:
        if arguments[9] == 1:
            shape[0 if transposed else 1] = operand.shape[1]
        tensors = gradient, operand, operand.new_zeros(shape)
    mask = [i == index for i in range(3)]
    return aten.convolution_backward(*tensors, None, *arguments[4:10], mask)[index]


def _grouped(a: Tensor, b: Tensor, ends: Tensor | None = None) -> Tensor:
    """The products of groups of matrices, as `torch.nn.functional.grouped_mm` computes them; zero outside of groups."""
    if a.dim() == b.dim() == 3:
        return a @ b
    assert ends is not None
    stops = ends.tolist()
    starts = [0, *stops[:-1]]
    groups = list(zip(starts, stops, strict=True))
    if a.dim() == b.dim() == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in groups])
    if a.dim() == 2:
        result = a.new_zeros(a.shape[0], b.shape[-1])
        for (i, j), matrix in zip(groups, b, strict=True):
            result[i:j] = a[i:j] @ matrix
        return result
    result = a.new_zeros(a.shape[1], b.shape[1])
    for (i, j), matrix in zip(groups, a, strict=True):
        result[:, i:j] = matrix @ b[:, i:j]
    return result
