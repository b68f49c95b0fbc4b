"""The linear layers of a model, the numbers that reach them, and the batches that a model runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.policy.globs import matches
from fpsim.suggestions import did_you_mean


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """A linear layer of a model.

    Attributes:
        path: the path of the module.
        module: a `torch.nn.Linear`, or the ``Conv1D`` of transformers, which stores its weight transposed.
    """

    path: str
    module: nn.Module

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix of shape (outputs, inputs), a view of the parameter without a gradient."""
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        return weight.T if is_conv1d(self.module) else weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of shape (outputs,)."""
        return self.module.bias  # type: ignore[return-value]

    @torch.no_grad()
    def write(self, matrix: Tensor) -> None:
        """Replace the numbers of the weight by those of a matrix of shape (outputs, inputs)."""
        self.matrix.copy_(matrix)


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is a ``Conv1D`` of transformers: a linear layer with a weight of shape (inputs, outputs)."""
    return any(
        f"{kind.__module__}.{kind.__name__}" == "transformers.pytorch_utils.Conv1D" for kind in type(module).mro()
    )


def linear_layers(model: nn.Module, skip: Iterable[str] | str = ()) -> dict[str, LinearLayer]:
    """The linear layers of ``model`` by path, in the order of its modules.

    Args:
        skip: globs of the paths of modules to leave out.

    Raises:
        ValueError: a glob matches no module, no layer is left, or the weight of a layer is that of another module too,
            or is parametrized.

    >>> list(linear_layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), skip="2"))
    ['0']
    """
    globs = (skip,) if isinstance(skip, str) else tuple(skip)
    paths = [path for path, _ in model.named_modules()]
    for glob in globs:
        if not any(matches(glob, path) for path in paths):
            raise ValueError(f"skip={glob!r} matches no module of the model{did_you_mean(glob, paths)}")
    layers = {
        path: LinearLayer(path, module)
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and not any(matches(glob, path) for glob in globs)
    }
    if not layers:
        raise ValueError("no linear layer is left to round: the model has none, or skip matches all")
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    for path, layer in layers.items():
        if not isinstance(layer.module.weight, nn.Parameter):
            raise ValueError(
                f"the weight of {path} is computed when it is used, and cannot be written: remove its parametrization "
                f"(torch.nn.utils.parametrize), or leave the layer out, skip={path!r}"
            )
        if len(shared := owners.get(id(layer.module.weight), [])) > 1:
            raise ValueError(
                f"{' and '.join(shared)} are one parameter, and rounding it changes all of them: leave the layer out, "
                f"skip={path!r}, or untie it (model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone()))"
            )
    return layers


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in every place where ``model`` holds ``old``, in training mode if ``old`` is."""
    new.train(old.training)
    for parent in model.modules():
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)


def call_model(model: nn.Module, batch: Any) -> Any:
    """The output of ``model`` for a batch.

    Args:
        batch: a mapping, which becomes keyword arguments; a tuple or list, which becomes positional arguments; any
            other value, which becomes the only argument.
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it ``model`` is in evaluation mode and computes no gradients; afterwards each module has its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def watch_inputs(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    see: Callable[[str, Tensor], None],
) -> int:
    """Run ``model`` on every batch and call ``see(path, input)`` whenever one of ``modules`` is called.

    Returns:
        The number of batches.
    """

    def hook(path: str) -> Callable[..., None]:
        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(path, (*args, *kwargs.values())[0].detach())

        return call

    handles = [
        module.register_forward_pre_hook(hook(path), with_kwargs=True, prepend=True) for path, module in modules.items()
    ]
    count = 0
    try:
        with evaluating(model):
            for batch in batches:
                call_model(model, batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    return count


def check_reached(missing: Iterable[str], batches: int) -> None:
    """Raise ValueError if there was no batch, or a layer is ``missing`` because no batch reached it."""
    if not batches:
        raise ValueError("there is no batch: give at least one")
    if lost := sorted(missing):
        raise ValueError(
            f"no batch reaches {', '.join(lost)}: give more batches, or leave these layers out, skip={lost}. (A layer "
            "whose weight is used without a call of the layer is never reached)"
        )
