"""A module under a policy as a pure function that `torch.func` can differentiate.

`torch.func` runs a compiled module uncompiled. This file keeps the forward graph that the backend rewrites, a graph of
aten operators, replaces its roundings by `fpsim.round` with its straight-through derivative, and calls the graph with
other parameters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo import config as dynamo_config
from torch._dynamo import mark_dynamic
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.func import functional_call
from torch.utils import _pytree as pytree

from fpsim.accumulators.ops import accumulate_op, accumulate_scaled_op
from fpsim.accumulators.parts import scaled_part_op
from fpsim.accumulators.sums import accumulate_sum_op
from fpsim.attention.ops import flash_op
from fpsim.compile_backend.compiling import compile_with_rounding
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph.sources import find_input
from fpsim.compile_backend.passes.epilogue import times_scale_op
from fpsim.compile_backend.switches import Switches, switch_op
from fpsim.compile_backend.torch_settings import apply_settings
from fpsim.policy import Policy
from fpsim.rounding.ops import round_op
from fpsim.scaling.ops import SCALE_OPERATORS, outer_scale_op, round_scaled_op
from fpsim.scaling.scale import NV_RULES, parse_scale
from fpsim.tensor_functions import straight_through
from fpsim.transforms.names import parse_transform
from fpsim.transforms.ops import round_transformed_op, transform_operand_op, transform_parameters_op

aten, prims = torch.ops.aten, torch.ops.prims

#: From parameters and buffers by name, positional arguments and keyword arguments to the module's result. With
#: switches there is a fourth argument, their vector.
Call = Callable[..., Any]


def functional(module: nn.Module, policy: Policy, switches: Switches | None = None) -> Call:
    """``module`` as a function of its parameters, buffers and arguments, with its forward products rounded.

    Values are those of the module compiled by backend ``"fpsim_eager"`` under ``policy``. Derivatives, of any order and
    in both modes, are those of the straight-through surrogate: every rounding passes them unchanged. The policy's
    casts for backward are ignored, stochastic and timed ones too.

    Args:
        module: any uncompiled module. It is traced for every new shape of its arguments.
        policy: the casts of every product and operation. In forward it must not be stochastic, and its scales must not
            depend on other steps, because such a function has a different surrogate at every call.
        switches: blended ones, for its roundings. The function then takes a vector s of the shape of their state,
            with floating-point numbers: where a rounding of x has the error e, the value is x + s e. So the function is
            differentiable in s. Errors are constants in all derivatives. Where an error is infinite or NaN, it
            counts as zero, and `Switches.overflowed` has the number of its place.

    Raises:
        ValueError: a policy that is stochastic or has timed scales in forward; when called, a policy that does not fit
            the module (see `compile_backend`).
        UnroundedError: when called, products that cannot be rounded.
        RuntimeError: when called, a result that is an argument or a view of one.
    """
    if switches is None:
        policy = policy.of_forward
    if policy.is_timed:
        raise ValueError(
            "a loss whose scales depend on other steps is another function at every call, so that its derivatives are "
            "not defined: give a policy without history, every and calibrated"
        )
    if policy.is_stochastic:
        raise ValueError(
            "a stochastically rounded loss is a different function at every call, so that its derivatives are not "
            "defined: give a policy that is deterministic in forward"
        )
    traced: dict[Any, Traced] = {}

    def call(
        state: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], weights: Tensor | None = None
    ) -> Any:
        given = (dict(state), tuple(args), dict(kwargs))
        leaves, spec = pytree.tree_flatten(given)
        key = (spec, tuple(map(_facts, leaves)), tuple(part.training for part in module.modules()))
        if key not in traced:
            traced[key] = trace(module, policy, given, switches)
            _make_differentiable(traced[key].graph, switches)
        return traced[key](leaves if weights is None else [*leaves, weights])

    return call


@dataclass(frozen=True)
class Traced:
    """A graph, and how its inputs and outputs correspond to the leaves of arguments and results.

    Attributes:
        graph: the rewritten graph.
        inputs: for each input the position of a leaf, a size of a leaf, or a constant.
        outputs: for each leaf of the result the position of an output, or a constant.
        spec: the structure of the result.
        has_seed: whether the seed of stochastic rounding is one more leaf behind those of the arguments.
    """

    graph: fx.GraphModule
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    spec: pytree.TreeSpec
    has_seed: bool = False

    def __call__(self, leaves: Sequence[Any]) -> Any:
        results = self.graph(*(i.of(leaves) if isinstance(i, _Leaf | _Size) else i for i in self.inputs))
        values = [results[o.position] if isinstance(o, _Leaf) else o for o in self.outputs]
        return pytree.tree_unflatten(values, self.spec)


@dataclass(frozen=True)
class _Leaf:
    position: int

    def of(self, leaves: Sequence[Any]) -> Any:
        return leaves[self.position]


@dataclass(frozen=True)
class _Size:
    position: int
    axis: int

    def of(self, leaves: Sequence[Any]) -> Any:
        return leaves[self.position].shape[self.axis]


def _facts(leaf: Any) -> Any:
    return (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def trace(
    module: nn.Module,
    policy: Policy,
    given: tuple[Any, ...],
    switches: Switches | None = None,
    ranges: Mapping[tuple[int, int], tuple[int, int]] | None = None,
) -> Traced:
    """The forward graph for arguments of these shapes, traced outside of all transforms of `torch.func`.

    Args:
        module, policy, switches: as for `functional`.
        given: parameters and buffers by name, positional arguments, and keyword arguments.
        ranges: the sizes that vary: from a leaf of ``given`` and its axis to the least and the greatest size.
    """
    runs: list[tuple[fx.GraphModule, Sequence[Any], Any]] = []
    seeds: list[int] = []
    apply_settings()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        seeds.append(len(gm.graph.find_nodes(op="placeholder")))
        return compile_with_rounding(
            gm, example_inputs, policy, interpret=True, keep=lambda *run: runs.append(run), switches=switches
        )

    def call(module: nn.Module, state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return functional_call(module, state, args, kwargs, tie_weights=True)

    logging_calls = {function for function in vars(logging.Logger).values() if callable(function)}
    quiet = dynamo_config.patch(ignore_logger_methods=logging_calls)  # a logged warning must not break the graph
    with temporarily_clear_interpreter_stack(), torch.no_grad(), quiet, _tensors_kept(module):
        parameters = dict(module.named_parameters(remove_duplicate=False))
        example = pytree.tree_map_only(Tensor, _example, given)
        example[0].update((name, nn.Parameter(value)) for name, value in example[0].items() if name in parameters)
        leaves, _ = pytree.tree_flatten(example)
        for (position, axis), (least, greatest) in (ranges or {}).items():
            mark_dynamic(leaves[position], axis, min=least, max=greatest)
        outcome = torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(module, *example)
    if switches is not None:
        leaves.append(switches.state)
    values, spec = pytree.tree_flatten(outcome)
    ((graph, inputs, outputs),) = runs
    if policy.is_stochastic:
        seed = graph.graph.find_nodes(op="placeholder").index(find_input(graph.graph, seeds[0]))
        leaves.append(inputs[seed])
    _refuse_unknown(inputs, leaves, values, outputs)
    places = _with_sizes(graph, _places(inputs, leaves))
    return Traced(graph, places, _places(values, outputs), spec, policy.is_stochastic)


@contextmanager
def _tensors_kept(module: nn.Module) -> Iterator[None]:
    """Put the parameters and buffers of ``module`` back at the end.

    Where a module has two names, Dynamo (torch 2.13) leaves it with the tensors of `functional_call`.
    """
    homes: list[Any] = [home for part in module.modules() for home in (part._parameters, part._buffers)]
    before = [dict(home) for home in homes]
    try:
        yield
    finally:
        for home, tensors in zip(homes, before, strict=True):
            home.update(tensors)


def _with_sizes(graph: fx.GraphModule, places: tuple[Any, ...]) -> tuple[Any, ...]:
    """``places`` with the inputs of ``graph`` that are symbolic sizes as sizes of leaves."""
    inputs = [node.meta.get("val") for node in graph.graph.find_nodes(op="placeholder")]
    sizes = {
        str(size): _Size(place.position, axis)
        for value, place in zip(inputs, places, strict=True)
        if isinstance(value, Tensor) and isinstance(place, _Leaf)
        for axis, size in enumerate(value.shape)
    }
    return tuple(
        sizes[str(value)] if isinstance(value, torch.SymInt) else place
        for value, place in zip(inputs, places, strict=True)
    )


def _refuse_unknown(
    inputs: Sequence[Any], leaves: Sequence[Any], values: Sequence[Any], outputs: Sequence[Any]
) -> None:
    """Refuse tensors that depend on the arguments, and that the graph would keep as constants of the example."""
    known, returned = set(map(id, leaves)), set(map(id, outputs))
    storages = {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}
    for value in inputs:
        if isinstance(value, Tensor) and id(value) not in known and value.untyped_storage()._cdata in storages:
            raise RuntimeError(
                "torch.compile replaces an argument by another view of it: give the module contiguous copies"
            )
    for value in values:
        if isinstance(value, Tensor) and id(value) not in returned:
            raise RuntimeError(
                f"the module returns a tensor of shape {tuple(value.shape)} that its graph does not compute: it is an "
                "argument or a view of one. Leave it out, or return a copy (.clone())"
            )


def _example(leaf: Tensor) -> Tensor:
    """A tensor of the shape, dtype and device of ``leaf``, without the transforms around it."""
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)


def _places(values: Sequence[Any], among: Sequence[Any]) -> tuple[Any, ...]:
    """For each of ``values`` its position in ``among``, or the value itself if it is not in there."""
    positions = {id(value): position for position, value in enumerate(among) if isinstance(value, Tensor)}
    return tuple(_Leaf(positions[id(value)]) if id(value) in positions else value for value in values)


def _make_differentiable(gm: fx.GraphModule, switches: Switches | None) -> None:
    """Give the graph differentiable rounding, and take out the final writes of new values into buffers.

    Raises:
        UnroundedError: an operator of fpsim has no entry in `_WITH_DERIVATIVE`. Torch would take its derivative
            to be 0.
    """
    for node in list(gm.graph.nodes):
        if node.target is aten.copy_.default and not node.users:
            gm.graph.erase_node(node)
        elif node.target is switch_op and switches is not None:
            node.target = _blended(switches)
        elif node.target in _WITH_DERIVATIVE:
            node.target = _WITH_DERIVATIVE[node.target]
        elif getattr(node.target, "namespace", None) == "fpsim":
            raise UnroundedError(f"{node.target} has no derivative here, and torch would take it to be 0")
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _without_derivative(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``operator`` of detached tensors: a scale, or what the changes of both operands of a product share."""

    def call(*arguments: Any) -> Tensor:
        return operator(*(each.detach() if isinstance(each, Tensor) else each for each in arguments))

    return call


