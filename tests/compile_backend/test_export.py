"""Exported programs hold the rounding: they have the bits of the compiled model, here and in another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import fpsim
from fpsim.compile_backend import UnroundedError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16, bias=False)
        self.register_buffer("shift", torch.linspace(-1, 1, 16))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, Tensor]:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2)) + self.shift
        return {"x": x if scale is None else x * scale, "mean": x.mean()}


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor, *, scale: Tensor | None = None) -> dict[str, Tensor]:
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x, scale)["x"]
        return {"logits": self.head(x), "norm": x.norm()}


POLICIES = {
    "e4m3fn": {"format": "e4m3fn"},
    "mxfp8 and globs": {"format": "mxfp8", "output": "bf16", "skip": "head", "modules": {"layers.1.*": "e5m2"}},
    "nvfp4 with a rotation": {"format": "nvfp4", "transform": "hadamard:16:te"},
    "accumulator": {"format": "e4m3fn", "accumulator": "fp16", "chunk": 4},
    "elementwise and reductions": {"format": "bf16", "elementwise": "bf16", "reductions": "fp32 order=pairwise"},
    "flash": {"format": "bf16", "attention": "flash2_bf16"},
    "stochastic": {"format": "e4m3fn/stochastic:8", "scale": "power_of_two"},
}


def seeded_model(layers: int = 2) -> Model:
    torch.manual_seed(0)
    return Model(layers).eval()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", POLICIES)
def test_a_program_has_the_bits_of_the_interpreted_model(name: str) -> None:
    model, tokens, policy = seeded_model(), torch.arange(12).reshape(2, 6), POLICIES[name]
    program = fpsim.export(model, (tokens,), policy, kwargs={"scale": torch.tensor(1.5)})
    compiled = torch.compile(model, backend="fpsim_eager", options=policy)
    other, scale = tokens.flip(0) + 3, torch.tensor(0.75)
    with torch.no_grad():
        torch.manual_seed(7)
        want = [compiled(other, scale=scale) for _ in range(2)]
        torch.manual_seed(7)
        got = [program.module()(other, scale=scale) for _ in range(2)]
    assert all(map(same, want, got))
    assert same(*want) == ("stochastic" not in name)
    # Parameters keep their names; the tied one has one.
    assert set(program.state_dict) == {
        *(name for name, _ in model.named_parameters()),
        *(name for name, _ in model.named_buffers()),
    }
    assert not any(parameter.requires_grad for parameter in program.parameters())


def test_every_operand_is_rounded_as_the_plan_says() -> None:
    model, tokens = seeded_model(), torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        plan = fpsim.explain(model, tokens, policy="mxfp8")
    program = fpsim.export(model, (tokens,), "mxfp8")
    roundings = [node for node in program.graph.nodes if str(node.target).startswith("fpsim.round")]
    assert len(plan.sites) == 2 * (4 * 2 + 1)  # of each layer qkv, two of attention, out; the head
    assert len(roundings) == len(plan.sites)
    # No operand of a product but a rounded value reaches it, through views.
    for node in program.graph.nodes:
        if node.target in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default):
            for operand in node.args[-2:]:
                while "fpsim" not in str(operand.target):
                    assert operand.args and operand.target is not torch.ops.aten.mm.default, operand
                    operand = operand.args[0]


@pytest.mark.parametrize("first", ["import torch, fpsim", "import fpsim.operators, torch"])
def test_a_saved_program_has_the_same_bits_in_another_process(first: str, tmp_path: Path) -> None:
    model, tokens = seeded_model(), torch.arange(12).reshape(2, 6)
    torch.export.save(fpsim.export(model, (tokens,), "mxfp8"), tmp_path / "model.pt2")
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (
        f"{first}; program = torch.export.load({str(tmp_path / 'model.pt2')!r});"
        f"torch.save(program.module()(torch.load({str(tmp_path / 'tokens.pt')!r})), {str(tmp_path / 'out.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with torch.no_grad():
        want = torch.compile(model, backend="fpsim_eager", options={"policy": "mxfp8"})(tokens)
    assert same(torch.load(tmp_path / "out.pt"), want)


def test_sizes_vary_as_dynamic_shapes_say() -> None:
    model, policy = seeded_model(), {"format": "mxfp8"}
    shapes = {"tokens": {0: Dim("batch", max=64), 1: Dim("time", min=2, max=128)}}
    program = fpsim.export(model, (torch.arange(12).reshape(2, 6),), policy, dynamic_shapes=shapes)
    compiled = torch.compile(model, backend="fpsim_eager", options=policy, dynamic=False)
    for size in ((2, 6), (1, 6), (3, 2), (5, 31), (64, 33)):
        tokens = torch.randint(0, 32, size)
        with torch.no_grad():
            assert same(program.module()(tokens), compiled(tokens)), size
    with pytest.raises(AssertionError, match="Guard failed"):
        program.module()(torch.zeros(65, 6, dtype=torch.int64))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x) if x.shape[0] > 4 else self.linear(x) + 1


def test_sizes_that_the_model_tells_apart_are_refused() -> None:
    x, y = torch.randn(3, 8), torch.randn(5, 8)
    shapes = ({0: Dim("first", max=64)}, {0: Dim("second", max=64)})
    with pytest.raises(ValueError, match=r"torch cannot trace Branches as one graph: Constraints violated"):
        fpsim.export(Branches(), (x, y), "bf16", dynamic_shapes=shapes)
    with pytest.raises(ValueError, match=r"two sizes that vary on their own have the same example, 3"):
        fpsim.export(Added(), (x, torch.randn(3, 8)), "bf16", dynamic_shapes=shapes)
    program = fpsim.export(Added(), (x, y), "bf16", dynamic_shapes=shapes)
    want = torch.compile(Added.same(), backend="fpsim_eager", options={"policy": "bf16"})
    assert (
        program.module()(torch.randn(7, 8), torch.randn(9, 8)).shape == want(torch.randn(7, 8), torch.randn(9, 8)).shape
    )


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(x).sum(0) + self.linear(y).sum(0)

    @staticmethod
    def same() -> nn.Module:
        return Added()


def test_scales_of_other_steps_become_constants() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
    policy = fpsim.Policy(format="e4m3fn/tensor/history:4")
    compiled = torch.compile(model, backend="fpsim_eager", options={"policy": policy})
    for step in range(3):
        compiled(x * (step + 1)).sum().backward()
    with torch.no_grad():
        want = compiled(5 * x)
        assert torch.equal(fpsim.export(compiled, (x,)).module()(5 * x), want)
        state = fpsim.scale_state(compiled)
        assert torch.equal(fpsim.export(model, (x,), policy, scales=state).module()(5 * x), want)
    with pytest.raises(ValueError, match=r"has no state: give scales=fpsim.scale_state\(compiled\)"):
        fpsim.export(model, (x,), policy)
    calibrated = fpsim.Policy(format="int8/tensor/calibrated")
    with pytest.raises(RuntimeError, match="has no calibrated scale: call fpsim"):
        fpsim.export(model, (x,), calibrated)
    state = fpsim.calibrate(model, [x, 2 * x], calibrated)
    reference = torch.compile(model, backend="fpsim_eager", options={"policy": calibrated})
    fpsim.load_scale_state(reference, state)
    with torch.no_grad():
        assert torch.equal(fpsim.export(model, (x,), calibrated, scales=state).module()(3 * x), reference(3 * x))


def test_scales_that_the_step_renews_are_refused() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    policy = fpsim.Policy(format="e4m3fn/power_of_two/every:2")
    compiled = torch.compile(model, backend="fpsim_eager", options={"policy": policy})
    compiled(x).sum().backward()
    with torch.no_grad():
        assert torch.equal(fpsim.export(compiled, (x,)).module()(9 * x), compiled(9 * x))
    compiled(x).sum().backward()
    with pytest.raises(ValueError, match="is computed from the tensor itself in the step that is due"):
        fpsim.export(compiled, (x,))


class Distances(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(self.linear(x), x)


def test_what_cannot_be_rounded_is_refused() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(UnroundedError, match=r"aten\._cdist_forward"):
        fpsim.export(Distances(), (x,), "bf16")
    with pytest.raises(ValueError, match="matches no module that computes anything"):
        fpsim.export(nn.Linear(4, 4), (x,), {"format": "bf16", "skip": "head"})
    with pytest.raises(TypeError, match="args is a tuple of example inputs, got Tensor"):
        fpsim.export(nn.Linear(4, 4), x, "bf16")
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got function"):
        fpsim.export(lambda x: x, (x,), "bf16")
    in_place = nn.Linear(4, 4)
    in_place.compile(backend="fpsim_eager", options={"format": "bf16"})
    with pytest.raises(UnroundedError, match="was compiled in place"):
        fpsim.export(in_place, (x,))
    compiled = torch.compile(nn.Linear(4, 4), backend="fpsim_eager", options={"format": "bf16"})
    with pytest.raises(ValueError, match="leave policy and scales out"):
        fpsim.export(compiled, (x,), "bf16")

    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.mT if float(x.sum()) > 0 else x

    with pytest.raises(ValueError, match="torch cannot trace Breaks as one graph: "):
        fpsim.export(Breaks(), (x,), "bf16")


def test_a_package_of_aotinductor_has_the_bits_of_the_compiled_model(tmp_path: Path) -> None:
    # bfloat16, in which Inductor fuses operators to others of float32 unless it is told to keep the casts
    model, tokens = seeded_model(layers=1).bfloat16(), torch.arange(12).reshape(2, 6)
    policy = {"format": "e4m3fn/stochastic:8", "modules": {"head": "mxfp8"}}
    program = fpsim.export(model, (tokens,), policy)
    package = torch._inductor.aoti_load_package(fpsim.package(program, str(tmp_path / "model.pt2")))
    compiled = torch.compile(model, backend="fpsim", options=policy)
    with torch.no_grad():
        torch.manual_seed(3)
        want = compiled(tokens)
        torch.manual_seed(3)
        assert same(package(tokens), want)
