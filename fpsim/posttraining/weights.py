"""Rounding the weights of the linear layers of a model once, by GPTQ or to the nearest values, with compensation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fpsim.casts import Cast, CastLike, apply_cast, check_cast, parse_cast
from fpsim.policy.globs import matches
from fpsim.posttraining.columns import Constraint, check_matrix, columns_of, weight_cast
from fpsim.posttraining.gptq import Order, gptq
from fpsim.posttraining.hessians import hessians_of
from fpsim.posttraining.layers import LinearLayer, check_reached, linear_layers, replace_module, watch_inputs
from fpsim.posttraining.low_rank import CompensatedLinear, low_rank_factors
from fpsim.suggestions import did_you_mean

Method = Literal["gptq", "nearest"]
METHODS: tuple[str, ...] = get_args(Method)


def round_weights(
    model: nn.Module,
    format: CastLike | Mapping[str, CastLike],
    batches: Iterable[Any] | None = None,
    *,
    method: Method = "gptq",
    skip: Iterable[str] | str = (),
    damping: float = 0.01,
    block: int = 128,
    order: Order = "given",
    constraint: Constraint | None = None,
    sequential: bool = True,
    rank: int = 0,
    factors: CastLike | None = None,
    as_product: bool = False,
) -> None:
    """Round the weights of all linear layers of ``model``, in place. Rows and blocks lie along the inputs.

    Args:
        model: an uncompiled module. Linear layers are `torch.nn.Linear` and the ``Conv1D`` of transformers.
        format: a cast for all layers, or a mapping from globs of paths to casts. The first glob that matches decides;
            a layer that no glob matches, and one with ``none``, stays as it is.
        batches: mappings (keyword arguments), tuples and lists (positional arguments), or single arguments. GPTQ needs
            them, and runs through them several times if it is ``sequential``.
        method: ``gptq`` (`fpsim.posttraining.gptq`), or ``nearest``: each weight by itself, with the scales of its
            groups.
        skip: globs of the paths of layers to leave out. A tied head has to be left out.
        damping, block, order: the arguments of `fpsim.posttraining.gptq`.
        constraint: a function of the ratios of a group of columns, such as `fpsim.posttraining.power_of_two_ratios`.
        sequential: whether each layer sees the inputs that the layers before it give with their rounded weights, as in
            GPTQ's code. The model then runs on all batches once for each set of layers that have the same input. Its
            memory is one Hessian. Without it, the model runs once, and all Hessians are kept.
        rank: the rank of the compensation (`fpsim.posttraining.low_rank_factors`), or 0 for none.
        factors: the format of its factors.
        as_product: whether the compensation is a product beside the rounded weight (`CompensatedLinear` takes the place
            of the layer, with parameters of its own), and not added to it.

    Raises:
        ValueError: an argument is unknown, GPTQ has no batches, a layer is not reached, a glob matches nothing, or the
            errors of `fpsim.posttraining.linear_layers`, `gptq` and `low_rank_factors`. The weights of layers before
            the one that is named may be rounded then.
        TypeError: in the same cases as `gptq`.

    >>> model = nn.Sequential(nn.Linear(2, 2, bias=False))
    >>> model[0].weight.data = torch.tensor([[1.0, 0.3], [2.0, -7.0]])
    >>> round_weights(model, "int4/row", method="nearest")
    >>> model[0].weight.data
    tensor([[ 1.0000,  0.2857],
            [ 2.0000, -7.0000]])
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: use one of {', '.join(METHODS)}")
    layers = linear_layers(model, skip)
    casts = _casts(format, layers)
    layers = {path: layer for path, layer in layers.items() if path in casts}
    if method == "gptq" and batches is None:
        raise ValueError("GPTQ needs batches, from which it takes the inputs of the layers: or use method='nearest'")
    settings = _Settings(damping, block, order, constraint, rank, factors, as_product)
    if method == "nearest" or batches is None:
        for path, layer in layers.items():
            settings.write(model, layer, casts[path], None)
    elif not sequential:
        for path, hessian in hessians_of(model, batches, layers).items():
            settings.write(model, layers[path], casts[path], hessian)
    else:
        if iter(batches) is batches:
            raise ValueError(
                "these batches can be read only once, and each set of layers needs them: give a list, or "
                "sequential=False"
            )
        for paths in _in_order(model, batches, layers):
            first, *_ = paths
            hessian = hessians_of(model, batches, {first: layers[first]})[first]
            for path in paths:
                settings.write(model, layers[path], casts[path], hessian)


