"""The C++ code that Inductor generates for rounding, printed as JSON: ``python -m tests.shared.generated_code``.

A program of its own, because a process has one vector width (``ATEN_CPU_CAPABILITY``). The kernels are not compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import run_and_get_code

import fpsim


class Block(nn.Module):
    """Attention and a gated layer, with sizes that fill vectors of any width."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.qkv, self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(width, 64), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 32)).transpose(1, 3).unbind(2)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        gate, up = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


#: Policies of the training step.
POLICIES: dict[str, dict[str, Any]] = {
    "fp8 hybrid": {},
    "stochastic": {"policy": "fp8_hybrid", "rounding": "stochastic"},
    "scaled": {"policy": "fp8_hybrid", "scale": "power_of_two"},
}
#: Arguments of `fpsim.round`, and the dtype of its input.
ROUNDINGS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "e4m3fn": ({"format": "e4m3fn"}, torch.float32),
    "e5m2": ({"format": "e5m2"}, torch.float32),
    "fp16": ({"format": "fp16"}, torch.float32),
    "e8m3": ({"format": "e8m3"}, torch.float32),
    "bf16": ({"format": "bf16"}, torch.float32),
    "e4m3fn, up": ({"format": "e4m3fn", "rounding": "up"}, torch.float32),
    "e4m3fn, stochastic": ({"format": "e4m3fn", "rounding": "stochastic", "seed": torch.tensor(0)}, torch.float32),
    "e4m3fn, scaled": ({"format": "e4m3fn", "scale": "power_of_two"}, torch.float32),
    "e4m3fn from bfloat16": ({"format": "e4m3fn"}, torch.bfloat16),
}


def codes(call: Callable[[], Any]) -> list[str]:
    torch._dynamo.reset()
    return run_and_get_code(call)[1]


def all_codes() -> Iterator[tuple[str, list[str]]]:
    x = torch.randn(4, 32, 64)
    for name, options in POLICIES.items():
        compiled = torch.compile(Block(), backend="fpsim", options=options or None)
        yield f"step, {name}", codes(lambda compiled=compiled: compiled(x).sum().backward())
    for name, (arguments, dtype) in ROUNDINGS.items():
        rounded = torch.compile(lambda x, arguments=arguments: fpsim.round(x, **arguments))
        yield f"round, {name}", codes(lambda rounded=rounded, dtype=dtype: rounded(torch.randn(1 << 12).to(dtype)))


if __name__ == "__main__":
    AsyncCompile.cpp_pybinding = lambda *_: lambda *_: None  # type: ignore[method-assign,assignment]
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        print(json.dumps(dict(all_codes())))
