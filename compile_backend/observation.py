"""Watching one graph: what `fpsim.profile` counts is gathered here.

While a graph is rewritten, an identity is inserted behind every matrix product and every rounded result. It also takes
the operands before and after rounding, so that they are at hand there, in backward too. The interpreter of
``"fpsim_eager"`` runs, in the place of each identity, a function that measures what it is given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fpsim.compile_backend import convolution
from fpsim.compile_backend.marks import mark
from fpsim.compile_backend.plan import Site
from fpsim.compile_backend.products import Product, _is_of_product, base
from fpsim.compile_backend.statistics import Statistics, measure, merge, norm, relative_error
from fpsim.policy import Cast

aten = torch.ops.aten

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("observe(Tensor value, Tensor[] exact, Tensor[] rounded, Tensor[] others, int number) -> Tensor")
_library.impl("observe", lambda value, *_: value.clone(), "CompositeExplicitAutograd")
_library._register_fake("observe", lambda value, *_: torch.empty_like(value))

#: The identity of ``value``, what observation ``number`` looks at. It takes the operands ``exact`` and ``rounded``, and
#: the ``others`` that the operator has.
observe: OpOverload = torch.ops.fpsim.observe.default

_SUMS = (aten.sum.dim_IntList, aten.sum.default)
#: Products with at least eight times as many columns are compared by this many random combinations of their columns.
MIXTURES = 16
#: Products that add something: their first argument.
_WITH_ADDEND = (aten.addmm, aten.baddbmm, aten.addmv, aten.addbmm)


@dataclass(frozen=True)
class SiteStatistics(Site):
    """A site, and what became of the numbers there, over all runs.

    Attributes:
        product: the position of its matrix product among the products of the profile; None for other operations and
            for results of products.
        statistics: counts, energies and histograms. Numbers that several products read are rounded once, and counted
            once: their sites have the same statistics.
    """

    product: int | None
    statistics: Statistics


@dataclass(frozen=True)
class ProductStatistics:
    """A matrix product, over all of its runs.

    Attributes:
        path, operator, kind: as of a `Site`.
        shapes: of its two operands.
        runs: how many times it ran.
        error: the Frobenius norm of what it gave less the product of the unrounded operands in float64, over all runs.
            What the operator adds (a bias) is taken away again; the rounding of the result comes after.
        reference: the Frobenius norm of the product of the unrounded operands.

    Of large products both are estimates, without bias, from random combinations of the columns; the standard deviation
    of ``error**2`` is at most 0.36 of it, and the less, the more directions the error has.
    """

    path: str
    operator: str
    kind: str
    shapes: tuple[tuple[int | str, ...], ...]
    runs: int
    error: float
    reference: float

    @property
    def relative_error(self) -> float:
        """``error / reference``; 0 if there is no error at all."""
        return relative_error(self.error, self.reference)


@dataclass(frozen=True)
class _Observation:
    """What is observed at one place of a graph.

    Attributes:
        value: the node that is looked at.
        product: the matrix product that it is; None for a rounded result.
        exact, rounded: its operands; the result before and after rounding.
        sites: one for each of these.
        casts: how each is rounded.
        keys: which numbers each holds: the same key, the same statistics.
    """

    value: fx.Node
    product: Product | None
    exact: tuple[fx.Node, ...]
    rounded: tuple[fx.Node, ...]
    sites: tuple[Site, ...]
    casts: tuple[Cast | None, ...]
    keys: tuple[int, ...]


class Recorder:
    """The statistics of one graph's sites, gathered while it runs.

    The rewriting adds what is to be observed and inserts it (`insert`), the interpreter binds the graphs that come of
    that (`bind`). Numbers that several products read are measured once.

    Args:
        exact: compute the product of the unrounded operands wholly, whatever its size.
    """

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        self._observations: list[_Observation] = []
        self._keys: dict[tuple[fx.Node, Cast | None, str], int] = {}
        self._bound: set[int] = set()
        self._measured: set[int] = set()
        self.clear()

    def add_product(
        self, product: Product, exact: Sequence[fx.Node], sites: Sequence[Site], casts: Sequence[Cast | None]
    ) -> None:
        """Observe ``product``, whose operands were ``exact`` before they were rounded as ``casts`` say."""
        rounded = [cast(fx.Node, product.node.args[i]) for i in product.operands]
        self._add(_result_of(product), product, exact, rounded, sites, casts)

    def add_result(self, exact: fx.Node, rounded: fx.Node, site: Site, by: Cast) -> None:
        """Observe ``rounded``, the result ``exact`` of an operation or a product, rounded ``by`` a cast."""
        self._add(rounded, None, [exact], [rounded], [site], [by])

    def _add(
        self,
        value: fx.Node,
        product: Product | None,
        exact: Sequence[fx.Node],
        rounded: Sequence[fx.Node],
        sites: Sequence[Site],
        casts: Sequence[Cast | None],
    ) -> None:
        keys = [
            self._keys.setdefault((base(node), by, str(node.meta["val"].numel())), len(self._keys))
            for node, by in zip(exact, casts, strict=True)
        ]
        self._observations.append(
            _Observation(value, product, tuple(exact), tuple(rounded), tuple(sites), tuple(casts), tuple(keys))
        )

    def insert(self, graph: fx.Graph) -> None:
        """Put the observations into the graph that is being rewritten."""
        for number, observation in enumerate(self._observations):
            value, others = observation.value, _other_tensors(observation.product)
            arguments = (value, list(observation.exact), list(observation.rounded), others, number)
            with graph.inserting_after(value):
                node = graph.call_function(observe, arguments)
            node.meta = {**value.meta, "original_aten": observe}
            for user in list(value.users):
                if user is not node:
                    user.replace_input_with(value, node)

    def bind(self, gm: fx.GraphModule) -> None:
        """Let the observations in ``gm``, the forward or the backward of the graph, do their work.

        What is computed again in backward is not observed again.
        """
        for node in gm.graph.find_nodes(op="call_function", target=observe):
            number = node.args[-1]
            if number in self._bound:
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
            else:
                self._bound.add(number)
                node.target = self._observer(number)
        gm.recompile()

    def _observer(self, number: int) -> Callable[..., Tensor]:
        observation = self._observations[number]
        product = observation.product
        compare = None if product is None else _comparison(product, observation.value, self._exact)
        own = [i for i, key in enumerate(observation.keys) if key not in self._measured]
        self._measured |= set(observation.keys)

        @torch.no_grad()
        def observed(value: Tensor, exact: list[Tensor], rounded: list[Tensor], others: list[Tensor], _: int) -> Tensor:
            self._runs[number] += 1
            for i in own:
                by = observation.casts[i]
                statistics = measure(exact[i], rounded[i], by.format if by is not None else None)
                self._statistics.setdefault(observation.keys[i], []).append(statistics)
            if compare is not None:
                seed = (number << 32) + self._runs[number]  # other signs in every run: their errors average out
                self._errors.setdefault(number, []).append(compare(value, exact, others, seed))
            return value

        return observed

    def clear(self) -> None:
        """Forget what was measured."""
        self._runs: Counter[int] = Counter()
        self._errors: dict[int, list[tuple[float, float]]] = {}
        self._statistics: dict[int, list[Statistics]] = {}

    def results(self) -> tuple[list[SiteStatistics], list[ProductStatistics]]:
        """What was measured since the beginning or `clear`: the sites and products that ran, in the graph's order."""
        sites: list[SiteStatistics] = []
        products: list[ProductStatistics] = []
        statistics = {key: merge(parts) for key, parts in self._statistics.items()}
        for number, observation in enumerate(self._observations):
            if not self._runs[number]:
                continue
            place = None
            if observation.product is not None:
                place = len(products)
                products.append(self._product(number, observation))
            sites += [
                SiteStatistics(**vars(site), product=place, statistics=statistics[key])
                for site, key in zip(observation.sites, observation.keys, strict=True)
            ]
        return sites, products

    def _product(self, number: int, observation: _Observation) -> ProductStatistics:
        first, second = observation.sites
        errors, references = zip(*self._errors[number], strict=True)
        return ProductStatistics(
            first.path,
            first.operator,
            first.kind,
            (first.shape, second.shape),
            self._runs[number],
            math.hypot(*errors),
            math.hypot(*references),
        )


