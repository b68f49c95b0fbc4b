"""The data that a curvature operator goes through: batches, and the weight of each in the mean loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: The weight of each batch: a function of a batch, numbers in the order of the batches, or "equal".
Weight = Callable[[Any], float | Tensor] | Sequence[float] | str | None

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
        """The first batch."""
        return next(iter(self.batches))

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
