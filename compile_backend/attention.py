"""Scaled dot-product attention in a Dynamo graph: opened into products, computed in tiles, or left fused."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpsim.attention.flash import FlashAttention
from fpsim.attention.ops import attend
from fpsim.compile_backend.errors import UnroundedError
from fpsim.compile_backend.graph.dynamo import all_nodes, copied
from fpsim.compile_backend.graph.nodes import module_path
from fpsim.policy import Policy


def decompose_attention(
    gm: fx.GraphModule, policy: Policy, seed: str = ""
) -> tuple[fx.GraphModule, AbstractContextManager[Any]]:
    """A Dynamo graph and a context for compiling it, in which attention is what ``policy`` says.

    If all modules say ``"round"``, or all say ``"keep"``, the context alone decides, and the graph stays as it is.
    Otherwise the graph calls `decomposed_attention` in the modules that round, and `fpsim.attention.ops.attend` in
    those that compute it in tiles. Modules that the policy skips follow the whole model's policy, but stay fused where
    that computes attention in tiles.

    Args:
        seed: the name of the graph's input that is the seed of stochastic rounding, if there is one.

    Raises:
        UnroundedError: tiled attention draws random numbers in a checkpointed module, whose graph has no seed.
    """
    if policy.attentions == {"round"}:
        return gm, sdpa_kernel(SDPBackend.MATH)
    if policy.attentions == {"keep"}:
        return gm, contextlib.nullcontext()
    copy = copied(gm)
    nodes = [node for node in all_nodes(copy) if node.target is F.scaled_dot_product_attention]
    for number, node in enumerate(nodes, start=1):
        path = module_path(node) or ""
        local = policy.at(path)
        attention = (local or policy).attention
        if attention == "round":
            node.target = decomposed_attention
        elif isinstance(attention, FlashAttention) and local is not None:
            node.target = attend
            node.kwargs = {**node.kwargs, "steps": str(attention), "salt": number}
            if attention.is_stochastic:
                node.kwargs = {**node.kwargs, "seed": _seed(node, seed, path)}
    for part in copy.modules():
        if isinstance(part, fx.GraphModule):
            part.recompile()
    return copy, contextlib.nullcontext()


def _seed(node: fx.Node, name: str, path: str) -> fx.Node:
    """The input ``name`` of the graph of ``node``, an attention in the module ``path``."""
    found = [each for each in node.graph.find_nodes(op="placeholder") if each.target == name]
    if not found:
        raise UnroundedError(
            f"attention in {path!r} rounds stochastically in tiles, and its module is checkpointed: give its steps a "
            "deterministic rounding, or take the checkpoint away"
        )
    return found[0]


def decomposed_attention(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` as matrix products and a softmax."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)
