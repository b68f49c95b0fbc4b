"""Optimizers that update one parameter after the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class PerParameterOptimizer(Optimizer):
    """An optimizer whose step is `update` of each parameter that has a gradient."""

    @abstractmethod
    def update(self, group: dict[str, Any], p: Tensor, gradient: Tensor) -> None:
        """Change the parameter ``p`` of ``group`` and its state, by its dense gradient."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step. Returns the result of ``closure``, which computes the loss again, or None.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError(
                        f"{type(self).__name__} takes dense gradients: leave sparse=True out of the embedding"
                    )
                self.update(group, p, p.grad)
        return loss
