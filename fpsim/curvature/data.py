"""The data that a curvature operator goes through: batches, and the weight of each in the mean loss.

A `Witness` compares the data and the values of the loss between the passes of an operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

#: The weight of each batch: a function of a batch, numbers in the order of the batches, or "equal".
Weight = Callable[[Any], float | Tensor] | Sequence[float] | str | None

#: The message where there is nothing to average over.
NO_DATA = "no batch has a weight above zero: there is no data (or a loader that was empty)"

#: Stands for "no batch": the loss is a function of the parameters alone.
NO_BATCH = object()


def call(function: Callable[..., Tensor], argument: Any, batch: Any) -> Tensor:
    """``function(argument, batch)``, or ``function(argument)`` where ``batch`` is `NO_BATCH`."""
    return function(argument) if batch is NO_BATCH else function(argument, batch)


@dataclass(frozen=True, eq=False)
class Data:
    """Batches and their weights; without data, the only batch is `NO_BATCH`.

    Attributes:
        batches: any iterable that can be read again.
        weight: a function of a batch, one number per batch, or None: all weights are 1.
        count: how many batches there are; None if ``batches`` has no length.
    """

    batches: Iterable[Any]
    weight: Callable[[Any], float | Tensor] | Sequence[float] | None
    count: int | None

    @classmethod
    def of(cls, batches: Iterable[Any] | None, weight: Weight) -> Data:
        """The data of the arguments ``batches`` and ``weight`` of `fpsim.curvature.hessian`.

        Raises:
            ValueError: ``batches`` is empty, is one batch, or can be read only once, or ``weight`` does not fit it.
        """
        if batches is None:
            if weight is not None:
                raise ValueError("weight is for batches: pass batches as well, or omit weight")
            return cls((NO_BATCH,), None, 1)
        if isinstance(batches, Iterator):
            raise ValueError(
                f"batches is a {type(batches).__name__}, which can be read only once, but every product reads all "
                "batches: pass list(batches), or a loader"
            )
        if isinstance(batches, Mapping | Tensor | str):
            raise ValueError(f"batches is one batch (a {type(batches).__name__}): pass it in a list, [batch]")
        count = _length(batches)
        if count == 0:
            raise ValueError("batches is empty")
        if weight is None and count != 1:
            raise ValueError(
                "several batches need a weight each: weight=label_count (a language model's tokens), "
                "weight=lambda batch: len(batch[0]) (samples), or weight='equal'"
            )
        if isinstance(weight, str):
            if weight != "equal":
                raise ValueError(f"unknown weight {weight!r}: use 'equal', a function of a batch, or numbers")
            weight = None
        return cls(batches, weight, count)

    def first(self) -> Any:
        """The first batch.

        Raises:
            ValueError: there is none.
        """
        for batch in self.batches:
            return batch
        raise ValueError(NO_DATA)

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        weights = None if self.weight is None or callable(self.weight) else iter(self.weight)
        for batch in self.batches:
            if callable(self.weight):
                value = float(self.weight(batch))
            else:
                value = 1.0 if weights is None else float(_next_weight(weights))
            if not 0 <= value < float("inf"):
                raise ValueError(f"a batch has the weight {value}: weights are finite and not negative")
            yield batch, value
        if weights is not None and next(weights, None) is not None:
            raise ValueError("there are more weights than batches")


def _length(batches: Iterable[Any]) -> int | None:
    """How many batches there are, or None if they have no length."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # no length, or a loader over a stream, whose length raises
        return None


def _next_weight(weights: Iterator[float]) -> float:
    value = next(weights, None)
    if value is None:
        raise ValueError("there are fewer weights than batches")
    return value


def fingerprint(batch: Any) -> tuple[str, ...]:
    """The shape, the dtype and two weighted sums of each tensor of a batch; other leaves as text."""
    if batch is NO_BATCH:
        return ()
    parts = []
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().reshape(-1).to(torch.complex128 if leaf.is_complex() else torch.float64)
            ramp = torch.arange(1, flat.numel() + 1, dtype=torch.float64, device=flat.device)
            parts.append(f"{tuple(leaf.shape)} {leaf.dtype} {flat.sum().item()!r} {(flat * ramp).sum().item()!r}")
        else:
            parts.append(repr(leaf))
    return tuple(parts)


def why_batches_differ(first: Sequence[tuple[str, ...]], second: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Why the fingerprints of two passes over the data differ, if they do."""
    if list(first) == list(second):
        return ()
    if sorted(first) == sorted(second):
        return (
            "the batches come in another order at each pass (shuffle=True): results differ only by rounding errors, "
            "but pass shuffle=False for results that repeat",
        )
    return (
        "the batches differ from pass to pass: the loader shuffles samples between batches (shuffle=True), or augments "
        "at random; pass shuffle=False, or list(loader)",
    )


class Witness:
    """Compares the batches of the first two passes over the data, and the values of the loss at all of them.

    `reasons` says why an operator is not the matrix of one function. It stays empty if nothing changes.
    """

    def __init__(self) -> None:
        self._passes: list[list[tuple[str, ...]]] = []
        self._values: dict[Hashable, float] = {}
        self._changed: tuple[float, float] | None = None

    def begin(self) -> None:
        """A pass over the data begins."""
        self._passes = [*self._passes[:2], []]

    def batch(self, batch: Any) -> None:
        """The pass reads ``batch``."""
        if len(self._passes) <= 2:
            self._passes[-1].append(fingerprint(batch))

    def value(self, place: Hashable, value: Tensor) -> None:
        """The loss, or the outputs, of the batch at ``place`` have this value.

        Raises:
            FloatingPointError: it is NaN, or an infinite loss.
            ValueError: there are no outputs.
        """
        value = value.detach()
        if not value.numel():
            raise ValueError(f"the outputs are empty, of shape {tuple(value.shape)}: give a batch with samples")
        scalar = value.dim() == 0
        total = value.item() if scalar else value.abs().sum(dtype=torch.float64).item()
        if math.isnan(total) or (scalar and not math.isfinite(total)):
            raise FloatingPointError(
                f"the {'loss is' if scalar else 'outputs have'} {total if scalar else math.nan}: there is no curvature "
                "to measure. Look for labels that all are ignored, for a mean over nothing, and for overflow"
            )
        first = self._values.setdefault(place, total)
        tolerance = min(1000 * torch.finfo(value.dtype).eps, 0.02)
        if self._changed is None and abs(total - first) > tolerance * abs(first):
            self._changed = first, total

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the loss is another function from product to product, if it is."""
        complete = self._passes[:2]
        if len(complete) == 2 and len(complete[0]) == len(complete[1]):
            differ = why_batches_differ(*complete)
            if differ:
                return differ
        if self._changed is None:
            return ()
        return (
            "the loss changes from call to call (from {:.6g} to {:.6g}): dropout is active, it draws other random "
            "numbers, or it keeps a state. Call model.eval(); fpsim.curvature.check_determinism says more".format(
                *self._changed
            ),
        )
