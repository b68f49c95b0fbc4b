"""The Hessians of layers' output errors, from batches: what GPTQ needs to know about the inputs of a layer.

Source: Frantar et al., GPTQ (arXiv 2210.17323), section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.posttraining.layers import LinearLayer, check_reached, linear_layers, watch_inputs

DTYPES = (torch.float64, torch.float32)


def input_hessians(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    skip: Iterable[str] | str = (),
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """For each linear layer the matrix 2 X^T X, where the rows of X are all its input vectors.

    It is the Hessian of the squared error of an output with respect to a row of the weight. The model runs once on
    every batch, in evaluation mode. The memory is that of the matrices, whatever the number of batches.

    Args:
        model: an uncompiled module. Linear layers are `torch.nn.Linear` and the ``Conv1D`` of transformers.
        batches: mappings (keyword arguments), tuples and lists (positional arguments), or single arguments.
        skip: globs of the paths of layers to leave out.
        dtype: float64 or float32, that of the products and sums.

    Returns:
        For the path of each layer a tensor of shape (inputs, inputs). A layer that is called several times has the sum.

    Raises:
        ValueError: there is no batch, a layer is not reached, or the errors of `fpsim.posttraining.linear_layers`.
        TypeError: ``dtype`` is another one.

    >>> model = nn.Sequential(nn.Linear(2, 1, bias=False))
    >>> input_hessians(model, [torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])])["0"]
    tensor([[ 2.,  4.],
            [ 4., 10.]], dtype=torch.float64)
    """
    return hessians_of(model, batches, linear_layers(model, skip), dtype)


def hessians_of(
    model: nn.Module, batches: Iterable[Any], layers: Mapping[str, LinearLayer], dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """`input_hessians` of some layers."""
    if dtype not in DTYPES:
        raise TypeError(f"Hessians are summed in float64 or float32, got {dtype}")
    sums: dict[str, Tensor] = {}

    def add(path: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        if path not in sums:
            sums[path] = torch.zeros(rows.shape[1], rows.shape[1], dtype=dtype, device=x.device)
        sums[path].addmm_(rows.T, rows, alpha=2.0)

    count = watch_inputs(model, {path: layer.module for path, layer in layers.items()}, batches, add)
    check_reached(layers.keys() - sums.keys(), count)
    return {path: sums[path] for path in layers}
