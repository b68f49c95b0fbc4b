"""Switches: roundings of a compiled model that an input turns on and off, so that one compilation serves all choices.

A graph with switches has one more input, a vector with one element for each *place*. Where a rounding would stand, the
operator `switch` takes the rounded value if the place is on, and the exact one if it is off.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fpsim.attention.flash import FlashAttention
from fpsim.compile_backend.plan import Site
from fpsim.policy import Policy
from fpsim.policy.policy import KINDS, ROLES

#: The fields of policies that have switches.
_FIELDS = {
    *("format", *ROLES, "output", *KINDS, "elementwise", "products", "rounding", "overflow", "scale", "transform"),
    *("skip", "modules", "attention", "gaps"),
}
#: The length of the input: the greatest number of places.
CAPACITY = 2**14

_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define("switch(Tensor exact, Tensor rounded, Tensor switches, int[] numbers) -> Tensor")
#: Takes ``rounded`` if any of the elements ``numbers`` of ``switches`` is on, and ``exact`` otherwise.
switch_op: Callable[..., Tensor] = torch.ops.fpsim.switch.default


@torch.library.impl(_library, "switch", "CompositeExplicitAutograd")
def _switch(exact: Tensor, rounded: Tensor, switches: Tensor, numbers: list[int]) -> Tensor:
    return torch.where(functools.reduce(operator.or_, (switches[n] for n in numbers)), rounded, exact)


@torch.library.register_fake("fpsim::switch", lib=_library)
def _switch_fake(exact: Tensor, rounded: Tensor, switches: Tensor, numbers: list[int]) -> Tensor:
    return torch.where(switches[0], rounded, exact)


@dataclass(frozen=True, eq=False)
class _Step:
    """A node of a graph, ready to be run.

    Attributes:
        node: the node.
        number: its place among the nodes.
        inputs: the numbers of the nodes that it takes.
        always: whether it is run even if nothing takes its value.
        args: its arguments: numbers of nodes as `_Value`, and constants; None where nodes are nested in lists or stand
            among the keyword arguments.
    """

    node: Any  # an fx.Node, whose arguments have a wide type
    number: int
    inputs: tuple[int, ...]
    always: bool
    args: tuple[Any, ...] | None


@dataclass(frozen=True)
class _Value:
    number: int


class Lazy:
    """Runs a graph with switches, and computes only the values that they take.

    Most runs have few places on. Their cost is then about that of the unrounded graph. It does without
    `torch.fx.Interpreter`, which takes as long as the operators of a small model.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        nodes = list(gm.graph.nodes)
        self._numbers: dict[Any, int] = {node: number for number, node in enumerate(nodes)}
        self._steps = [self._step(node) for node in nodes]
        self._inputs = [step.number for step in self._steps if step.node.op == "placeholder"]
        self._switches = {
            step.number: tuple(self._numbers[each] for each in step.node.args[:2])
            for step in self._steps
            if step.node.target is switch_op
        }
        state = next((step.node.args[2] for step in self._steps if step.node.target is switch_op), None)
        self._state = None if state is None else self._numbers[state]

    def _step(self, node: fx.Node) -> _Step:
        args: list[Any] = [_Value(self._numbers[a]) if isinstance(a, fx.Node) else a for a in node.args]
        inputs = tuple(self._numbers[each] for each in node.all_input_nodes)
        nested: list[fx.Node] = []
        fx.node.map_arg(([a for a in node.args if not isinstance(a, fx.Node)], node.kwargs), nested.append)
        always = node.op == "output" or node.is_impure()
        return _Step(node, self._numbers[node], inputs, always, None if nested else tuple(args))

    def __call__(self, *args: Any) -> Any:
        """The results of the graph for these inputs."""
        values: dict[int, Any] = dict(zip(self._inputs, args, strict=True))
        on = set() if self._state is None else set(values[self._state].nonzero().flatten().tolist())
        taken = {
            number: operands[0 if on.isdisjoint(self._steps[number].node.args[3]) else 1]
            for number, operands in self._switches.items()
        }
        result = None
        for step, last_uses in self._plan(taken):
            if step.number in taken:
                values[step.number] = values[taken[step.number]]
            elif step.node.op == "output":
                result = fx.node.map_arg(step.node.args[0], lambda node: values[self._numbers[node]])
            elif step.node.op != "placeholder":
                values[step.number] = self._value(step, values)
            for number in last_uses:
                del values[number]
        return result

    def _plan(self, taken: Mapping[int, int]) -> list[tuple[_Step, list[int]]]:
        """The steps to run, in their order, and the values that are used for the last time by each."""
        needed: set[int] = set()
        plan = []
        for step in reversed(self._steps):
            if step.always or step.number in needed:
                inputs = (taken[step.number],) if step.number in taken else step.inputs
                last_uses = [number for number in inputs if number not in needed]
                needed.update(inputs)
                plan.append((step, last_uses))
        return plan[::-1]

    def _value(self, step: _Step, values: Mapping[int, Any]) -> Any:
        node = step.node
        if node.op == "get_attr":
            return functools.reduce(getattr, str(node.target).split("."), self._gm)
        if node.op != "call_function" or not callable(node.target):
            raise NotImplementedError(f"a graph with switches has no {node.op}, such as {node.target}")
        if step.args is not None:
            return node.target(*(values[a.number] if type(a) is _Value else a for a in step.args), **node.kwargs)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda each: values[self._numbers[each]])
        return node.target(*args, **kwargs)


