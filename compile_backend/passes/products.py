"""Rounding the operands and results of matrix products, and listing the products that stay unrounded."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import replace

from torch import fx

from fpsim.casts import Cast
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph.composites import complex_product
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.nodes import module_path
from fpsim.compile_backend.graph.opaque import find_opaque
from fpsim.compile_backend.graph.products import opaque_family, remedy
from fpsim.compile_backend.passes.accumulators import Summed, summed
from fpsim.compile_backend.passes.epilogue import scale_result
from fpsim.compile_backend.passes.inserter import Inserter
from fpsim.compile_backend.passes.places import policy_at, site_of_product
from fpsim.compile_backend.passes.transforms import (
    transform_of,
    transform_operands,
    transform_result,
    transforms_of,
    why_not,
)
from fpsim.compile_backend.plan import Gap, Site
from fpsim.policy import Policy
from fpsim.policy.policy import KINDS, ROLES
from fpsim.rounding.carriers import CARRIERS
from fpsim.scaling.scale import NV_RULES
from fpsim.transforms.transform import Transform


def opaque_gaps(graph: fx.Graph, policy: Policy, strict: bool) -> list[Gap]:
    """The operators of ``graph`` that may hold products which cannot be rounded.

    Raises:
        UnroundedError: with ``strict``, such an operator that the policy does not list as a gap.
    """
    return [_opaque_gap(node, name, policy, strict) for node, name in find_opaque(graph)]


def _opaque_gap(node: fx.Node, name: str, policy: Policy, strict: bool) -> Gap:
    path = module_path(node) or ""
    local = policy.at(path)
    if local is None:
        return Gap(path, name, "left unrounded by the policy")
    family = opaque_family(name)
    if family is not None and family.is_attention and local.attention == "keep":
        return Gap(path, name, "attention kept fused by the policy")
    if local.allows_gap(name) or policy.allows_gap(name):
        return Gap(path, name, "allowed by the policy's gaps")
    if strict:
        where = f" in module {path!r}" if path else ""
        both = re.sub("_(forward|backward)$", "", name) + "*"
        raise UnroundedError(
            f"{name}{where} may multiply matrices that fpsim cannot round. {remedy(name)}, or accept it unrounded: "
            f"gaps=[{both!r}], or skip=[{path or '<module>'!r}]; fpsim.explain lists all such places"
        )
    return Gap(path, name, "cannot be rounded: an error unless listed in the policy's gaps")


def round_products(
    products: Sequence[Product], policy: Policy, inserter: Inserter, strict: bool
) -> tuple[list[Site], list[Gap], list[Summed]]:
    """Round operands and results of ``products`` as ``policy`` says.

    Returns:
        The sites of the products that the policy rounds, with or without a cast; the other products as gaps; and the
        products whose sums have an accumulator, which are not replaced yet.

    Raises:
        UnroundedError: a product of numbers that no carrier holds, or whose sums cannot be simulated although the
            policy names an accumulator; or, with ``strict``, a product in an unknown module while the policy has rules
            for modules, or one that a transform of the policy would change.
        ValueError: an accumulator does not add products of the operands' formats.
    """
    sites: list[Site] = []
    gaps: list[Gap] = []
    sums: list[Summed] = []
    for product in products:
        local, transform, reason = local_policy(product, policy, strict)
        if local is not None:
            own, product, exact = _round_product(product, local, transform, inserter)
            sites += own
            accumulator = local.accumulator_of(product.kind)
            if accumulator is not None:
                sums.append(summed(product, exact, [_cast_of_factors(site) for site in own[:2]], accumulator))
        else:
            gaps.append(Gap(product.path or "", product.operator, reason))
    return sites, gaps, sums


def local_policy(product: Product, policy: Policy, strict: bool) -> tuple[Policy | None, Transform | None, str]:
    """The policy for ``product`` and its transform; no policy if it stays unrounded, and the reason for that.

    Raises:
        UnroundedError: as `round_products`.
    """
    description = f"{product.kind} product {product.node.name} ({product.operator})"
    local = policy_at(product.path, description, policy, strict)
    reason = _reason_to_leave(product, local)
    transform = None if local is None or reason is not None else transform_of(product, local)
    if transform is not None and (reason := why_not(product, transform)) is not None and strict:
        raise UnroundedError(reason)
    return (local, transform, "") if reason is None else (None, None, reason)


def rounds_only_weights(policy: Policy) -> bool:
    """Whether ``policy`` rounds no product without a weight."""
    casts = {role: any(policy.cast(kind, role) for kind in KINDS) for role in ROLES}
    return policy.products == "weights" or (casts.pop("weight") and not any(casts.values()))


def warn_if_no_weight_is_found(products: Sequence[Product], sites: Sequence[Site], policy: Policy) -> None:
    """Warn of a graph in which ``policy`` rounds nothing, only because no product has a weight."""
    asked = [product for product in products if not product.constant and policy.at(product.path or "") == policy]
    if (
        asked
        and rounds_only_weights(policy)
        and not any(site.cast for site in sites)
        and not any(p.has_weight for p in asked)
    ):
        warnings.warn(
            f"fpsim rounds nothing in this graph: the policy rounds weights, and none of its {len(asked)} products has "
            "a weight. Weights are parameters, buffers, and the second arguments of linear layers and convolutions; "
            "products='all' and format round every operand",
            stacklevel=2,
        )


def _reason_to_leave(product: Product, local: Policy | None) -> str | None:
    """Why ``product`` stays unrounded under ``local``, the policy of its module; None if it is rounded."""
    if product.constant:
        return "constant: a table that the model computes from constants alone (such as rotary angles)"
    if local is None:
        return f"{product.kind} left unrounded by the policy"
    if local.products == "weights" and not product.has_weight:
        return f"{product.kind} of two activations left unrounded by the policy"
    return None


def _cast_of_factors(site: Site) -> Cast | None:
    """The cast that gives the numbers which the product multiplies; None for unrounded ones.

    They are elements, without scales, if the scale of the operand multiplies the result.
    """
    cast = site.cast
    if cast is None or cast.scale is None or not site.epilogue or cast.scale.rule in NV_RULES:
        return cast
    return replace(cast, scale=None)


def _round_product(
    product: Product, policy: Policy, transform: Transform | None, inserter: Inserter
) -> tuple[list[Site], Product, Sequence[fx.Node]]:
    """Round the operands and the result of one product.

    Returns:
        Their sites, the product as it is then, and its operands after a transform and before rounding.
    """
    sites, product, before, result = round_operands(product, policy, transform, inserter)
    output = policy.output_cast(product.kind)
    if output is not None:
        sites.append(site_of_product(product, "output", result, output))
        inserter.round_result(result, sites[-1])
    return sites, product, before


def round_operands(
    product: Product, policy: Policy, transform: Transform | None, inserter: Inserter
) -> tuple[list[Site], Product, Sequence[fx.Node], fx.Node]:
    """Round the operands of one product.

    Returns:
        Their sites, the product as it is then, its operands after a transform and before rounding, and the node that
        holds its result.
    """
    dtype = product.result.meta["val"].dtype
    operands: list[fx.Node] = [product.node.args[i] for i in product.operands]  # type: ignore[misc]
    is_real = all(operand.meta["val"].dtype in CARRIERS for operand in operands)
    if not is_real or complex_product(product.node):
        operator, dtype = complex_product(product.node) or (product.operator, dtype)
        raise UnroundedError(f"{operator} in {product.path!r} multiplies {dtype} numbers")
    casts = [policy.cast(product.kind, role) for role in product.roles]
    sites = [
        site_of_product(product, role, operand, cast, axes, own)
        for role, operand, cast, axes, own in zip(
            product.roles, operands, casts, product.contracted, transforms_of(product, transform), strict=True
        )
    ]
    if inserter.is_blended:
        sites = [replace(site, epilogue=False) for site in sites]
    before = operands if transform is None else transform_operands(product, transform, inserter)
    scales: list[fx.Node | None] = [None, None]
    for i, (position, site) in enumerate(zip(product.operands, sites, strict=True)):
        transformed = None if before[i] is operands[i] else before[i]
        if site.cast is not None or transformed is not None:
            scales[i] = inserter.round_operand(product, position, site, transformed)
    scaled = scale_result(product, scales, inserter)
    if inserter.recorder is not None:
        inserter.recorder.add_product(scaled.product, operands, sites, before, scaled.operands, scaled.value)
    result = scaled.product.result
    if transform is not None and transform.of_kept_axis:
        result = transform_result(scaled.product, transform, inserter)
    return sites, scaled.product, before, result
