"""A model compiled under a policy, by one of fpsim's backends."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fpsim.compile_backend.report.running import ISOLATED
from fpsim.policy import Policy


def check_backend(backend: str) -> None:
    """Refuse a backend that does not round: torch's own would ignore the policy.

    Raises:
        ValueError: it is neither ``fpsim_eager`` nor ``fpsim``.
    """
    if backend not in ("fpsim", "fpsim_eager"):
        raise ValueError(f"unknown backend {backend!r}: use 'fpsim_eager' or 'fpsim'")


def under(model: nn.Module, policy: Policy, backend: str) -> Any:
    """``model`` compiled under ``policy``; its parameters are the same tensors.

    Raises:
        ValueError: the errors of `check_backend`.
    """
    check_backend(backend)
    options: dict[str, Any] = {"policy": policy}
    return torch.compile(model, backend=backend, options=options, dynamic=False, **ISOLATED)
