"""Layers with rounded weights and calibrated inputs, for inference in integers and for training that knows about it.

Source: Jacob et al. (arXiv 1712.05877), Krishnamoorthi (arXiv 1806.08342): scales of weights per output channel, scales
of activations per tensor, derivatives straight through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fpsim.casts import UNSCALED, Cast, parse_cast, refuse_timed
from fpsim.formats import ElementFormat, parse_element
from fpsim.policy.globs import matches
from fpsim.posttraining.columns import name_of
from fpsim.posttraining.layers import call_model, check_reached, evaluating, watch_inputs
from fpsim.suggestions import did_you_mean
from fpsim.tensor_functions import round

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class RoundedWeight(nn.Module):
    """The weight of a layer, rounded when it is used; a parametrization (`torch.nn.utils.parametrize`).

    Args:
        cast: how to round.
        axes: the axes of the weight along which rows and blocks that share a scale lie.
    """

    def __init__(self, cast: Cast, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.cast, self.axes = name_of(cast), axes

    def forward(self, weight: Tensor) -> Tensor:
        """``weight`` rounded; its derivative is 1."""
        return round(weight, self.cast, axis=self.axes)

    def extra_repr(self) -> str:
        """The cast, for ``print(model)``."""
        return self.cast


class RoundedInput(nn.Module):
    """A tensor divided by a fixed ratio, rounded, and multiplied by it.

    The derivative is 1 where the quotient lies in the range of the format, and 0 elsewhere.

    Args:
        format: the name of the elements, ``int8``.
        ratio: a positive number, float32 without axes. It is a buffer, and so a part of the state of the model.
    """

    ratio: Tensor

    def __init__(self, format: str, ratio: Tensor) -> None:
        super().__init__()
        self.cast = f"{format}/{UNSCALED}"
        self.register_buffer("ratio", ratio)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` rounded, in its own dtype."""
        ratio = self.ratio.to(x.dtype)
        return round(x / ratio, self.cast, overflow="sat_finite", gradient="clipped") * ratio

    def extra_repr(self) -> str:
        """The format, for ``print(model)``."""
        return self.cast


def round_layers(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    weight: str = "int8",
    activation: str = "int8",
    skip: Iterable[str] | str = (),
    fold: bool = True,
) -> dict[str, float]:
    """Let the linear layers and convolutions of ``model`` multiply rounded weights and rounded inputs, in place.

    The weights are rounded whenever they are used, each output channel with a scale of its own. The inputs of a layer
    have one ratio, the largest magnitude in the batches over that of the format. It stays fixed. The model runs
    (post-training rounding), and trains (quantization-aware training): its parameters stay unrounded, and derivatives
    pass straight through the rounding. Products of two activations, as in attention, are not rounded.

    Args:
        model: an uncompiled module. Layers are `torch.nn.Linear`, convolutions, and transposed convolutions without
            groups.
        batches: a list of mappings (keyword arguments), tuples and lists (positional arguments), or single arguments.
        weight: a cast; its rows are the numbers of one output channel.
        activation: a format without a scale, signed and with a finite range.
        skip: globs of the paths of layers to leave out.
        fold: whether batch normalizations behind convolutions are folded into these first (`fold_batch_norms`).

    Returns:
        For the path of each layer the ratio of its inputs.

    Raises:
        ValueError: a format does not fit, a glob matches nothing, no layer is left, or a layer is not reached or sees
            an infinity or a NaN.
    """
    cast, element = _casts(weight, activation)
    batches = list(batches)
    if fold:
        fold_batch_norms(model, batches)
    layers = _layers(model, skip)
    largest: dict[str, Tensor] = {}

    def see(path: str, x: Tensor) -> None:
        amax = x.abs().amax().float()
        largest[path] = torch.maximum(largest[path], amax) if path in largest else amax

    count = watch_inputs(model, layers, batches, see)
    check_reached(layers.keys() - largest.keys(), count)
    if wrong := [path for path, amax in largest.items() if not amax.isfinite()]:
        raise ValueError(f"an input of {wrong[0]} has an infinity or a NaN: its range is no number")
    for path, layer in layers.items():
        ratio = torch.where(largest[path] == 0, 1.0, largest[path] / element.max)
        axes = (
            (0, *range(2, layer.weight.dim()))
            if isinstance(layer, _TRANSPOSED)
            else tuple(range(1, layer.weight.dim()))
        )
        parametrize.register_parametrization(layer, "weight", RoundedWeight(cast, axes))
        layer.rounded_input = RoundedInput(element.name, ratio)
        layer.register_forward_pre_hook(_round_input)
    return {path: float(layer.rounded_input.ratio) for path, layer in layers.items()}


