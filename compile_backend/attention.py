"""Decomposing scaled dot-product attention, so that its inner products are products of the graph."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpsim.compile_backend.graph.dynamo import all_nodes, copied
from fpsim.compile_backend.graph.nodes import module_path
from fpsim.policy import Policy


def decompose_attention(gm: fx.GraphModule, policy: Policy) -> tuple[fx.GraphModule, AbstractContextManager[Any]]:
    """A Dynamo graph and a context for compiling it: attention is decomposed where ``policy`` says ``"round"``.

    If all modules agree, the context alone decides, and the graph stays as it is. If they differ, the graph calls
    `decomposed_attention` in the modules that round. Modules that the policy skips follow the whole model's policy.
    """
    if policy.attentions == {"round"}:
        return gm, sdpa_kernel(SDPBackend.MATH)
    if policy.attentions == {"keep"}:
        return gm, contextlib.nullcontext()
    copy = copied(gm)
    for node in all_nodes(copy):
        local = policy.at(module_path(node) or "") or policy
        if node.target is F.scaled_dot_product_attention and local.attention == "round":
            node.target = decomposed_attention
    for part in copy.modules():
        if isinstance(part, fx.GraphModule):
            part.recompile()
    return copy, contextlib.nullcontext()


def decomposed_attention(*args: Any, **kwargs: Any) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` as matrix products and a softmax."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)
