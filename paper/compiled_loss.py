"""A language model compiled to its loss: under a policy by the fpsim backend, or without one by plain Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpsim.policy import Policy

#: Inputs and targets to the loss, or to the loss and the logits of last tokens.
Loss = Callable[..., Any]
#: A module and the policy's options (None: no simulation) to the compiled loss. Tests put another compiler here.
Compile = Callable[[nn.Module, Mapping[str, object] | None], Loss]


def compile_loss(
    model: nn.Module,
    options: Mapping[str, object] | None,
    *,
    attention: str | None = None,
    interpret: bool = False,
) -> Loss:
    """``model`` compiled by the fpsim backend under the policy ``options``, or by plain Inductor if they are None.

    The default policy opens attention, so that its inner products are rounded. Plain Inductor gets the same opened
    attention: otherwise the two would differ in more than rounding.

    Args:
        attention: ``opened`` or ``fused`` overrides the policy; None leaves the choice to the policy.
        interpret: run operator by operator, without a compiler.
    """
    if options is None:
        plain = model if attention == "fused" else OpenAttention(model)
        return plain if interpret else torch.compile(plain, fullgraph=True, dynamic=False)
    chosen: Any = with_attention(options, attention)
    backend = "fpsim_eager" if interpret else "fpsim"
    return torch.compile(model, backend=backend, options=chosen, fullgraph=True, dynamic=False)


def with_attention(options: Mapping[str, object], attention: str | None) -> dict[str, object]:
    """The policy ``options`` with the field `attention` set for ``opened`` or ``fused``; None leaves it as it is."""
    if attention is None:
        return dict(options)
    return {**Policy.from_options(options).to_dict(), "attention": {"opened": "round", "fused": "keep"}[attention]}


class OpenAttention(nn.Module):
    """``module`` with scaled_dot_product_attention as products and a softmax, not as one fused kernel.

    The choice is made inside ``forward``, so that it is part of the compiled graph. A choice made around the call is
    missing from the key of torch's compile cache, which then returns code compiled with fused attention (torch 2.13).
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Tensor) -> Tensor:
        """The result of ``module``."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.module(*args)


class Autocast(nn.Module):
    """``module`` under PyTorch's own mixed precision, chosen inside the graph as in `OpenAttention`."""

    def __init__(self, module: nn.Module, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.module, self.dtype, self.device = module, dtype, device

    def forward(self, *args: Tensor) -> Any:
        """The result of ``module``."""
        with torch.autocast(self.device, self.dtype):
            return self.module(*args)