def _round_input(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (layer.rounded_input(args[0]), *args[1:])


def _casts(weight: str, activation: str) -> tuple[Cast, ElementFormat]:
    cast, element = parse_cast(weight), parse_element(activation)
    if cast is None:
        raise ValueError("the format 'none' rounds nothing: name one for weights, such as int8")
    refuse_timed(cast, "round_layers")
    if cast.is_stochastic or cast.transform is not None:
        raise ValueError(f"round_layers rounds weights to nearest values, without a transform, got {str(cast)!r}")
    if not getattr(element, "signed", True):
        raise ValueError(f"activations have one ratio and no zero point, got {activation!r}: use a signed format, int8")
    return cast, element


def _layers(model: nn.Module, skip: Iterable[str] | str) -> dict[str, Any]:
    globs = (skip,) if isinstance(skip, str) else tuple(skip)
    found = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED))
    }
    for glob in globs:
        if not any(matches(glob, path) for path in found):
            raise ValueError(f"skip={glob!r} matches no layer{did_you_mean(glob, found)}")
    layers = {path: module for path, module in found.items() if not any(matches(glob, path) for glob in globs)}
    if not layers:
        raise ValueError("no layer is left to round: the model has none, or skip matches all")
    for path, module in layers.items():
        if parametrize.is_parametrized(module, "weight"):
            raise ValueError(f"the weight of {path} is parametrized already: round_layers is for plain layers, once")
        if isinstance(module, _TRANSPOSED) and module.groups > 1:
            raise ValueError(
                f"{path} is a transposed convolution with groups, whose channels are shared: skip={path!r}"
            )
    return layers


@torch.no_grad()
def fold_batch_norms(model: nn.Module, batches: Iterable[Any]) -> dict[str, str]:
    """Fold each batch normalization that reads the output of a convolution into the convolution, in place.

    Weights and biases of the convolution take over the running statistics, and an identity takes the place of the
    normalization. The model computes the same in evaluation mode, which is checked with the first batch.

    Args:
        model: an uncompiled module.
        batches: as for `round_layers`; the first one is used.

    Returns:
        For the path of each convolution that of the normalization.

    Raises:
        ValueError: there is no batch, or the output of a convolution is used elsewhere too, so that the model would
            compute something else. The model is then unchanged.
    """
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError("there is no batch: give at least one")
    pairs = _pairs(model, batch)
    if not pairs:
        return {}
    with evaluating(model):
        before = call_model(model, batch)
    kept = {path: (module.weight, module.bias) for path, module in ((p, model.get_submodule(p)) for p in pairs)}
    norms = {path: model.get_submodule(path) for path in pairs.values()}
    for path, norm_path in pairs.items():
        convolution: Any = model.get_submodule(path)
        norm: Any = norms[norm_path]
        statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        convolution.weight, convolution.bias = fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)
        _set(model, norm_path, nn.Identity())
    with evaluating(model):
        after = call_model(model, batch)
    if not _close(before, after):
        for path, (weight, bias) in kept.items():
            convolution = model.get_submodule(path)
            convolution.weight, convolution.bias = weight, bias
        for path, norm in norms.items():
            _set(model, path, norm)
        raise ValueError(
            f"the model computes something else with {', '.join(pairs.values())} folded: outputs of these convolutions "
            "are used elsewhere too. Fold them by hand, and use fold=False"
        )
    return pairs


def _pairs(model: nn.Module, batch: Any) -> dict[str, str]:
    """For each convolution whose one call gives the input of a batch normalization the path of that."""
    outputs: dict[int, tuple[str, Tensor]] = {}
    pairs: dict[str, list[str]] = {}
    calls: dict[str, int] = {}

    def conv_hook(path: str) -> Any:
        def hook(_: nn.Module, args: Any, output: Tensor) -> None:
            calls[path] = calls.get(path, 0) + 1
            outputs[id(output)] = (path, output)

        return hook

    def norm_hook(path: str) -> Any:
        def hook(norm: Any, args: tuple[Tensor, ...]) -> None:
            calls[path] = calls.get(path, 0) + 1
            if id(args[0]) in outputs and norm.track_running_stats:
                pairs.setdefault(outputs[id(args[0])][0], []).append(path)

        return hook

    handles = []
    for path, module in model.named_modules():
        if isinstance(module, _CONVOLUTIONS):
            handles.append(module.register_forward_hook(conv_hook(path)))
        elif isinstance(module, _NORMS):
            handles.append(module.register_forward_pre_hook(norm_hook(path)))
    try:
        with evaluating(model):
            call_model(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {path: norms[0] for path, norms in pairs.items() if len(norms) == calls[path] == calls[norms[0]] == 1}


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _close(a: Any, b: Any) -> bool:
    """Whether two outputs of a model have the same numbers, up to the rounding of sums."""
    if isinstance(a, Tensor):
        return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().amax()) if a.numel() else 0.0)
    if isinstance(a, Mapping):
        return all(_close(a[key], b[key]) for key in a)
    return all(map(_close, a, b)) if isinstance(a, tuple | list) else a == b
