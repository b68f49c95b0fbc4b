"""Watching one graph: what `fpsim.profile` counts is gathered here.

While a graph is rewritten, an identity is inserted behind every matrix product and every rounded result. It also takes
the operands before and after rounding, so that they are at hand there, in backward too. The interpreter of
``"fpsim_eager"`` runs, in the place of each identity, a function that measures what it is given.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from fpsim.casts import Cast, in_range_of_format
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.views import base
from fpsim.compile_backend.observe.product_error import comparison, other_tensors, result_of
from fpsim.compile_backend.observe.statistics import Statistics, measure, merge, relative_error
from fpsim.compile_backend.plan import Site

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("observe(Tensor value, Tensor[] exact, Tensor[] rounded, Tensor[] others, int number) -> Tensor")
_library.impl("observe", lambda value, *_: value.clone(), "CompositeExplicitAutograd")
_library._register_fake("observe", lambda value, *_: torch.empty_like(value))

#: The identity of ``value``, what observation ``number`` looks at. It takes the operands ``exact`` and ``rounded``, and
#: the ``others`` that the operator has.
observe: OpOverload = torch.ops.fpsim.observe.default


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

    Of products with 128 columns or more (convolutions: 32 images or channels) both are estimates, from 12 random
    combinations of the columns: without bias, and with a standard deviation of ``error**2`` of at most 0.41 of it, the
    less, the more directions the error has.
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
        keys: which numbers each holds: the same key, the same statistics.
    """

    value: fx.Node
    product: Product | None
    exact: tuple[fx.Node, ...]
    rounded: tuple[fx.Node, ...]
    sites: tuple[Site, ...]
    keys: tuple[int, ...]


def measure_cast(exact: Tensor, rounded: Tensor, by: Cast | None) -> Statistics:
    """What the cast ``by`` did to ``exact``; None left it as it is.

    Of a scaled cast, subnormals and saturations are those of the scaled numbers, and all else is of the numbers as
    they come and go.
    """
    if by is None or by.scale is None:
        return measure(exact, rounded, by.format if by is not None else None)
    scaled = measure(*in_range_of_format(exact, rounded, by), by.format)
    return replace(measure(exact, rounded), subnormals=scaled.subnormals, saturations=scaled.saturations)


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

    def add_product(self, product: Product, exact: Sequence[fx.Node], sites: Sequence[Site]) -> None:
        """Observe ``product``, whose operands were ``exact`` before they were rounded; ``sites``: one for each."""
        rounded = [cast(fx.Node, product.node.args[i]) for i in product.operands]
        self._add(result_of(product), product, exact, rounded, sites)

    def add_result(self, exact: fx.Node, rounded: fx.Node, site: Site) -> None:
        """Observe ``rounded``, the rounded result ``exact`` of an operation or a product."""
        self._add(rounded, None, [exact], [rounded], [site])

    def _add(
        self,
        value: fx.Node,
        product: Product | None,
        exact: Sequence[fx.Node],
        rounded: Sequence[fx.Node],
        sites: Sequence[Site],
    ) -> None:
        keys = [
            self._keys.setdefault((base(node), site.cast, str(node.meta["val"].numel())), len(self._keys))
            for node, site in zip(exact, sites, strict=True)
        ]
        self._observations.append(_Observation(value, product, tuple(exact), tuple(rounded), tuple(sites), tuple(keys)))

    def insert(self, graph: fx.Graph) -> None:
        """Put the observations into the graph that is being rewritten."""
        for number, observation in enumerate(self._observations):
            value, others = observation.value, other_tensors(observation.product)
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
        compare = None if product is None else comparison(product, observation.value, self._exact)
        own = [i for i, key in enumerate(observation.keys) if key not in self._measured]
        self._measured |= set(observation.keys)

        @torch.no_grad()
        def observed(value: Tensor, exact: list[Tensor], rounded: list[Tensor], others: list[Tensor], _: int) -> Tensor:
            self._runs[number] += 1
            for i in own:
                statistics = measure_cast(exact[i], rounded[i], observation.sites[i].cast)
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
            first.kind or "",
            (first.shape, second.shape),
            self._runs[number],
            math.hypot(*errors),
            math.hypot(*references),
        )