# -- the product of the unrounded operands -----------------------------------------------------------------------------


def _result_of(product: Product) -> fx.Node:
    """The node that holds the product: of a multiplication that a sum completes, the sum."""
    node = product.value
    while product.value.target is aten.mul.Tensor and len(node.users) == 1:
        (node,) = node.users
        if node.target in _SUMS and _is_of_product(node):
            return node
        if node.target not in (mark, torch.ops.prims.convert_element_type.default):
            break
    return product.value


def _other_tensors(product: Product | None) -> list[fx.Node]:
    """The arguments of a product's operator beside its operands that are tensors, in their order."""
    if product is None:
        return []
    arguments = enumerate(product.node.args)
    return [node for i, node in arguments if isinstance(node, fx.Node) and i not in product.operands]


def _comparison(product: Product, value: fx.Node, exact: bool) -> Callable[..., tuple[float, float]]:
    """A function that compares a run of ``product`` with that of the unrounded operands in float64.

    It takes what ``value`` was, the unrounded operands, the other tensors that the operator takes, and the seed of an
    estimate; it returns two norms: of the difference, and of the product of the unrounded operands. Whatever the
    operator adds is in neither. ``exact``: never estimate them.
    """
    multiply, mixing = _multiplication(product, value), _mixing(product, value)
    beta = product.node.kwargs.get("beta", 1)

    def compare(got: Tensor, operands: Sequence[Tensor], others: Sequence[Tensor], seed: int) -> tuple[float, float]:
        got, wide = got.double(), [operand.double() for operand in operands]
        addend = _addend(product, others)
        if addend is not None:
            got = got - beta * addend.double()
        if mixing is not None and not exact and got.shape[mixing.of_result] >= 8 * MIXTURES:
            mixed = partial(_mixed, signs=_signs(got.shape[mixing.of_result], seed, got.device))
            wide[mixing.operand] = mixed(wide[mixing.operand], mixing.of_operand)
            result = mixed(got, mixing.of_result)
            estimate = _estimated(got, result, result - multiply(wide, others))
            if all(map(math.isfinite, estimate)):
                return estimate
            wide = [operand.double() for operand in operands]
        reference = multiply(wide, others)
        return norm(got - reference), norm(reference)

    return compare


