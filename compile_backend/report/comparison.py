"""Comparing the products of an eager run with the plan of the graphs that fpsim rewrote, by the sizes of operands.

Decompositions change operators, orders and shapes, but the elements of an operand stay the same in number.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from fpsim.compile_backend.plan import Gap, Plan, Site
from fpsim.compile_backend.report.seen import Call

#: Operators that compute several products, whose operands they do not all have as arguments.
_SEVERAL = re.compile(r".*(attention|rnn|lstm|gru|transformer|affine_grid).*")

#: The reasons of gaps that are products, and that the policy leaves unrounded.
_LEFT = re.compile(r"(fprop|dgrad|wgrad) .*by the policy")


@dataclass(frozen=True)
class _Product:
    """A product in a plan, with the sizes of its operands in elements; None stands for a symbolic size."""

    first: Site
    sizes: tuple[int | None, int | None]
    is_rounded: bool


def _products(plan: Plan) -> list[_Product]:
    operands = [site for site in plan.sites if site.kind is not None and site.role != "output"]
    summed = {(each.path, each.operator, each.kind) for each in plan.sums}
    return [
        _Product(a, (_size(a), _size(b)), bool(a.cast or b.cast) or (a.path, a.operator, a.kind) in summed)
        for a, b in zip(operands[::2], operands[1::2], strict=True)
    ]


def _size(site: Site) -> int | None:
    sizes = [size for size in site.shape if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(site.shape) else None


def missing(plan: Plan, eager: Sequence[Call]) -> list[Call]:
    """The calls of ``eager`` for which ``plan`` has no product of the same operands, and no gap.

    What autograd computes is compared with the products of backward, unless forward has the same call: checkpointed
    code runs again. A gap has no shapes. As many kinds of calls of its operator are accepted as there are gaps.
    """
    products = _products(plan)
    sizes = {way: [p.sizes for p in products if p.first.direction == way] for way in ("forward", "backward")}
    forward = {(call.operator, call.shapes) for call in eager if not call.is_backward}

    def is_planned(call: Call) -> bool:
        runs_again = (call.operator, call.shapes) in forward
        ways = ("backward", "forward") if call.is_backward and runs_again else (_way(call),)
        return any(_has(call, planned) for way in ways for planned in sizes[way])

    unplanned = [call for call in eager if not is_planned(call)]
    kinds, gaps = Counter(call.operator for call in set(unplanned)), Counter(gap.operator for gap in plan.gaps)
    return [call for call in unplanned if kinds[call.operator] > gaps[call.operator]]


def _way(call: Call) -> str:
    return "backward" if call.is_backward else "forward"


def _has(call: Call, planned: tuple[int | None, int | None]) -> bool:
    """Whether the arguments of ``call`` can be operands of these sizes."""
    given = [math.prod(shape) for shape in call.shapes]
    if _SEVERAL.fullmatch(call.operator) or len(given) == 1:
        return any(size is None or size in given for size in planned)
    wanted = Counter(size for size in planned if size is not None)
    return any(wanted <= Counter(pair) for pair in combinations(given, 2))


def allowed_gaps(plan: Plan) -> list[Gap]:
    """The gaps that the policy allows by name."""
    return [gap for gap in plan.gaps if gap.reason == "allowed by the policy's gaps"]


def left_by_policy(plan: Plan) -> tuple[tuple[Gap, ...], dict[str, float]]:
    """The products that the policy leaves unrounded, and their share in the products of each operator."""
    products = _products(plan)
    left = [gap for gap in plan.gaps if _LEFT.match(gap.reason)]
    total = Counter(product.first.operator for product in products) + Counter(gap.operator for gap in left)
    left += [
        Gap(product.first.path, product.first.operator, f"{product.first.kind}: the policy leaves it unrounded")
        for product in products
        if not product.is_rounded
    ]
    return tuple(left), {operator: n / total[operator] for operator, n in Counter(g.operator for g in left).items()}
