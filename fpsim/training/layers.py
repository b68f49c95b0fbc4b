"""The linear layers of a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer. Hugging Face's GPT-2 has some of a class named after convolutions."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_weights(model: nn.Module, optimizer: Any) -> list[Tensor]:
    """The weights of linear layers of ``model`` that are parameters of ``optimizer``, each once.

    Raises:
        ValueError: there is none.
    """
    known = {p for group in optimizer.param_groups for p in group["params"]}
    weights: list[Tensor] = [module.get_parameter("weight") for module in model.modules() if is_linear(module)]
    found = [weight for weight in dict.fromkeys(weights) if weight in known]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer whose weight is a parameter of the optimizer")
    return found