@dataclass(frozen=True)
class _Mixing:
    """A result is linear in its ``operand``: the same combinations along these two dimensions go with each other."""

    operand: int
    of_operand: int
    of_result: int


def _mixing(product: Product, value: fx.Node) -> _Mixing | None:
    node, packet = product.node, _packet(product)
    if packet in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.addbmm):
        return _Mixing(1, -1, -1)
    if packet is aten._grouped_mm:
        dims = [argument.meta["val"].dim() for argument in node.args[:2]]  # type: ignore[union-attr]
        return None if dims == [3, 2] else _Mixing(1, -1, -1)
    if packet is aten.convolution:
        transposed, groups = node.args[6], node.args[8]
        return _Mixing(1, 1 if transposed else 0, 1) if groups == 1 else None
    if packet is aten.convolution_backward:
        transposed, groups = node.args[7], node.args[9]
        if groups != 1:
            return None
        if value.args[1] == convolution.INPUT:
            return _Mixing(1, 0 if transposed else 1, 1)
        return _Mixing(0, 1, 1 if transposed else 0)
    return None


def _signs(size: int, seed: int, device: torch.device) -> Tensor:
    """Random signs, of shape (``size``, `MIXTURES`)."""
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randint(2, (size, MIXTURES), generator=generator) - 1).double().to(device)


def _mixed(values: Tensor, dim: int, signs: Tensor) -> Tensor:
    """Sums of ``values`` along ``dim``, one for each column of ``signs``."""
    return torch.tensordot(values, signs, dims=([dim % values.dim()], [0])).movedim(-1, dim)


def _estimated(result: Tensor, mixed_result: Tensor, mixed_error: Tensor) -> tuple[float, float]:
    """The norms of the error and of the exact product, which is the result less the error.

    For an error D and a vector g of random signs the mean of |Dg|^2 is |D|^2 (Hutchinson 1990), and that of (Rg)(Dg)
    is the inner product of R and D. The norm of the result itself is exact.
    """
    error = norm(mixed_error) / math.sqrt(MIXTURES)
    inner = float((mixed_result * mixed_error).sum()) / MIXTURES
    return error, math.sqrt(max(norm(result) ** 2 - 2 * inner + error**2, 0.0))


def _addend(product: Product, others: Sequence[Tensor]) -> Tensor | None:
    """What the operator adds to the product, in a shape that fits."""
    if _packet(product) in _WITH_ADDEND:
        return others[0]
    if _packet(product) is aten.convolution and others:
        return others[0].view(-1, *[1] * len(product.node.args[3]))  # type: ignore[arg-type]
    return None


def _multiplication(product: Product, value: fx.Node) -> Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]:
    """The product as a function of its operands in float64 and of the other tensors that its operator takes."""
    node, packet = product.node, _packet(product)
    if packet in _WITH_ADDEND:
        alpha = node.kwargs.get("alpha", 1)
        return lambda operands, _: packet(operands[0].new_zeros(1), *operands, beta=0, alpha=alpha)
    if packet is aten.convolution:
        return lambda operands, _: packet(*operands, None, *node.args[3:])
    if packet is aten.convolution_backward:
        return partial(_convolution_gradient, node.args, value.args[1])
    if packet is aten._grouped_mm:
        return lambda operands, others: _grouped(*operands, *others[:1])
    if packet is aten.mul and value is not product.value:
        return lambda operands, _: (operands[0] * operands[1]).sum(*value.args[1:])
    return lambda operands, _: packet(*operands)


def _packet(product: Product) -> Any:
    return cast(OpOverload, product.node.target).overloadpacket


def _convolution_gradient(
    arguments: Sequence[Any], index: int, operands: Sequence[Tensor], others: Sequence[Tensor]
) -> Tensor:
    """The gradient number ``index`` that a call of `aten.convolution_backward` with ``arguments`` computes.

    Of the argument that is no operand only the shape is used, and of that the channels are those of the operand.
    """
    gradient, operand = operands
    shape, transposed = list(others[0].shape), arguments[7]
    if index == convolution.INPUT:
        if arguments[9] == 1:
            shape[1] = operand.shape[0 if transposed else 1]
        tensors = gradient, operand.new_zeros(shape), operand
    else:
        if arguments[9] == 1:
            shape[1 if transposed else 0] = gradient.shape[1]
        tensors = gradient, operand, operand.new_zeros(shape)
    mask = [i == index for i in range(3)]
    return aten.convolution_backward(*tensors, None, *arguments[4:10], mask)[index]


def _grouped(a: Tensor, b: Tensor, ends: Tensor | None = None) -> Tensor:
    """The product of the groups of two matrices or batches, as in `torch.nn.functional.grouped_mm`; zero outside."""
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
