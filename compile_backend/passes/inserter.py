"""Inserting roundings into a graph: one for each value and cast, shared by all users."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

import fpsim.rounding.inductor
import fpsim.scaling.inductor  # noqa: F401  (operators must have their lowerings before Inductor meets them)
from fpsim.casts import Cast, apply_cast, check_cast, outer_scale
from fpsim.compile_backend.graph import convolution
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.metadata import describe, order_in_memory, value_of
from fpsim.compile_backend.graph.products import Axes, product_operator
from fpsim.compile_backend.graph.recognition import is_product
from fpsim.compile_backend.graph.sources import Source
from fpsim.compile_backend.graph.views import is_view, mapped_axes
from fpsim.compile_backend.observe.recorder import Recorder
from fpsim.compile_backend.plan import Site
from fpsim.formats import FloatFormat
from fpsim.rounding.carriers import CARRIERS
from fpsim.rounding.ops import random_key_op, random_words_op
from fpsim.scaling.groups import across
from fpsim.scaling.ops import SCALE_OPERATORS, outer_scale_op

aten = torch.ops.aten

# The metadata that a rounding copies from the rounded value, and from the node that needs the rounding.
_COPIED = ("partitioner_tag", "recompute", "ac_graph_id", "seq_nr", "stack_trace")
_PLACES = ("nn_module_stack", "fwd_nn_module_stack", "stack_trace")

# The operators of a cast that are not elementwise. Backward keeps their results, which are small.
_OF_WHOLE_TENSORS = (*SCALE_OPERATORS.values(), outer_scale_op, aten.select.int)


class Inserter:
    """Inserts rounding nodes into a graph, one for each value and cast.

    Args:
        graph: the graph that is rewritten.
        sources: the sources of its nodes; inserted nodes are added.
        seed: the input that is the seed of stochastic rounding.
        recorder: observes every rounded value and product.
    """

    def __init__(
        self, graph: fx.Graph, sources: dict[fx.Node, Source], seed: fx.Node | None, recorder: Recorder | None
    ) -> None:
        self.graph = graph
        self.sources = sources
        self.roundings: dict[tuple[fx.Node, Cast, Axes, bool], fx.Node] = {}
        self.outer_scales: dict[tuple[fx.Node, Cast, Axes], fx.Node] = {}
        # The calls into which joint ones were split, as `convolution.split` describes them.
        self.split_calls: dict[fx.Node, tuple[int, fx.Node | None]] = {}
        self.seed = seed
        self.key_count = 0
        self.recorder = recorder

    def round_operand(
        self, product: Product, position: int, cast: Cast, contracted: Axes, outside: bool = False
    ) -> fx.Node | None:
        """Round one operand of ``product``, and of no other product that the same call computes.

        Args:
            contracted: the axes of the operand along which the product sums.
            outside: whether the operand's outer scale multiplies the result (`fpsim.casts.outer_scale`).

        Returns:
            The node of that scale; None if there is none.
        """
        operand: fx.Node = product.node.args[position]  # type: ignore[assignment]
        rounded = self.rounded(operand, cast, product.node, contracted, outside)
        if rounded is operand:
            return None
        if _is_joint(product.node) and product.node not in self.split_calls:
            self.split_calls |= convolution.split(product.node)
        product.node.update_arg(position, rounded)
        return self._outer_scale(operand, cast, product.node, contracted) if outside else None

    def release_shapes(self) -> None:
        """Replace operands of which only the shape is used, so that backward keeps none of them for its shape alone.

        A tensor of the same shape that backward has anyway takes their place. Calls that then have the same operands
        are merged again.
        """
        for call, (position, other) in self.split_calls.items():
            operand: fx.Node = call.args[position]  # type: ignore[assignment]
            if other is not None:
                operand = other.args[position]  # type: ignore[assignment]
            elif not self._is_available_in_backward(operand):
                operand = next((r for (value, *_), r in self.roundings.items() if value is operand), operand)
            call.update_arg(position, operand)
        convolution.join(self.split_calls)

    def rounded(self, value: fx.Node, cast: Cast, near: fx.Node, axes: Axes = (), outside: bool = False) -> fx.Node:
        """The node that holds ``value`` rounded.

        Rounding commutes with rearrangement, so that the base of a view is rounded and then rearranged again: the
        operand of fprop and its transpose in dgrad and wgrad share one rounding. If the scales of the cast lie along
        ``axes``, this holds for views in which these axes are axes of the base. ``near`` is the node that needs it.
        ``outside`` is that of `round_operand`.
        """
        if _is_exact(value.meta["val"].dtype, cast):
            return value
        axes = _axes_of_scales(cast, axes, value.meta["val"].dim())
        key = value, cast, axes, outside
        if key not in self.roundings:
            axes_of_base = _axes_of_base(value, axes, cast) if is_view(value) else None
            if axes_of_base is not None:
                self.roundings[key] = self._rearranged(value, cast, near, axes_of_base, outside)
            else:
                self.roundings[key] = self._insert(value, cast, near, axes, outside)
        return self.roundings[key]

    def _outer_scale(self, value: fx.Node, cast: Cast, near: fx.Node, axes: Axes) -> fx.Node:
        """The node of the outer scale of ``value``; that of its base if the scale is one of the whole tensor."""
        assert cast.scale is not None, "the cast has a scale"
        axes = _axes_of_scales(cast, axes, value.meta["val"].dim())
        axes_of_base = _axes_of_base(value, axes, cast) if is_view(value) and cast.scale.kind != "row" else None
        if axes_of_base is not None:
            return self._outer_scale(value.args[0], cast, near, axes_of_base)  # type: ignore[arg-type]
        key = value, cast, axes
        if key not in self.outer_scales:
            self.outer_scales[key] = outer_scale(value, cast, axes=axes, call=self.calls_after(value, near))
        return self.outer_scales[key]

    def rounded_result(self, value: fx.Node, near: fx.Node, site: Site) -> fx.Node:
        """The node that holds ``value``, the result of an operation, rounded by the cast of ``site``; as `rounded`."""
        assert site.cast is not None
        result = self.rounded(value, site.cast, near, site.contracted)
        if self.recorder is not None:
            self.recorder.add_result(value, result, site)
        return result

    def round_result(self, node: fx.Node, site: Site) -> None:
        """Replace ``node``, for all of its users, by the node that holds it rounded by the cast of ``site``."""
        assert site.cast is not None
        users = list(node.users)
        result = self._insert(node, site.cast, node, site.contracted)
        for user in users:
            user.replace_input_with(node, result)
        if self.recorder is not None:
            self.recorder.add_result(node, result, site)

    def _rearranged(self, view: fx.Node, cast: Cast, near: fx.Node, axes: Axes, outside: bool) -> fx.Node:
        source = self.rounded(view.args[0], cast, near, axes, outside)  # type: ignore[arg-type]
        with self.graph.inserting_after(view):
            copy = self.graph.call_function(
                view.target,  # type: ignore[arg-type]
                map_arg(view.args, lambda node: source if node is view.args[0] else node),
                view.kwargs,
            )
        copy.meta = {**view.meta, "val": value_of(copy)}
        self.sources[copy] = self.sources[view]
        return copy

    def _insert(self, value: fx.Node, cast: Cast, near: fx.Node, axes: Axes = (), outside: bool = False) -> fx.Node:
        """A new node that holds ``value`` rounded. It follows ``value`` or, if that is an input, all inputs."""
        check_cast(value.meta["val"].dtype, cast)
        key = self._random_key(value) if cast.is_stochastic else None
        call = self.calls_after(value, near, key)
        exact = value
        order = order_in_memory(value) if key is None else None  # random numbers are drawn in the usual order
        if order is not None:
            exact = call(aten.permute.default, exact, order)
            axes = tuple(sorted(order.index(axis) for axis in axes))
        rounded = apply_cast(exact, cast, axes=axes, key=key, call=call, outside=outside)
        if order is not None:
            rounded = call(aten.permute.default, rounded, [order.index(i) for i in range(len(order))])
        return rounded

    def calls_after(self, value: fx.Node, near: fx.Node, key: fx.Node | None = None) -> Callable[..., fx.Node]:
        """A function that inserts calls, one after the other, behind ``value``: as parts of its rounding for ``near``.

        They follow ``value`` or, if that is an input, all inputs and ``key``.
        """
        last = value
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        if key is not None and last.op == "placeholder":
            last = key
        meta = {key: value.meta[key] for key in _COPIED if key in value.meta}
        meta |= {name: near.meta[name] for name in _PLACES if name in near.meta}
        pointwise = dict(meta)
        if self._is_available_in_backward(value):
            pointwise.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)

        def call(target: Callable[..., Any], *arguments: Any) -> fx.Node:
            nonlocal last
            with self.graph.inserting_after(last):
                last = self.graph.call_function(target, arguments)
            last.meta = dict(meta if target in _OF_WHOLE_TENSORS else pointwise)
            if target is random_words_op:  # as large as the tensor, and cheap to draw again
                last.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
            describe(last)
            self.sources[last] = self.sources[value]
            return last

        return call

    def _random_key(self, value: fx.Node) -> fx.Node:
        """The key for one stochastic rounding of ``value``: it is made of the seed and the number of the rounding.

        The seed is an input of the graph, not a node: a rounding that backward recomputes draws the same numbers.
        """
        assert self.seed is not None, "the policy is stochastic, so the graph has a seed"
        self.key_count += 1
        last_input = next(node for node in self.graph.nodes if node.next.op != "placeholder")
        with self.graph.inserting_after(last_input):
            key = self.graph.call_function(random_key_op, (self.seed, self.key_count))
        describe(key)
        device = value.meta["val"].device
        if device != key.meta["val"].device:
            with self.graph.inserting_after(key):
                key = self.graph.call_function(torch.ops.prims.device_put.default, (key, device))
            describe(key)
        return key

    def _is_available_in_backward(self, value: fx.Node) -> bool:
        """Whether backward has ``value`` anyway, so that rounding it again is cheaper than keeping the rounded copy.

        Backward has all parameters, and the values that the derivative of an elementwise function uses: the result of a
        softmax, or of a ReLU, whose zeros it needs. (A table of booleans would be smaller, but Inductor's C++ writes
        booleans a hundred times slower than numbers.)
        """
        if self.sources.get(value, Source.NONE) == Source.PARAMETER:
            return True
        for user in value.users:
            if is_view(user):
                if self._is_available_in_backward(user):
                    return True
            elif not is_product(user) and self._is_used_with_gradients(user):
                return True
        return False

    def _is_used_with_gradients(self, node: fx.Node) -> bool:
        if self.sources.get(node, Source.NONE) & Source.TANGENT:
            return True
        is_condition = isinstance(node.meta.get("val"), Tensor) and node.meta["val"].dtype == torch.bool
        return is_condition and any(map(self._is_used_with_gradients, node.users))


def _is_exact(carrier: torch.dtype, cast: Cast) -> bool:
    """Whether the cast changes no value of ``carrier``: each, infinities included, is a value of the format."""
    if not isinstance(cast.format, FloatFormat) or cast.overflow == "sat_finite":
        return False
    return CARRIERS[carrier].is_subset_of(cast.format)


def _axes_of_scales(cast: Cast, axes: Axes, dims: int) -> Axes:
    """The axes along which the scales of ``cast`` lie, counted from the front; empty if the cast has no axis.

    Square tiles are the same along both axes of a matrix: the later one stands for both.
    """
    if not cast.has_axis or cast.scale is None:
        return ()
    counted = tuple(sorted(axis % dims for axis in axes if axis < dims))
    if cast.scale.is_square and len(counted) == 1 and dims > 1:
        return (max(counted[0], across(counted[0], dims)),)
    return counted


def _axes_of_base(view: fx.Node, axes: Axes, cast: Cast) -> Axes | None:
    """The axes of the base along which the scales of ``cast`` lie; None if the groups of the view are not its groups.

    Tiles also need the axis that forms matrices with the other one.
    """
    if cast.scale is None or cast.scale.kind not in ("tile", "column") or len(axes) != 1:
        return mapped_axes(view, axes)
    dims, base_dims = (node.meta["val"].dim() for node in (view, view.args[0]))  # type: ignore[union-attr]
    if dims < 2:
        return None
    mapped, other = mapped_axes(view, axes), mapped_axes(view, (across(axes[0], dims),))
    return mapped if mapped and other and (across(mapped[0], base_dims),) == other else None


def _is_joint(call: fx.Node) -> bool:
    entry = product_operator(call.target)
    return entry is not None and entry.is_joint
