"""Attention in tiles: its sites in the plan, and its operators as the operations that Inductor fuses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from fpsim.attention.flash import FlashAttention, parsed
from fpsim.attention.ops import TENSORS, compute, flash_backward_op, flash_op
from fpsim.casts import Cast
from fpsim.compile_backend.graph.nodes import aten, module_path
from fpsim.compile_backend.observe.recorder import Recorder
from fpsim.compile_backend.plan import Site, Sum
from fpsim.rounding.ops import SOURCE

#: Up to how many blocks of keys and of queries together Inductor gets the operations of a call. With more blocks it
#: would compile for minutes: the operator then runs them itself, with the same results.
MOST_BLOCKS = 32


def find_flash(graph: fx.Graph) -> list[fx.Node]:
    """The calls of attention in tiles, forward and backward."""
    return [node for node in graph.nodes if node.target in TENSORS]


def flash_sites(graph: fx.Graph, recorder: Recorder | None) -> tuple[list[Site], list[Sum]]:
    """The sites of all calls of attention in tiles, and the sums of their products that have an accumulator.

    Two operands of a product follow one another. The results of other steps have no kind; their role is the field of
    `FlashAttention` that rounds them.
    """
    sites: list[Site] = []
    sums: list[Sum] = []
    for node in find_flash(graph):
        steps = _steps(node)
        own = list(_sites(node, steps))
        sites += [site for _, site in own]
        accumulator = steps.products
        if accumulator is not None:
            first = own[0][1]
            sums += [Sum(first.path, first.operator, site.kind, str(accumulator)) for _, site in own[::2] if site.kind]
        if recorder is not None:
            recorder.add_attention(node, own)
    return sites, sums


def _steps(node: fx.Node) -> FlashAttention:
    steps = parsed(node.args[-2])  # type: ignore[arg-type]
    return steps if node.target is flash_op else steps.in_backward


def _sites(node: fx.Node, steps: FlashAttention) -> Iterator[tuple[str, Site]]:
    """The name of every rounding of a call, as a `fpsim.attention.steps.Watch` gets it, and its site."""
    is_forward = node.target is flash_op
    tensors: Sequence[Tensor] = [each.meta["val"] for each in node.args[: TENSORS[node.target]]]  # type: ignore
    q, k, v = tensors[:3] if is_forward else tensors[1:4]
    scores = (*q.shape[:-1], k.shape[-2])
    shapes = {"q": q.shape, "k": k.shape, "v": v.shape, "gradient": (*q.shape[:-1], v.shape[-1])}
    shapes |= {"sums": q.shape[:-1], "delta": q.shape[:-1], "output": q.shape}
    make = functools.partial(_site, node, steps, q.dtype)

    def operands(*names: str) -> Iterator[tuple[str, Site]]:
        for name in names:
            yield name, make(name, shapes.get(name, scores), "fprop" if is_forward else "dgrad")

    def step(name: str) -> tuple[str, Site]:
        return name, make(name, shapes.get(name, scores), None)

    if is_forward:
        yield from operands("q", "k")
        yield from map(step, ("scores", "exponentials", "sums"))
        yield from operands("probabilities", "v")
        shapes["output"] = (*q.shape[:-1], v.shape[-1])
        shapes["accumulator"] = shapes["output"]
        yield from map(step, ("accumulator", "output"))
        return
    yield step("delta")
    yield from operands("q", "k")
    yield from map(step, ("scores", "exponentials"))
    yield from operands("gradient", "v", "score_gradients", "k", "score_gradients", "q", "probabilities", "gradient")
    shapes["accumulator"] = q.shape
    yield from map(step, ("accumulator", "output"))


#: The roles of operands.
_ROLES = {"gradient": "gradient", "score_gradients": "gradient"}


def _site(node: fx.Node, steps: FlashAttention, dtype: Any, name: str, shape: Sequence[Any], kind: str | None) -> Site:
    cast = steps.inputs if name in ("q", "k", "v", "gradient") else steps.cast(name)
    assert cast is None or isinstance(cast, Cast), "a FlashAttention holds casts"
    return Site(
        path=_path(node),
        operator="fpsim.flash_attention",
        kind=kind,
        direction="forward" if node.target is flash_op else "backward",
        role=name if kind is None else _ROLES.get(name, "activation"),
        shape=tuple(size if isinstance(size, int) else str(size) for size in shape),
        dtype=str(dtype).removeprefix("torch."),
        cast=cast,
        contracted=(len(shape) - 1,) if cast is not None and cast.has_axis else (),
    )


def _path(node: fx.Node) -> str:
    """The module of a call; a backward call whose module torch has not recorded has that of its forward call."""
    path = module_path(node)
    if path is None and node.target is flash_backward_op:
        sources = [each for each in node.all_input_nodes if each.args and isinstance(each.args[0], fx.Node)]
        path = next((module_path(each.args[0]) for each in sources if each.args[0].target is flash_op), None)  # type: ignore
    return path or ""


class Expansion(CustomGraphPass):
    """A pass over Inductor's graphs of forward and of backward that replaces attention in tiles by its operations.

    It runs after the partitioner, so that forward keeps for backward what a kernel keeps: Q, K, V, O and L.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in find_flash(graph):
            if _is_short(node):
                _expand(node)
        graph.lint()

    def uuid(self) -> str:
        """The key under which compiled code is cached."""
        return f"attention in tiles, up to {MOST_BLOCKS} blocks: {SOURCE}"


def _is_short(node: fx.Node) -> bool:
    """Whether the sizes of a call are known, and its blocks are few."""
    tensors = [each.meta["val"] for each in node.args[: TENSORS[node.target]]]  # type: ignore
    if not all(isinstance(size, int) for tensor in tensors for size in tensor.shape):
        return False
    steps, (q, k) = _steps(node), tensors[:2] if node.target is flash_op else tensors[1:3]
    rows = 0 if node.target is flash_op else -(-q.shape[-2] // steps.block_q)
    return rows - (-k.shape[-2] // steps.block_k) <= MOST_BLOCKS


@lru_cache(maxsize=1)
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's decompositions, without that of products: small ones would get sums in another order."""
    return {op: steps for op, steps in select_decomp_table().items() if op is not aten.bmm.default}


def _expand(node: fx.Node) -> None:
    """Replace ``node`` by the operations that its operator computes."""
    inputs = node.all_input_nodes
    values = [each.meta["val"] for each in inputs]
    target: Any = node.target

    def computed(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(inputs, tensors, strict=True))
        return compute(target, *map_arg(node.args, lambda each: given[each]))

    mode = next(value.fake_mode for value in values if isinstance(value, FakeTensor))
    with mode:
        traced = make_fx(computed, _decompositions())(*values)
    nodes: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    results: Any = ()
    with node.graph.inserting_before(node):
        for each in traced.graph.nodes:
            if each.op == "output":
                results = each.args[0]
            elif each.op != "placeholder":
                nodes[each] = node.graph.node_copy(each, lambda old: nodes[old])
                if each.target is aten.view.default:  # Inductor may have laid out its argument otherwise
                    nodes[each].target = aten.reshape.default
    for user in list(node.users):
        user.replace_all_uses_with(nodes[results[user.args[1]]])
        node.graph.erase_node(user)
    node.graph.erase_node(node)
