"""The place of a product or operation in the model: the policy that applies there, and its sites in the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import fx

from fpsim.casts import Cast
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph.epilogues import is_outside
from fpsim.compile_backend.graph.finding import Product
from fpsim.compile_backend.graph.nodes import module_path
from fpsim.compile_backend.graph.products import Axes
from fpsim.compile_backend.graph.sources import Source, is_backward, operation_of
from fpsim.compile_backend.plan import Site
from fpsim.policy import Policy
from fpsim.transforms.transform import Transform


def policy_at(path: str | None, description: str, policy: Policy, strict: bool) -> Policy | None:
    """The policy in the module ``path`` (None: unknown); None where nothing is rounded.

    Raises:
        UnroundedError: with ``strict``, an unknown module while the policy has rules for modules; ``description`` names
            the product or operation there.
    """
    if path is None and policy.uses_paths and strict:
        raise UnroundedError(
            f"the module of the {description} is unknown, and the policy has rules for modules: give one policy for "
            "the whole model, or use autograd's own backward instead of a custom autograd.Function"
        )
    return policy.at(path or "")


def path_of_operation(node: fx.Node, sources: Mapping[fx.Node, Source], forward: Mapping[int, fx.Node]) -> str | None:
    """The path of the module of ``node``, which is no product; None if it is unknown.

    The root of the model is never recorded, and autograd adds up gradients outside of modules. Other nodes of backward
    lie in the module of the operation whose derivative they compute. ``forward`` is that of `operation_of`.
    """
    path = module_path(node)
    if path is not None:
        return path
    if not is_backward(node, sources) or node.meta.get("is_gradient_acc"):
        return ""
    operation = operation_of(node, forward)
    return None if operation is None else module_path(operation) or ""


def site_of_product(
    product: Product,
    role: str,
    value: fx.Node,
    cast: Cast | None,
    axes: Axes = (),
    transform: Transform | None = None,
) -> Site:
    """The site of an operand of ``product``, which is contracted along ``axes``, or of its result."""
    direction = "forward" if product.kind == "fprop" else "backward"
    site = _site(product.path, product.operator, product.kind, direction, role, value, cast, axes, transform)
    return replace(site, epilogue=role != "output" and is_outside(product, cast, axes, value.meta["val"].dtype))


def site_of_operation(path: str | None, operator: str, direction: str, value: fx.Node, cast: Cast) -> Site:
    """The site of the result of an operation that is no product."""
    return _site(path, operator, None, direction, "result", value, cast, ())


def site_of_saved(path: str, operator: str, value: fx.Node, cast: Cast) -> Site:
    """The site of an activation that is kept for backward, where ``operator`` reads it."""
    return _site(path, operator, None, "backward", "saved", value, cast, ())


def _site(
    path: str | None,
    operator: str,
    kind: str | None,
    direction: str,
    role: str,
    value: fx.Node,
    cast: Cast | None,
    contracted: Axes,
    transform: Transform | None = None,
) -> Site:
    tensor = value.meta["val"]
    if role in ("output", "result", "saved") and cast is not None and cast.has_axis:
        contracted = tuple(range(tensor.dim()))[-1:]
    shape = tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Site(path or "", operator, kind, direction, role, shape, dtype, cast, contracted, transform=transform)
