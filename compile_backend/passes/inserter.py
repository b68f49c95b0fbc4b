"""Inserting roundings into a graph: one for each value and cast, shared by all users."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg
from torch.utils.checkpoint import CheckpointPolicy

import fpsim.rounding.inductor
import fpsim.scaling.inductor
import fpsim.transforms.inductor  # noqa: F401  (operators must have their lowerings before Inductor meets them)
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
from fpsim.compile_backend.scale_states import timed_factor_op
from fpsim.compile_backend.switches import Switches, switch_op
from fpsim.formats import FloatFormat
from fpsim.rounding.carriers import CARRIERS
from fpsim.rounding.ops import SOURCE, random_keys_op, random_words_op, round_op
from fpsim.scaling.groups import across
from fpsim.scaling.ops import SCALE_OPERATORS, outer_scale_op
from fpsim.transforms.ops import transform_operand_op, transform_parameters_op
from fpsim.transforms.transform import Transform

aten, prims = torch.ops.aten, torch.ops.prims

# The metadata that a rounding copies from the rounded value, and from the node that needs the rounding.
_COPIED = ("partitioner_tag", "recompute", "ac_graph_id", "seq_nr", "stack_trace")
_PLACES = ("nn_module_stack", "fwd_nn_module_stack", "stack_trace")

# The operators of a cast that are not elementwise. Backward keeps their results, which are small.
_OF_WHOLE_TENSORS = (*SCALE_OPERATORS.values(), outer_scale_op, aten.select.int, aten.amax.default, timed_factor_op)


class Inserter:
    """Inserts rounding nodes into a graph, one for each value and cast.

    Args:
        graph: the graph that is rewritten.
        sources: the sources of its nodes; inserted nodes are added.
        seed: the input that is the seed of stochastic rounding.
        handle: the input that tells where the states of timed scales are.
        recorder: observes every rounded value and product.
        switches: the switches of all roundings, and the input that holds them.
    """

    def __init__(
        self,
        graph: fx.Graph,
        sources: dict[fx.Node, Source],
        seed: fx.Node | None,
        handle: fx.Node | None,
        recorder: Recorder | None,
        switches: tuple[Switches, fx.Node] | None = None,
    ) -> None:
        self.graph = graph
        self.sources = sources
        self.roundings: dict[tuple[fx.Node, Cast, Axes, bool], fx.Node] = {}
        self.outer_scales: dict[tuple[fx.Node, Cast, Axes], fx.Node] = {}
        self.transforms: dict[tuple[Any, ...], fx.Node] = {}
        self.factors: dict[tuple[fx.Node, Cast], fx.Node] = {}
        # The calls into which joint ones were split, as `convolution.split` describes them.
        self.split_calls: dict[fx.Node, tuple[int, fx.Node | None]] = {}
        self.seed = seed
        self.keys: fx.Node | None = None
        self.handle = handle
        self.timed_sites: Counter[tuple[str, str]] = Counter()
        self.recorder = recorder
        self.switches = switches
        self.policy_number = 0

    def round_operand(
        self, product: Product, position: int, site: Site, transformed: fx.Node | None = None
    ) -> fx.Node | None:
        """Round one operand of ``product``, and of no other product that the same call computes.

        Args:
            position: that of the operand among the arguments of the call.
            site: the operand, with its cast or without one, and whether its scale multiplies the result.
            transformed: the operand after the transform of the product, if there is one.

        Returns:
            The node of the scale that multiplies the result (`fpsim.casts.outer_scale`); None if there is none.
        """
        operand: fx.Node = product.node.args[position]  # type: ignore[assignment]
        exact = rounded = transformed or operand
        if site.cast is not None:
            if transformed is not None:
                check_cast(operand.meta["val"].dtype, site.cast)
            rounded = self.switch(exact, self.rounded(exact, site, product.node, site.contracted), [site])
        rounded = self._in_dtype(rounded, operand.meta["val"].dtype, product.node)
        if rounded is operand:
            return None
        if _is_joint(product.node) and product.node not in self.split_calls:
            self.split_calls |= convolution.split(product.node)
        product.node.update_arg(position, rounded)
        if site.cast is None or not site.epilogue:
            return None
        scale = self._outer_scale(exact, site.cast, product.node, site.contracted)
        if self.switches is None:
            return scale
        call, like = self.calls_after(scale, product.node), scale.meta["val"]
        sizes = [n if isinstance(n, int) else call(aten.sym_size.int, scale, i) for i, n in enumerate(like.shape)]
        one = call(aten.full.default, sizes, 1.0)
        with_dtype = (
            one if one.meta["val"].dtype == like.dtype else call(prims.convert_element_type.default, one, like.dtype)
        )
        return self.switch(with_dtype, scale, [site], after=with_dtype)

    @property
    def is_blended(self) -> bool:
        """Whether the switches are parts of errors (`Switches.is_blended`)."""
        return self.switches is not None and self.switches[0].is_blended

    def switch(
        self, exact: fx.Node, rounded: fx.Node, sites: Sequence[Site], *, after: fx.Node | None = None
    ) -> fx.Node:
        """The node that is ``rounded`` if any of ``sites`` is on, else ``exact``; ``rounded`` without switches.

        It follows ``after``, or else ``rounded``.
        """
        if self.switches is None or rounded is exact:
            return rounded
        switches, state = self.switches
        numbers = [switches.number(site, self.policy_number) for site in sites if site.cast is not None]
        return self.calls_after(after or rounded, rounded)(switch_op, exact, rounded, state, numbers)

    def transformed(
        self, operands: Sequence[fx.Node], axes: Sequence[int], transform: Transform, near: fx.Node
    ) -> list[fx.Node]:
        """The operands of the product ``near``, which sums over one of ``axes`` of each, transformed.

        Products with the same operands share them.
        """
        parameters: tuple[fx.Node, ...] = ()
        name = str(transform)
        if transform.has_parameters:
            first, second = operands
            arguments = (first, second, name, list(axes), SOURCE)
            parameters = (self._shared(transform_parameters_op, arguments, operands, near),)
        return [
            self._transformed(x, axis, (name, number), parameters, near)
            for number, (x, axis) in enumerate(zip(operands, axes, strict=True))
        ]

    def _transformed(
        self, value: fx.Node, axis: int, how: tuple[str, int], parameters: tuple[fx.Node, ...], near: fx.Node
    ) -> fx.Node:
        """``value`` transformed along ``axis``. A view of which this is an axis of the base is one of the result."""
        axes_of_base = mapped_axes(value, (axis,)) if is_view(value) else None
        if axes_of_base is None or not _same_length(value, axis, axes_of_base[0]):
            return self._shared(
                transform_operand_op, (value, *how, axis, SOURCE, *parameters), [value, *parameters], near
            )
        source = self._transformed(value.args[0], axes_of_base[0], how, parameters, near)  # type: ignore[arg-type]
        key = (value, source)
        if key not in self.transforms:
            with self.graph.inserting_before(near):
                self.transforms[key] = self._view_of(value, source)
        return self.transforms[key]

    def _shared(
        self, target: Callable[..., Any], arguments: tuple[Any, ...], inputs: Sequence[fx.Node], near: fx.Node
    ) -> fx.Node:
        """The node that holds the result of a call, before ``near``; equal calls have one node."""
        key = (target, *(_same(each) if isinstance(each, fx.Node) else str(each) for each in arguments))
        if key not in self.transforms:
            with self.graph.inserting_before(near):
                node = self.graph.call_function(target, arguments)
            node.meta = self._meta(inputs[0], near)
            if all(self._is_available_in_backward(each) for each in inputs):
                node.meta.setdefault("recompute", CheckpointPolicy.PREFER_RECOMPUTE)
            describe(node)
            self.sources[node] = functools.reduce(operator.or_, (self.sources[each] for each in inputs))
            self.transforms[key] = node
        return self.transforms[key]

    def _in_dtype(self, value: fx.Node, dtype: torch.dtype, near: fx.Node) -> fx.Node:
        """``value``, rounded once to the dtype of the product that reads it, if a transform made it wider."""
        if value.meta["val"].dtype == dtype:
            return value
        name = CARRIERS[dtype].name
        rounded = self._shared(round_op, (value, name, "nearest_even", "ovf_inf", SOURCE), [value], near)
        return self._shared(prims.convert_element_type.default, (rounded, dtype), [rounded], near)

    def part(self, rounded: fx.Node, target: Callable[..., Any], arguments: tuple[Any, ...]) -> fx.Node:
        """A call that computes a part of ``rounded``, with its metadata and behind it; equal calls have one node."""
        key = (target, *map(str, arguments))
        if key not in self.transforms:
            with self.graph.inserting_after(rounded):
                node = self.graph.call_function(target, arguments)
            node.meta = {name: value for name, value in rounded.meta.items() if name not in ("val", "tensor_meta")}
            describe(node)
            self.sources[node] = self.sources[rounded]
            self.transforms[key] = node
        return self.transforms[key]

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

    def rounded(self, value: fx.Node, site: Site, near: fx.Node, axes: Axes) -> fx.Node:
        """The node that holds ``value`` rounded by the cast of ``site``.

        Rounding commutes with rearrangement, so that the base of a view is rounded and then rearranged again: the
        operand of fprop and its transpose in dgrad and wgrad share one rounding. If the scales of the cast lie along
        ``axes``, this holds for views in which these axes are axes of the base. ``near`` is the node that needs it.
        """
        cast = site.cast
        assert cast is not None, "the value is rounded"
        if _is_exact(value.meta["val"].dtype, cast):
            return value
        axes = _axes_of_scales(cast, axes, value.meta["val"].dim())
        key = value, cast, axes, site.epilogue
        if key not in self.roundings:
            axes_of_base = _axes_of_base(value, axes, cast) if is_view(value) else None
            if axes_of_base is not None:
                self.roundings[key] = self._rearranged(value, site, near, axes_of_base)
            else:
                self.roundings[key] = self._insert(value, site, near, axes)
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
            factor = self.factors.get((value, cast))
            call = self.calls_after(value, near, start=factor)
            self.outer_scales[key] = outer_scale(value, cast, axes=axes, factor=factor, call=call)
        return self.outer_scales[key]

    def rounded_result(self, value: fx.Node, near: fx.Node, site: Site) -> fx.Node:
        """The node that holds ``value``, the result of an operation, rounded by the cast of ``site``; as `rounded`."""
        result = self.switch(value, self.rounded(value, site, near, site.contracted), [site])
        if self.recorder is not None:
            self.recorder.add_result(value, result, site)
        return result

    def round_result(self, node: fx.Node, site: Site) -> None:
        """Replace ``node``, for all of its users, by the node that holds it rounded by the cast of ``site``."""
        users = list(node.users)
        result = self.switch(node, self._insert(node, site, node, site.contracted), [site])
        for user in users:
            user.replace_input_with(node, result)
        if self.recorder is not None:
            self.recorder.add_result(node, result, site)

    def _rearranged(self, view: fx.Node, site: Site, near: fx.Node, axes: Axes) -> fx.Node:
        source = self.rounded(view.args[0], site, near, axes)  # type: ignore[arg-type]
        with self.graph.inserting_after(view):
            return self._view_of(view, source)

    def _view_of(self, view: fx.Node, source: fx.Node) -> fx.Node:
        """A new node that rearranges ``source`` as ``view`` does its base."""
        copy = self.graph.call_function(
            view.target,  # type: ignore[arg-type]
            map_arg(view.args, lambda node: source if node is view.args[0] else node),
            view.kwargs,
        )
        copy.meta = {**view.meta, "val": value_of(copy)}
        self.sources[copy] = self.sources[view]
        return copy

    def _insert(self, value: fx.Node, site: Site, near: fx.Node, axes: Axes) -> fx.Node:
        """A new node that holds ``value`` rounded. It follows ``value`` or, if that is an input, all inputs."""
        cast = site.cast
        assert cast is not None, "the value is rounded"
        check_cast(value.meta["val"].dtype, cast)
        key = self.random_key(value) if cast.is_stochastic else None
        is_timed = cast.scale is not None and cast.scale.is_timed
        inputs_end = next(node for node in self.graph.nodes if node.next.op != "placeholder") if is_timed else None
        call = self.calls_after(value, near, key or inputs_end, start=self.factors.get((value, cast)))
        exact = value
        order = order_in_memory(value) if key is None and _groups_permute(cast, axes) else None
        if order is not None:
            exact = call(aten.permute.default, exact, order)
            axes = tuple(sorted(order.index(axis) for axis in axes))
        factor = None
        if is_timed:
            factor = functools.partial(self._timed_factor, value, site, call)
        rounded = apply_cast(exact, cast, axes=axes, key=key, factor=factor, call=call, outside=site.epilogue)
        if order is not None:
            rounded = call(aten.permute.default, rounded, [order.index(i) for i in range(len(order))])
        return rounded

    def calls_after(
        self, value: fx.Node, near: fx.Node, after: fx.Node | None = None, start: fx.Node | None = None
    ) -> Callable[..., fx.Node]:
        """A function that inserts calls, one after the other, behind ``value``: as parts of its rounding for ``near``.

        They follow ``value`` or, if that is an input, all inputs and ``after``; or ``start``, which depends on it.
        """
        last = start or value
        while last.op == "placeholder" and last.next.op == "placeholder":
            last = last.next
        if after is not None and last.op == "placeholder":
            last = after
        meta = self._meta(value, near)
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
            if target is timed_factor_op:  # the factor is another one after the step
                last.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            describe(last)
            self.sources[last] = self.sources[value]
            return last

        return call

    def _meta(self, value: fx.Node, near: fx.Node) -> dict[str, Any]:
        """The metadata of a node that is computed from ``value`` for the node ``near``."""
        meta = {key: value.meta[key] for key in _COPIED if key in value.meta}
        return meta | {name: near.meta[name] for name in _PLACES if name in near.meta}

    def _timed_factor(self, value: fx.Node, site: Site, call: Callable[..., fx.Node], amax: fx.Node) -> fx.Node:
        """The factor in use for ``value``, whose largest magnitude is ``amax``; all products that read it share it."""
        cast = site.cast
        assert cast is not None, "the value is rounded"
        if (value, cast) in self.factors:
            return self.factors[value, cast]
        name = f"{site.path or '(root)'} {site.role}"
        self.timed_sites[name, site.direction] += 1
        if self.timed_sites[name, site.direction] > 1:
            name = f"{name} {self.timed_sites[name, site.direction]}"
        names = (name, site.direction, cast.format.name, str(cast.scale))
        self.factors[value, cast] = call(timed_factor_op, amax, self.handle, *names, SOURCE)
        return self.factors[value, cast]

    def random_key(self, value: fx.Node) -> fx.Node:
        """The key for one stochastic rounding of ``value``: it is made of the seed and the number of the rounding.

        The seed is an input of the graph, not a node: a rounding that backward recomputes draws the same numbers.
        """
        assert self.seed is not None, "the policy is stochastic, so the graph has a seed"
        if self.keys is None:
            last_input = next(node for node in self.graph.nodes if node.next.op != "placeholder")
            with self.graph.inserting_after(last_input):
                self.keys = self.graph.call_function(random_keys_op, (self.seed, 0))
        count = self.keys.args[1] + 1  # type: ignore[operator]
        self.keys.args = (self.seed, count)
        describe(self.keys)
        with self.graph.inserting_after(self.keys):
            key = self.graph.call_function(operator.getitem, (self.keys, count - 1))
        describe(key)
        for node in (self.keys, key):
            node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
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


def _same_length(view: fx.Node, axis: int, axis_of_base: int) -> bool:
    """Whether an axis of a view has all elements of that of its base; one that is expanded has not."""
    base: fx.Node = view.args[0]  # type: ignore[assignment]
    return statically_known_true(view.meta["val"].shape[axis] == base.meta["val"].shape[axis_of_base])


def _same(node: fx.Node) -> Any:
    """A key that is the same for views with the same arguments of the same value."""
    return (node.target, _same(node.args[0]), str(node.args[1:])) if is_view(node) else node  # type: ignore[arg-type]


def _is_exact(carrier: torch.dtype, cast: Cast) -> bool:
    """Whether the cast changes no value of ``carrier``: each, infinities included, is a value of the format."""
    if not isinstance(cast.format, FloatFormat) or cast.overflow == "sat_finite":
        return False
    return CARRIERS[carrier].is_subset_of(cast.format)


def _axes_of_scales(cast: Cast, axes: Axes, dims: int) -> Axes:
    """The axes along which the scales of ``cast`` lie, counted from the front; empty if the cast has no axis.

    Square tiles are the same along both axes of a matrix: the later one stands for both. Of three axes, the first one
    forms matrices with the second, and the second with the third (`fpsim.scaling.groups.across`): it stands for itself.
    """
    if not cast.has_axis or cast.scale is None:
        return ()
    counted = tuple(sorted(axis % dims for axis in axes if axis < dims))
    if cast.scale.is_square and len(counted) == 1 and dims > 1:
        other = across(counted[0], dims)
        return (max(counted[0], other),) if across(other, dims) == counted[0] else counted
    return counted


def _groups_permute(cast: Cast, axes: Axes) -> bool:
    """Whether a tensor may be permuted before ``cast`` is applied along the permuted ``axes``, and back afterwards.

    The scales of tiles, columns, channels, groups and of blocks along several axes depend on the order of the axes.
    Random numbers do too: they are drawn in row-major order.
    """
    if cast.transform is not None and len(axes) > 1:
        return False
    kind = "tensor" if cast.scale is None else cast.scale.kind
    return kind in ("tensor", "row") or (kind == "block" and len(axes) <= 1)


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
