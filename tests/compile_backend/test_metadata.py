"""The nodes of a rewritten graph have the metadata that torch reads from them later."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

SEPARATE = {"fprop": {"activation": "e4m3fn", "weight": "e5m2"}, "dgrad": {"gradient": "e5m2"}, "output": "bf16"}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False)


def attention(x: Tensor) -> Tensor:
    q = x.view(2, 2, 3, 2)
    return F.scaled_dot_product_attention(q, q * 2, q + 1)


CASES: dict[str, tuple[Callable, tuple[int, ...], Mapping[str, Any]]] = {
    "linear": (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), (2, 6), {"format": "e4m3fn"}),
    "results": (nn.Sequential(nn.Linear(6, 4), nn.GELU()), (2, 6), {"elementwise": "bf16", "output": "bf16"}),
    "one gradient": (nn.Conv2d(2, 3, 2), (2, 2, 4, 3), {"format": "e4m3fn"}),
    "two gradients": (nn.Conv2d(2, 3, 2), (2, 2, 4, 3), {"gradient": "e5m2", "wgrad": {"gradient": "e4m3fn"}}),
    "sum for a bias": (nn.Conv1d(2, 3, 2), (2, 2, 4), {"elementwise": "bf16", "wgrad": {"gradient": "e4m3fn"}}),
    "attention": (attention, (24,), {"format": "e5m2"}),
    "scale": (nn.Linear(6, 4), (2, 6), {"format": "e4m3fn", "scale": "power_of_two"}),
    "random numbers": (nn.Linear(6, 4), (2, 6), {"format": "e4m3fn", "rounding": "stochastic"}),
    "recomputed": (Checkpointed(), (2, 6), {"format": "e4m3fn"}),
}


def described(value: Any) -> Any:
    """What later passes read of a fake value."""
    return tree_map(lambda x: (x.shape, x.dtype, x.device, x.stride()) if isinstance(x, Tensor) else x, value)


def depends_on_tangents(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_tangent = node.op == "placeholder" and type(node.meta["desc"]).__name__ == "TangentAOTInput"
        if is_tangent or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_node_has_the_value_that_the_graph_computes_and_its_pass(case: str, graphs: list[fx.Graph]) -> None:
    model, shape, options = CASES[case]
    x = torch.randn(shape, requires_grad=True)
    torch.compile(model, backend="fpsim_eager", options=options)(x).sum().backward()
    (graph,) = graphs
    noted = {node: described(node.meta["val"]) for node in graph.nodes if node.op != "output"}
    backward = {node for node in depends_on_tangents(graph) if node.op == "call_function"}
    tagged = {node for node in backward if node.meta.get("partitioner_tag") == "is_backward"}
    inputs = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    FakeTensorProp(graph.owning_module, detect_fake_mode(inputs)).propagate_dont_convert_inputs(*inputs)
    assert noted == {node: described(node.meta["val"]) for node in noted}
    assert backward and tagged == backward
