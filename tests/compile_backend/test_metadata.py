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
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

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


def test_a_rounding_has_the_tags_of_its_value_and_the_place_of_its_product(graphs: list[fx.Graph]) -> None:
    """The partitioner reads the tags: it recomputes a rounding in backward if and where it recomputes the value."""
    x = torch.randn(2, 6, requires_grad=True)
    torch.compile(Checkpointed(), backend="fpsim_eager", options={"format": "e4m3fn"})(x).sum().backward()
    (graph,) = graphs
    roundings = graph.find_nodes(op="call_function", target=torch.ops.fpsim.round.default)
    assert len(roundings) == 6  # of two inputs, two weights and two gradients
    tags = ("partitioner_tag", "ac_graph_id", "seq_nr")
    for node in roundings:
        value: fx.Node = node.args[0]
        assert [node.meta.get(name) for name in tags] == [value.meta.get(name) for name in tags]
        needing = {*node.users, *(further for user in node.users for further in user.users)} - {*roundings}
        assert place(node) in [place(each) for each in needing if each.target in PRODUCTS]
    # Backward has the weights, and may round them again. The softmax is recomputed as it is without a rounding.
    recomputed = {node.args[0].name: node.meta.get("recompute") for node in roundings if not is_backward(node)}
    weights = [node.args[0].name for node in roundings if node.meta["val"].shape == (6, 6)]
    (softmax,) = (node.args[0] for node in roundings if node.args[0].op != "placeholder" and not is_backward(node))
    assert softmax.meta["recompute"] == recomputed.pop(softmax.name) == CheckpointPolicy.PREFER_RECOMPUTE
    assert [recomputed.pop(name) for name in weights] == [CheckpointPolicy.PREFER_RECOMPUTE] * 2
    assert [*recomputed.values()] == [None]


def test_a_view_of_a_rounded_result_shares_its_memory(graphs: list[fx.Graph]) -> None:
    """Inductor reuses memory in backward that, by the metadata, no tensor of the user shares."""

    def multiplied(x: Tensor, w: Tensor) -> Tensor:
        return torch.sin(x).view(3, 4) @ w

    options = {"format": "none", "elementwise": "bf16"}
    torch.compile(multiplied, backend="fpsim_eager", options=options)(torch.randn(12), torch.randn(4, 2))
    (graph,) = graphs
    (view,) = graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    (base,) = view.all_input_nodes
    assert base.target is torch.ops.fpsim.round.default
    view_of, memory = (node.meta["val"].untyped_storage()._cdata for node in (view, base))
    assert view_of == memory


class Positive(nn.Linear):
    """A sine that a product and a ReLU read; the derivative of the ReLU reads the result of the ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sin(x)
        positive = torch.relu(y)
        return super().forward(y) + super().forward(positive)


def test_backward_rounds_again_only_what_it_has_itself(graphs: list[fx.Graph]) -> None:
    x = torch.randn(2, 6, requires_grad=True)
    model = Positive(6, 6, bias=False)
    torch.compile(model, backend="fpsim_eager", options={"format": "e4m3fn"})(x).sum().backward()
    (graph,) = graphs
    found = graph.find_nodes(op="call_function", target=torch.ops.fpsim.round.default)
    recomputed = {node.args[0].target: node.meta.get("recompute") for node in found if not is_backward(node)}
    assert recomputed[torch.ops.aten.relu.default] == CheckpointPolicy.PREFER_RECOMPUTE
    assert recomputed[torch.ops.aten.sin.default] is None


def is_backward(node: fx.Node) -> bool:
    return node.meta["partitioner_tag"] == "is_backward"


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def place(node: fx.Node) -> tuple[list[str], str]:
    """The modules around a node, and the line of the model."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta["nn_module_stack"]
    return [path for path, _ in stack.values()], node.meta["stack_trace"]