@dataclass(frozen=True, order=True)
class Place:
    """The sites of a module that share a switch.

    Attributes:
        path: the module, ``""`` for the root.
        step: ``fprop``, ``dgrad`` or ``wgrad`` for products; ``forward`` or ``backward`` for other operations.
        role: ``activation``, ``weight``, ``gradient``, ``output`` or ``result``.
        policy: the number of the policy among those of `Switches`.
    """

    path: str
    step: str
    role: str
    policy: int = 0

    @property
    def is_forward(self) -> bool:
        """Whether it belongs to the forward pass."""
        return self.step in ("fprop", "forward")


class Switches:
    """The places of one compiled model, and which of them are on.

    A place gets its number when a graph with it is compiled. At most one policy may be on at one site.

    Args:
        policies: the policies whose roundings are switched.
        is_blended: whether elements are parts from 0 to 1 of the errors of rounding, for `functional`, which then
            differentiates by them. Scales then multiply operands, and no product stands twice.

    Attributes:
        numbers: the number of every place that a graph has.
        state: the vector that is the input of graphs: bool, shape (`CAPACITY`,).
        overflowed: the numbers of places where a rounding gave an infinity or NaN (`functional` fills it).

    Raises:
        ValueError: a policy has fields without switches (accumulators, reductions, saved copies, attention in tiles),
            or scales that depend on other steps; or there are several, which treat attention differently, or of which
            one rounds results of operations that are no products.
    """

    def __init__(self, policies: Collection[Policy], *, is_blended: bool = False) -> None:
        self.policies = tuple(policies)
        self.is_blended = is_blended
        self.numbers: dict[Place, int] = {}
        self.state = torch.zeros(CAPACITY, dtype=torch.bool)
        self.overflowed: set[int] = set()
        for policy in self.policies:
            if unknown := sorted(policy.stated_fields - _FIELDS):
                raise ValueError(f"what {unknown[0]} states has no switches: leave {unknown[0]} out of the policy")
            if policy.is_timed:
                raise ValueError(
                    "scales that depend on other steps have no switches: leave history, every and calibrated out of "
                    "the policy"
                )
            if any(isinstance(attention, FlashAttention) for attention in policy.attentions):
                raise ValueError(
                    "attention in tiles has no switches: take 'round' or 'keep' in place of the flash attention of the "
                    "policy"
                )
            if len(self.policies) > 1 and policy.elementwise:
                raise ValueError("results of elementwise operations have no switches here: leave elementwise out")
            if policy.attentions != self.policies[0].attentions:
                raise ValueError(
                    "policies that are switched must treat attention alike: give all of them the same attention "
                    "({'format': 'nvfp4'} instead of the preset nvfp4, which keeps attention unrounded)"
                )

    def number(self, site: Site, policy: int) -> int:
        """The number of the switch of ``site``, which ``policy`` rounds."""
        place = Place(site.path, site.step, site.role, policy)
        if place not in self.numbers and len(self.numbers) == CAPACITY:
            raise ValueError(f"the model has more than {CAPACITY} places to switch: measure a part of it")
        return self.numbers.setdefault(place, len(self.numbers))

    def turn(self, places: Collection[Place]) -> None:
        """Turn ``places`` on, and all others off; backward passes under way keep what was on."""
        state = torch.zeros(CAPACITY, dtype=torch.bool)
        state[[self.numbers[place] for place in places]] = True
        self.state = state.to(self.state.device)
