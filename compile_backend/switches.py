"""Switches: roundings of a compiled model that an input turns on and off, so that one compilation serves all choices.

A graph with switches has one more input, a vector with one element for each *place*. Where a rounding would stand, the
operator `switch` takes the rounded value if the place is on, and the exact one if it is off.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection
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


class Lazy(fx.Interpreter):
    """Runs a graph with switches, and computes only the values that they take.

    Most runs have few places on. Their cost is then about that of the unrounded graph.
    """

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The results of the graph for these inputs."""
        inputs = dict(zip(self.graph.find_nodes(op="placeholder"), args, strict=True))
        calls = self.graph.find_nodes(op="call_function", target=switch_op)
        on = set() if not calls else set(inputs[calls[0].args[2]].nonzero().flatten().tolist())
        self.taken = {call: call.args[0 if on.isdisjoint(call.args[3]) else 1] for call in calls}
        self.needed: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            if node.op == "output" or node.is_impure():
                self.needed.add(node)
            if node in self.needed:
                self.needed.update([self.taken[node]] if node in self.taken else node.all_input_nodes)
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; None if nothing needs it."""
        if n in self.taken:
            return self.env.get(self.taken[n])
        return super().run_node(n) if n in self.needed or n.op == "placeholder" else None


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
