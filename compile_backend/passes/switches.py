"""Rounding products under switches: every product has the roundings of all policies, and an input picks among them.

The operands of a product are switched. Where a policy changes more than the operands (a transform, or a scale that
multiplies the result), a second product stands beside the plain one, and the result is switched: a product of which
nothing is on has the bits of the unrounded model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._inductor import lowering

from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.products import product_operator
from fpsim.compile_backend.passes.inserter import Inserter
from fpsim.compile_backend.passes.places import site_of_product
from fpsim.compile_backend.passes.products import local_policy, round_operands
from fpsim.compile_backend.plan import Site
from fpsim.compile_backend.switches import Switches, switch_op

aten = torch.ops.aten


@lowering.register_lowering(switch_op, type_promotion_kind=None)
def _lower_switch(exact: Any, rounded: Any, switches: Any, numbers: list[int]) -> Any:
    on = [lowering.lowerings[aten.select.int](switches, 0, number) for number in numbers]
    while len(on) > 1:
        on = [lowering.lowerings[aten.logical_or.default](on[0], on[1]), *on[2:]]
    return lowering.lowerings[aten.where.self](on[0], rounded, exact)


def round_switched(products: Sequence[Product], switches: Switches, inserter: Inserter, strict: bool) -> list[Site]:
    """Round ``products`` under all policies of ``switches``; the sites of all. Products without one are not listed.

    Raises:
        UnroundedError: as `fpsim.compile_backend.passes.products.round_products`, or a scale multiplies the
            result of a product that torch has decomposed.
    """
    sites: list[Site] = []
    for product in products:
        for number, policy in enumerate(switches.policies):
            inserter.policy_number = number
            local, transform, _ = local_policy(product, policy, strict)
            if local is None:
                continue
            casts = [local.cast(product.kind, role) for role in product.roles]
            planned = [
                site_of_product(product, role, product.node.args[i], cast, axes, transform)  # type: ignore[arg-type]
                for i, role, cast, axes in zip(product.operands, product.roles, casts, product.contracted, strict=True)
            ]
            if transform is None and (inserter.is_blended or not any(site.epilogue for site in planned)):
                own, product, _, _ = round_operands(product, local, transform, inserter)
            else:
                copied = _copied(product, inserter)
                own, _, _, result = round_operands(copied, local, transform, inserter)
                product = _switched(product, result, own, inserter)
            output = local.output_cast(product.kind)
            if output is not None:
                own.append(site_of_product(product, "output", product.result, output))
                inserter.round_result(product.result, own[-1])
            sites += own
    return sites


def _copied(product: Product, inserter: Inserter) -> Product:
    """A second product with the same operands, before ``product``."""
    entry = product_operator(product.node.target)
    if product.value is not product.node or entry is None or entry.is_joint:
        raise UnroundedError(
            f"{product.operator} ({product.kind}) in module {product.path or ''!r} cannot be switched with a "
            "transform, or with a scale that multiplies its result: use a format with powers of two (mxfp8, "
            f"e4m3fn/power_of_two), or leave the module out (skip={[product.path or '<module>']})"
        )
    graph = product.node.graph
    with graph.inserting_before(product.node):
        copy = graph.node_copy(product.node)
    inserter.sources[copy] = inserter.sources[product.node]
    return replace(product, value=copy, result=copy)


def _switched(product: Product, other: fx.Node, sites: Sequence[Site], inserter: Inserter) -> Product:
    """``product``, whose result is ``other`` if any of ``sites`` is on."""
    node, users = product.node, list(product.node.users)
    result = other if inserter.is_blended else inserter.switch(node, other, sites, after=node)
    for user in users:
        user.replace_input_with(node, result)
    return replace(product, result=result) if product.result is node else product
