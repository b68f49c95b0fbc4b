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
    """Attention and a layer behind it, with sizes that fill vectors of any width."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 32)).transpose(1, 3).unbind(2)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return F.silu(self.out(x))


#: The policies of the training steps. In the first one each kind of product is rounded in another way.
POLICIES: tuple[dict[str, Any], ...] = (
    {"fprop": "e4m3fn", "dgrad": "e5m2/power_of_two", "wgrad": "e5m2/stochastic"},
    {"policy": "mxfp8"},
    {"policy": "nvfp4"},
)
#: Arguments of `fpsim.round`.
ROUNDINGS: tuple[dict[str, Any], ...] = (
    *({"format": name} for name in ("e4m3fn", "e5m2", "e8m3", "bf16")),
    {"format": "e4m3fn", "rounding": "up"},
    {"format": "e4m3fn", "rounding": "stochastic", "seed": torch.tensor(0)},
    {"format": "e4m3fn", "scale": "power_of_two"},
)
#: Arguments of `fpsim.round` for matrices.
BLOCKS: tuple[dict[str, Any], ...] = tuple(
    {"format": name, "rounding": rounding, "axis": axis, "seed": torch.tensor(0) if ":" in rounding else None}
    for name, rounding in (
        *((name, "nearest_even") for name in ("mxfp8", "mxfp4", "nvfp4", "e4m3fn/row", "e4m3fn/block:32x32:fp32")),
        ("nvfp4", "stochastic:8"),
    )
    for axis in (0, 1)
)


def code(call: Callable[[], Any]) -> str:
    return "\n".join(run_and_get_code(call)[1])


def all_codes() -> Iterator[tuple[str, str]]:
    x = torch.randn(4, 32, 64)
    for policy in POLICIES:
        compiled = torch.compile(Block(), backend="fpsim", options=policy)
        yield f"training step, {policy}", code(lambda step=compiled: step(x).sum().backward())
    rounded = torch.compile(lambda x: [fpsim.round(x, **arguments) for arguments in ROUNDINGS])
    for dtype in (torch.float32, torch.bfloat16):
        yield f"fpsim.round of {dtype}", code(lambda dtype=dtype: rounded(torch.randn(1 << 12).to(dtype)))
    in_blocks = torch.compile(lambda x: [fpsim.round(x, **arguments) for arguments in BLOCKS])
    yield "fpsim.round in blocks", code(lambda: in_blocks(torch.randn(64, 512)))
    p = nn.Parameter(torch.randn(1 << 16))
    p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW([p], fused=True)
    fpsim.round_optimizer(optimizer, "e4m3fn", compiled=True)
    yield "fused AdamW", code(optimizer.step)


if __name__ == "__main__":
    AsyncCompile.cpp_pybinding = lambda *_: lambda *_: None  # type: ignore[method-assign,assignment]
    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        print(json.dumps(dict(all_codes())))