def _passed_through(operator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``operator``, a rounding of its first argument, with the derivative 1."""

    def call(x: Tensor, *arguments: Any) -> Tensor:
        return straight_through(x, operator(x.detach(), *arguments))

    return call


def _accumulated(a: Tensor, b: Tensor, *arguments: Any) -> Tensor:
    """A product with a narrow accumulator, with the derivative of the product."""
    return straight_through(a @ b, accumulate_op(a.detach(), b.detach(), *arguments))


def _attended(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, seed: None, causal: bool, scale: float, *others: Any
) -> tuple[Tensor, None]:
    """Attention in tiles, with the derivative of exact attention; without L, which only its own backward pass reads."""
    value, _ = flash_op(q.detach(), k.detach(), v.detach(), mask, seed, causal, scale, *others)
    scores = (q @ k.mT) * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask
    is_empty = scores.amax(-1, keepdim=True) == -torch.inf
    weights = torch.softmax(torch.where(is_empty, 0.0, scores), -1)
    return straight_through(torch.where(is_empty, 0.0, weights) @ v, value), None


def _summed(x: Tensor, axes: list[int], keepdim: bool, *arguments: Any) -> Tensor:
    """A sum with a narrow accumulator, with the derivative of the sum."""
    value = accumulate_sum_op(x.detach(), axes, keepdim, *arguments)
    return straight_through(x.float().sum(axes, keepdim) if axes else x.float(), value)


def _part(
    x: Tensor, element: str, rounding: str, overflow: str, scale: str, axes: list[int], part: str, source: str, _: None
) -> Tensor:
    """The scales of a rounded operand, or its elements, whose derivative is 1: `_accumulated_parts` takes them so.

    It is the inverse of the scale that multiplies the result of the product, if there is one.
    """
    exact = x.detach()
    value = scaled_part_op(exact, element, rounding, overflow, scale, axes, part, source)
    if part == "scales":
        return value
    if parse_scale(scale).rule in NV_RULES:  # type: ignore[union-attr]
        x = x / outer_scale_op(exact, element, scale, axes, source)
    return straight_through(x.to(value.dtype), value)


def _accumulated_parts(a: Tensor, b: Tensor, scales_a: Tensor, scales_b: Tensor, block: int, *arguments: Any) -> Tensor:
    """A product of elements and scales of blocks, with the derivative of the product of the operands."""
    value = accumulate_scaled_op(a.detach(), b.detach(), scales_a, scales_b, block, *arguments)
    decoded = [
        straight_through(x, x.detach() * scales.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis]))
        for x, scales, axis in ((a, scales_a, -1), (b, scales_b, -2))
    ]
    return straight_through(decoded[0] @ decoded[1], value)


def _transformed(x: Tensor, name: str, number: int, axis: int, source: str, *parameters: Tensor) -> Tensor:
    """A changed operand, with the derivative of the change, which is linear."""
    value = transform_operand_op(x.detach(), name, number, axis, source, *parameters)
    transform = parse_transform(name)
    assert transform is not None, "a node has the name of a transform"
    return straight_through(transform.linear(x.to(value.dtype), number, axis, *parameters), value)


def _rounded_with_scale(
    x: Tensor,
    element: str,
    rounding: str,
    overflow: str,
    scale: str,
    axes: list[int],
    source: str,
    words: None = None,
    factor: None = None,
    outside: bool = False,
) -> Tensor:
    """``round_scaled_op`` with a derivative: 1, or the inverse of the scale that it leaves out."""
    exact = x.detach()
    value = round_scaled_op(exact, element, rounding, overflow, scale, axes, source, words, factor, outside)
    if outside:
        x = (x / outer_scale_op(exact, element, scale, axes, source)).to(value.dtype)
    return straight_through(x, value)


def _blended(switches: Switches) -> Callable[..., Tensor]:
    """The operator `switch` for weights: the exact value plus the part of the error that the weight names."""

    def blended(exact: Tensor, rounded: Tensor, weights: Tensor, numbers: list[int]) -> Tensor:
        error = rounded.detach() - exact.detach()
        finite = error.isfinite()
        if not bool(finite.all()):
            switches.overflowed.update(numbers)
            error = error.where(finite, 0)
        (number,) = numbers
        return exact + (weights[number] * error).to(exact.dtype)

    return blended


#: The operators of fpsim that stand in a forward graph, and one of prims, with the derivatives of the surrogate.
_WITH_DERIVATIVE: dict[Any, Callable[..., Any]] = {
    round_op: _passed_through(round_op),
    round_transformed_op: _passed_through(round_transformed_op),
    round_scaled_op: _rounded_with_scale,
    transform_operand_op: _transformed,
    accumulate_op: _accumulated,
    flash_op: _attended,
    scaled_part_op: _part,
    accumulate_scaled_op: _accumulated_parts,
    accumulate_sum_op: _summed,
    times_scale_op: torch.mul,
    prims.convert_element_type.default: Tensor.to,  # it has no derivative under transforms of torch.func
    **{op: _without_derivative(op) for op in (*SCALE_OPERATORS.values(), outer_scale_op, transform_parameters_op)},
}