@dataclass(frozen=True)
class _Settings:
    """The arguments of `round_weights` that say how one weight is rounded."""

    damping: float
    block: int
    order: Order
    constraint: Constraint | None
    rank: int
    factors: CastLike | None
    as_product: bool

    @torch.no_grad()
    def write(self, model: nn.Module, layer: LinearLayer, cast: Cast, hessian: Tensor | None) -> None:
        """Round the weight of one layer: by GPTQ, or without a Hessian to the nearest values."""
        weight = layer.matrix
        check_matrix(weight, f"the weight of {layer.path}")
        check_cast(weight.dtype, cast)
        if hessian is None:
            rounded = _nearest(weight, cast, self.constraint)
        else:
            rounded = gptq(
                weight,
                hessian,
                cast,
                damping=self.damping,
                block=self.block,
                order=self.order,
                constraint=self.constraint,
            )
        if not self.rank:
            layer.write(rounded)
            return
        left, right = low_rank_factors(weight - rounded, self.rank, self.factors)
        if not self.as_product:
            layer.write(rounded + left @ right)
            return
        module = CompensatedLinear(rounded, left, right, layer.bias)
        replace_module(model, layer.module, module)


def _nearest(weight: Tensor, cast: Cast, constraint: Constraint | None) -> Tensor:
    if constraint is None:
        return apply_cast(weight, cast)
    return columns_of(weight, cast, constraint).round_all(weight)


def _casts(format: CastLike | Mapping[str, CastLike], layers: Mapping[str, LinearLayer]) -> dict[str, Cast]:
    """The cast of each layer that is rounded, by path."""
    if not isinstance(format, Mapping):
        cast = weight_cast(format, "round_weights")
        return dict.fromkeys(layers, cast)
    parsed = {
        glob: None if parse_cast(text) is None else weight_cast(text, "round_weights") for glob, text in format.items()
    }
    for glob in parsed:
        if not any(matches(glob, path) for path in layers):
            raise ValueError(f"{glob!r} matches no linear layer{did_you_mean(glob, layers)}")
    chosen = {path: next((cast for glob, cast in parsed.items() if matches(glob, path)), None) for path in layers}
    return {path: cast for path, cast in chosen.items() if cast is not None}


def _in_order(model: nn.Module, batches: Iterable[Any], layers: Mapping[str, LinearLayer]) -> Iterator[list[str]]:
    """The paths of the layers in the order of their first calls; those with one and the same input are together."""
    keys: dict[str, list[tuple[Any, ...]]] = {path: [] for path in layers}
    order: dict[str, None] = {}
    kept: list[Tensor] = []  # so that no two inputs have the same address

    def see(path: str, x: Tensor) -> None:
        order.setdefault(path)
        kept.append(x)
        keys[path].append((x.data_ptr(), x.shape, x.stride(), x._version))

    first = next(iter(batches), None)
    watch_inputs(model, {path: layer.module for path, layer in layers.items()}, [] if first is None else [first], see)
    if lacking := [path for path in layers if path not in order]:
        count = watch_inputs(model, {path: layers[path].module for path in lacking}, batches, see)
        check_reached([path for path in lacking if path not in order], count)
    groups: dict[Any, list[str]] = {}
    for path in order:
        groups.setdefault(tuple(keys[path]), []).append(path)
    yield from groups.values()
