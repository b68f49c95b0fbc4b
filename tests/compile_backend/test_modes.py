"""The modes of `torch.compile` set options of Inductor, and change no bit on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch._inductor
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from fpsim.compile_backend.guards import MODES, settings_of_mode


class Layers(nn.Module):
    """A product with a weight, products in attention, a convolution, sums, and functions that Inductor fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)
        self.conv = nn.Conv1d(64, 32, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        attended = torch.softmax(q @ k.mT / 4, -1) @ v
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return torch.nn.functional.gelu(self.conv(x.mT)).mean(-1)


def step(options: dict[str, object], dtype: torch.dtype, **mode: str) -> list[Tensor]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Layers().to(dtype)
    compiled = torch.compile(model, backend="fpsim", **({"options": options} if options else {}), **mode)
    result = compiled(torch.randn(2, 32, 64, dtype=dtype))
    result.sum().backward()
    return [result, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize(
    ("dtype", "modes"),
    [
        (torch.float32, ["max-autotune"]),
        pytest.param(torch.float32, ["reduce-overhead"], marks=pytest.mark.exhaustive),
        pytest.param(torch.bfloat16, ["reduce-overhead", "max-autotune"], marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_no_mode_changes_a_bit(dtype: torch.dtype, modes: list[str]) -> None:
    options = {"format": "e4m3fn"}
    plain = step(options, dtype)
    for mode in modes:
        assert all(map(torch.equal, plain, step({**options, "mode": mode}, dtype))), mode


def test_a_mode_alone_has_the_policy_of_no_options() -> None:
    torch._dynamo.reset()
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    got = torch.compile(layer, backend="fpsim", mode="max-autotune-no-cudagraphs")(x)
    assert torch.equal(got, torch.compile(layer, backend="fpsim_eager")(x))


def test_the_settings_are_those_of_inductor_with_the_products_of_aten() -> None:
    known = torch._inductor.list_mode_options()
    assert settings_of_mode(None) == settings_of_mode("default") == {}
    for mode in MODES:
        settings = settings_of_mode(mode)
        assert known[mode].items() <= settings.items()
        extra = {"max_autotune_gemm_backends": "ATEN"} if "max_autotune" in known[mode] else {}
        assert settings == {**known[mode], **extra}


@pytest.mark.parametrize(
    ("backend", "arguments", "message"),
    [
        (
            "fpsim",
            {"mode": "max-autotun"},
            r"has no mode 'max-autotun' \(did you mean 'max-autotune'\?\): use one of default",
        ),
        ("fpsim", {"mode": "lite"}, "or set single settings, such as torch._inductor.config."),
        ("fpsim", {"options": {"format": "bf16", "mode": "lite"}}, "has no mode 'lite'"),
        ("fpsim_eager", {"options": {"format": "bf16", "mode": "max-autotune"}}, "compiles nothing: leave mode="),
        (
            "fpsim_eager",
            {"mode": "reduce-overhead"},
            "compiles nothing: leave mode='reduce-overhead' out, or use backend=",
        ),
    ],
)
def test_other_modes_are_errors_with_a_remedy(backend: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(nn.Linear(4, 4), backend=backend, **arguments)(torch.randn(2, 4))


def test_a_changed_mode_is_noticed() -> None:
    options = {"format": "bf16", "mode": "reduce-overhead"}
    model = torch.compile(nn.Linear(4, 4), backend="fpsim", options=options)
    model(torch.randn(2, 4))
    options["mode"] = "max-autotune"
    torch._dynamo.reset()  # else the code of the first model serves the second one too
    with pytest.raises(BackendCompilerFailed, match="have changed since"):
        torch.compile(nn.Linear(4, 4), backend="fpsim", options=options)(torch.randn(2, 4))
