"""Recording the statistics of one graph for `fpsim.profile`.

While a graph is rewritten, an identity is inserted behind every matrix product and every rounded result. It also takes
the operands before and after rounding, so that they are available there, in backward too. The interpreter of
``"fpsim_eager"`` replaces each identity by a function that measures its arguments.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fpsim.attention.ops import TENSORS, compute
from fpsim.casts import ROUNDING_OPERATORS, Cast, in_range_of_format
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.views import base
from fpsim.compile_backend.observe.lost_sums import (
    SumStatistics,
    measure_reduction,
    measure_sums,
    merge_sums,
    observe_reduction,
    observe_sum,
)
from fpsim.compile_backend.observe.product_error import Comparison, comparison, other_tensors, result_of
from fpsim.compile_backend.observe.rounding_statistics import Statistics, measure, measure_groups, merge, relative_error
from fpsim.compile_backend.plan import Site, Sum

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define(
    "observe(Tensor value, Tensor[] exact, Tensor[] rounded, Tensor[] factors, Tensor[] others, int number) -> Tensor"
)
_library.impl("observe", lambda value, *_: value.clone(), "CompositeExplicitAutograd")
_library._register_fake("observe", lambda value, *_: torch.empty_like(value))

#: The identity of ``value``, the result that observation ``number`` measures. Its other arguments are the operands
#: before (``exact``) and after rounding (``rounded``), the ``factors`` of those with timed scales, and the ``others``,
#: the further tensors of the operator. Those before a transform follow those before rounding in ``exact``.
observe: OpOverload = torch.ops.fpsim.observe.default


@dataclass(frozen=True)
class SiteStatistics(Site):
    """A site and the statistics of rounding there, over all runs.

    Attributes:
        product: the position of its matrix product among the products of the profile; None for other operations and
            for results of products.
        statistics: counts, norms and histograms. Values that several products read are rounded once and counted once:
            their sites have the same statistics.
    """

    product: int | None
    statistics: Statistics


@dataclass(frozen=True)
class ProductStatistics:
    """A matrix product, over all of its runs.

    Attributes:
        path, operator, kind: those of its sites (`Site`).
        shapes: the shapes of its two operands.
        runs: how many times it ran.
        error: the Frobenius norm of its result minus the product of the unrounded operands in float64, over all runs.
            An addend (a bias) is subtracted first, and the rounding of the result is not included.
        reference: the Frobenius norm of the product of the unrounded operands.
        sum: what its accumulator lost; None if its sums are torch's.

    For products with 128 columns or more (convolutions: 32 images or channels) both norms are unbiased estimates from
    12 random combinations of the columns. The standard deviation of ``error**2`` is at most 0.41 of its value, and
    less if the error has many directions.
    """

    path: str
    operator: str
    kind: str
    shapes: tuple[tuple[int | str, ...], ...]
    runs: int
    error: float
    reference: float
    sum: SumStatistics | None = None

    @property
    def relative_error(self) -> float:
        """``error / reference``; 0 if there is no error at all."""
        return relative_error(self.error, self.reference)


@dataclass(frozen=True)
class ReductionStatistics:
    """A sum that is no product, over all of its runs.

    Attributes:
        path, operator, kind: those of its `Sum`. The operator ``var`` has two sums: of numbers, and of squares.
        sum: what its accumulator lost.
    """

    path: str
    operator: str
    kind: str
    sum: SumStatistics

    @property
    def relative_error(self) -> float:
        """``sum.relative_error``."""
        return self.sum.relative_error


@dataclass(frozen=True)
class _Observation:
    """A product or a rounded result that is observed.

    Attributes:
        value: the node that holds the product, times scales outside of it, or the rounded result.
        unscaled: the node that holds the product alone; ``value`` itself if no scale is outside.
        product: the matrix product; None for a rounded result.
        exact, rounded: the operands, or the result, before and after rounding.
        sites: one for each operand, or the one of the result.
        keys: one for each site. Sites with the same key hold the same numbers, and have the same statistics.
        operands: the operands of the product before a transform and rounding; empty for a rounded result.
    """

    value: fx.Node
    unscaled: fx.Node
    product: Product | None
    exact: tuple[fx.Node, ...]
    rounded: tuple[fx.Node, ...]
    sites: tuple[Site, ...]
    keys: tuple[int, ...]
    operands: tuple[fx.Node, ...]


def measure_cast(
    exact: Tensor, rounded: Tensor, by: Cast | None, axes: Sequence[int] = (-1,), factor: Tensor | None = None
) -> Statistics:
    """The statistics of ``exact``, rounded to ``rounded`` by the cast ``by``; None stands for no rounding.

    ``factor`` is the one in use if the scale is timed.

    For a scaled cast, subnormals and saturations are counted among the scaled numbers. Everything else is measured on
    the numbers before scaling and after unscaling. A cast with a transform changes the numbers themselves: nothing is
    counted in its format. One of the two may have the wider dtype of its scales or of a transform.
    """
    wide = torch.promote_types(exact.dtype, rounded.dtype)
    grid, exact, rounded = None if by is None else by.grid, exact.to(wide), rounded.to(wide)
    if by is not None and by.transform is not None:
        return measure(exact, rounded)
    if by is None or by.scale is None:
        return measure(exact, rounded, grid)
    scaled = measure(*in_range_of_format(exact, rounded, by, axes, factor), grid)
    is_counted = by.scale.rule != "power_of_two" and not by.scale.is_timed and exact.numel()
    groups = measure_groups(exact, by, axes) if is_counted else {}
    return replace(measure(exact, rounded), subnormals=scaled.subnormals, saturations=scaled.saturations, **groups)


def axes_of(site: Site, dims: int) -> tuple[int, ...]:
    """The axes of an operand of ``dims`` axes along which its product sums; the last one if there is no product."""
    if site.kind is None or site.role == "output":
        return site.contracted or (-1,)
    return tuple(axis for axis in site.contracted if axis < dims)


def _key_of(node: fx.Node, site: Site) -> tuple[Any, ...]:
    """A key of the statistics of ``node``: equal for rearrangements of one value that are rounded alike."""
    if site.cast is not None and site.cast.has_axis:
        return node, site.cast, site.contracted
    return base(node), site.cast, str(node.meta["val"].numel())


def _is_timed(site: Site) -> bool:
    return site.cast is not None and site.cast.scale is not None and site.cast.scale.is_timed


def _factor_of(rounded: fx.Node) -> fx.Node:
    """The node of the factor in use with which ``rounded``, or the value that it rearranges, was scaled."""
    # A rounding of one node is the conversion of a transformed operand to the dtype of its product.
    while rounded.target not in ROUNDING_OPERATORS or len(rounded.all_input_nodes) < 2:
        (rounded, *_) = rounded.all_input_nodes
    return rounded.all_input_nodes[-1]


class Recorder:
    """The statistics of one graph's sites, gathered while the graph runs.

    The rounding pass adds observations (`add_product`, `add_result`) and inserts them into the graph (`insert`). The
    interpreter makes the inserted nodes measure (`bind`). Values that several products read are measured once.

    Args:
        exact: compare whole products, whatever their size.
    """

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact
        self._observations: list[_Observation] = []
        self._attentions: dict[str, tuple[tuple[str, Site], ...]] = {}
        self._reductions: list[Sum] = []
        self._keys: dict[tuple[Any, ...], int] = {}
        self._comparisons: dict[int, Comparison] = {}
        self._bound: set[int] = set()
        self._bound_sums: set[tuple[OpOverload, int]] = set()
        self._measured: set[int] = set()
        self.clear()

    def add_product(
        self,
        product: Product,
        exact: Sequence[fx.Node],
        sites: Sequence[Site],
        before: Sequence[fx.Node],
        rounded: Sequence[fx.Node],
        scaled: fx.Node | None = None,
    ) -> None:
        """Observe ``product``.

        Args:
            exact: its operands before a transform and rounding.
            sites: their sites.
            before: its operands after a transform and before rounding.
            rounded: its operands after rounding, with all their scales.
            scaled: the node that holds the product times the scales outside of it; None if there are none.
        """
        self._add(scaled or result_of(product), result_of(product), product, before, rounded, sites, exact)

    def add_result(self, exact: fx.Node, rounded: fx.Node, site: Site) -> None:
        """Observe ``exact``, the result of an operation or a product, and ``rounded``, the same after rounding."""
        self._add(rounded, rounded, None, [exact], [rounded], [site])

    def add_attention(self, node: fx.Node, sites: Sequence[tuple[str, Site]]) -> None:
        """Observe ``node``, a call of attention in tiles: the names of its roundings, and their sites."""
        self._attentions[node.name] = tuple(sites)

    def add_reduction(self, reduction: Sum) -> int:
        """Observe a sum that is no product. Returns the number of its observation."""
        self._reductions.append(reduction)
        return len(self._reductions) - 1

    def _add(
        self,
        value: fx.Node,
        unscaled: fx.Node,
        product: Product | None,
        exact: Sequence[fx.Node],
        rounded: Sequence[fx.Node],
        sites: Sequence[Site],
        operands: Sequence[fx.Node] = (),
    ) -> None:
        keys = [
            self._keys.setdefault(_key_of(node, site), len(self._keys)) for node, site in zip(exact, sites, strict=True)
        ]
        self._observations.append(
            _Observation(
                value, unscaled, product, tuple(exact), tuple(rounded), tuple(sites), tuple(keys), tuple(operands)
            )
        )

    def number_of(self, product: Product) -> int:
        """The number of the observation of ``product``."""
        return next(i for i, observation in enumerate(self._observations) if observation.product is product)

    def insert(self, graph: fx.Graph) -> None:
        """Insert the observations into the graph that is being rewritten."""
        for number, observation in enumerate(self._observations):
            value, others = observation.value, other_tensors(observation.product)
            if observation.product is not None:  # an accumulator may take the place of its node
                self._comparisons[number] = comparison(observation.product, observation.unscaled, self._exact)
            factors = [
                _factor_of(node)
                for node, site in zip(observation.rounded, observation.sites, strict=True)
                if _is_timed(site)
            ]
            exact = [*observation.exact, *observation.operands]
            arguments = (value, exact, list(observation.rounded), factors, others, number)
            with graph.inserting_after(value):
                node = graph.call_function(observe, arguments)
            node.meta = {**value.meta, "original_aten": observe}
            for user in list(value.users):
                if user is not node:
                    user.replace_input_with(value, node)

    def bind(self, gm: fx.GraphModule) -> None:
        """Replace the observations in ``gm``, the forward or backward part of the graph, by functions that measure.

        An observation that backward recomputes is removed there, so that it is measured once.
        """
        for node in gm.graph.find_nodes(op="call_function", target=observe):
            number = node.args[-1]
            if number in self._bound:
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)
            else:
                self._bound.add(number)
                node.target = self._observer(number)
        for target, observer in ((observe_sum, self._observe_sum), (observe_reduction, self._observe_reduction)):
            for node in gm.graph.find_nodes(op="call_function", target=target):
                key = target, node.args[-1]
                if key in self._bound_sums:
                    node.replace_all_uses_with(node.args[0])
                    gm.graph.erase_node(node)
                else:
                    self._bound_sums.add(key)
                    node.target = observer
        for node in gm.graph.nodes:
            if node.name in self._attentions and node.target in TENSORS:
                node.target = functools.partial(self._attend, node.target, node.name)
                node.target.__name__ = node.name
        gm.recompile()

    @torch.no_grad()
    def _attend(self, operator: Callable[..., Any], name: str, *arguments: Any) -> tuple[Tensor, ...]:
        """Run attention in tiles, and measure all of its roundings."""
        casts = {each: site.cast for each, site in self._attentions[name]}

        def watch(each: str, exact: Tensor, rounded: Tensor) -> None:
            if each in casts:
                statistics = measure_cast(exact, rounded, casts[each])
                self._of_attentions.setdefault((name, each), []).append(statistics)

        return compute(operator, *arguments, watch=watch)

    @torch.no_grad()
    def _observe_sum(self, result: Tensor, *arguments: Any) -> Tensor:
        *own, number = arguments
        self._sums.setdefault(number, []).append(measure_sums(*own))
        return result

    @torch.no_grad()
    def _observe_reduction(self, result: Tensor, *arguments: Any) -> Tensor:
        *own, number = arguments
        self._lost_by_reductions.setdefault(number, []).append(measure_reduction(*own))
        return result

    def _observer(self, number: int) -> Callable[..., Tensor]:
        observation = self._observations[number]
        compare = self._comparisons.get(number)
        own = [i for i, key in enumerate(observation.keys) if key not in self._measured]
        self._measured |= set(observation.keys)

        @torch.no_grad()
        def observed(
            value: Tensor,
            exact: list[Tensor],
            rounded: list[Tensor],
            factors: list[Tensor],
            others: list[Tensor],
            _: int,
        ) -> Tensor:
            self._runs[number] += 1
            waiting = iter(factors)
            given = [next(waiting) if _is_timed(site) else None for site in observation.sites]
            for i in own:
                site = observation.sites[i]
                statistics = measure_cast(exact[i], rounded[i], site.cast, axes_of(site, exact[i].dim()), given[i])
                self._statistics.setdefault(observation.keys[i], []).append(statistics)
            if compare is not None:
                seed = (number << 32) + self._runs[number]  # other signs in every run, so that errors average out
                self._errors.setdefault(number, []).append(compare(value, exact[len(rounded) :], others, seed))
            return value

        return observed

    def clear(self) -> None:
        """Forget all measurements."""
        self._runs: Counter[int] = Counter()
        self._errors: dict[int, list[tuple[float, float]]] = {}
        self._sums: dict[int, list[SumStatistics]] = {}
        self._lost_by_reductions: dict[int, list[SumStatistics]] = {}
        self._statistics: dict[int, list[Statistics]] = {}
        self._of_attentions: dict[tuple[str, str], list[Statistics]] = {}

    def results(self) -> tuple[list[SiteStatistics], list[ProductStatistics]]:
        """The statistics since the beginning or `clear`: those of sites and products that ran, in the graph's order."""
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
        for node, own in self._attentions.items():
            sites += [
                SiteStatistics(**vars(site), product=None, statistics=merge(self._of_attentions[node, name]))
                for name, site in dict(own).items()
                if (node, name) in self._of_attentions
            ]
        return sites, products

    def reductions(self) -> list[ReductionStatistics]:
        """The statistics of the sums that are no products, since the beginning or `clear`."""
        found = [(each, merge_sums(self._lost_by_reductions.get(i, ()))) for i, each in enumerate(self._reductions)]
        return [ReductionStatistics(each.path, each.operator, each.kind, lost) for each, lost in found if lost]

    def _product(self, number: int, observation: _Observation) -> ProductStatistics:
        first, second = observation.sites
        errors, references = zip(*self._errors[number], strict=True)
        return ProductStatistics(
            first.path,
            first.operator,
            first.kind or "",
            (first.shape, second.shape),
            self._runs[number],
            math.hypot(*errors),
            math.hypot(*references),
            merge_sums(self._sums.get(number, ())),
        )
