"""The number that a model gives for a batch, and means over batches with standard errors."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.compile_backend.errors import UnroundedError
from fpsim.curvature.data import fingerprint
from fpsim.curvature.losses import own_loss, scalar_loss

#: From a batch to its weight in means.
Weight = Callable[[Any], float | Tensor]


@dataclass(frozen=True)
class Mean:
    """A weighted mean over batches.

    Attributes:
        value: the mean.
        stderr: its standard error, as if batches were independent; NaN for fewer than two batches.
    """

    value: float
    stderr: float

    def __str__(self) -> str:
        """The mean and its error, with the digits that the error leaves: ``0.0032 ± 0.0014``."""
        if not (math.isfinite(self.value) and 0 < self.stderr < math.inf):
            return f"{self.value:.4g}"
        digits = 1 - math.floor(math.log10(self.stderr))
        if digits > 7:
            return f"{self.value:.2e} ± {self.stderr:.1e}"
        return f"{self.value:.{max(digits, 0)}f} ± {self.stderr:.{max(digits, 0)}f}"

    @property
    def plain(self) -> str:
        """The mean alone, with six digits."""
        return f"{self.value:.6g}"


def mean(values: Sequence[float], weights: Sequence[float]) -> Mean:
    """The mean of ``values`` with ``weights``; with equal weights its error is the usual one, ``s / sqrt(n)``."""
    x, w = (torch.tensor(list(each), dtype=torch.float64) for each in (values, weights))
    w = w / w.sum()
    centre = (w * x).sum()
    count = len(x)
    spread = (w.square() * (x - centre).square()).sum() * (count / (count - 1)) if count > 1 else torch.tensor(math.nan)
    return Mean(float(centre), float(spread.sqrt()))


def number_of(model: Callable[..., Any], batch: Any, function: Callable[..., Any] | None) -> Any:
    """The result of ``function``, a loss or a metric, for ``batch``; without one, the loss that the model returns.

    A mapping gives ``function(model(**batch), batch)``, or ``model(**batch).loss``. A tuple or a list gives
    ``function(model(batch[0]), *batch[1:])``, or ``model(*batch)``. Any other batch gives
    ``function(model(batch))``, or ``model(batch)``.

    Raises:
        ValueError: the batch is an empty tuple or list.
        TypeError: ``function`` takes another number of arguments.
    """
    if isinstance(batch, tuple | list) and not batch:
        raise ValueError(f"a batch is {batch!r}: a tuple or a list holds the inputs of the model, and then the targets")
    if isinstance(batch, Mapping):
        outputs, others, call = model(**batch), [batch], "function(model(**batch), batch)"
    elif isinstance(batch, tuple | list):
        outputs = model(*batch) if function is None else model(batch[0])
        others, call = list(batch[1:]), "function(model(batch[0]), *batch[1:])"
    else:
        outputs, others, call = model(batch), [], "function(model(batch))"
    if function is None:
        return own_loss(outputs)
    try:
        return function(outputs, *others)
    except TypeError as error:
        if _takes(function, outputs, *others):
            raise
        name = getattr(function, "__name__", type(function).__name__)
        kind = f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, tuple | list) else type(batch).__name__
        raise TypeError(
            f"{name} does not fit the batches. A batch is a {kind} here, and is used as {call}, but {error}. If "
            "batches is one batch, pass [batch]"
        ) from error


def _takes(function: Callable[..., Any], *args: Any) -> bool:
    """Whether ``function`` can be called with ``args``, as far as its signature tells."""
    try:
        inspect.signature(function).bind(*args)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def loss_of(model: Callable[..., Any], batch: Any, loss: Callable[..., Any] | None) -> Tensor:
    """`number_of` for a loss: a tensor of shape ``()``.

    Raises:
        TypeError, ValueError: the loss is not one real floating-point number.
    """
    return scalar_loss(number_of(model, batch, loss))


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be measured.

    Raises:
        TypeError: it is no module.
        ValueError: it is compiled, or it or a module in it is in training mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
    in_place = getattr(model, "_compiled_call_impl", None)
    if hasattr(model, "_orig_mod") or hasattr(in_place, "_torchdynamo_orig_callable"):
        raise ValueError("the model is compiled, in which no other format can be simulated: give it uncompiled")
    training = next((path for path, module in model.named_modules() if module.training), None)
    if training is not None:
        raise ValueError(
            f"{training or 'the model'} is in training mode, in which dropout and batch normalisation change the loss "
            "from call to call: call model.eval()"
        )


def weighed(
    model: nn.Module, batches: Iterable[Any], weight: Weight | None, repeat: Callable[[Any], None]
) -> Iterator[tuple[int, Any, float]]:
    """Number, batch and weight of each of ``batches``; what uses a batch must leave it and the buffers as they are.

    After the first batch has been used, ``repeat`` is called with it: it runs the model once more and compares
    (`refuse_unrepeated`).

    Raises:
        ValueError: ``batches`` is one batch or empty, a weight is not above zero, a batch has changed in use, or
            ``model`` has changed its buffers on the first batch.
    """
    if isinstance(batches, Mapping | Tensor | str):
        raise ValueError(f"batches is one batch (a {type(batches).__name__}): pass it in a list, [batch]")
    number = -1
    for number, batch in enumerate(batches):
        own = 1.0 if weight is None else float(weight(batch))
        if not 0 < own < math.inf:
            raise ValueError(f"batch {number} has the weight {own}: weights are finite and above zero")
        before = fingerprint(batch)
        state = fingerprint(list(model.buffers())) if number == 0 else None
        yield number, batch, own
        if fingerprint(batch) != before:
            raise ValueError(f"batch {number} has changed while it was in use: let the model copy what it writes to")
        if state is not None and fingerprint(list(model.buffers())) != state:
            raise ValueError(
                "the model changes its buffers when it runs, so that no two of its runs can be compared: let it keep "
                "no state in evaluation mode"
            )
        if number == 0:
            repeat(batch)
    if number < 0:
        raise ValueError("there is no batch: give at least one (a generator can be read only once)")


def refuse_nonfinite(value: float, number: int, what: str = "loss") -> None:
    """Refuse a value of the unrounded model on batch ``number`` that is infinite or NaN; ``what`` is its name.

    Raises:
        FloatingPointError: it is.
    """
    if not math.isfinite(value):
        raise FloatingPointError(
            f"the {what} of the unrounded model is {value} on batch {number}: look for labels that all are ignored, "
            "for a mean over nothing, and for overflow"
        )


#: By so much of its value may the loss of an unrounded model change from run to run, as by sums in another order.
_REPEATS = 1e-6


def refuse_unrepeated(value: float, again: float, number: int, what: str = "loss") -> None:
    """Refuse a model whose unrounded ``value`` on batch ``number`` is another one, ``again``, in a later run.

    Raises:
        ValueError: it is.
    """
    if not abs(again - value) <= _REPEATS * abs(value):
        raise ValueError(
            f"the {what} of the unrounded model on batch {number} is {value:.9g} in one run and {again:.9g} in "
            "another, so that no two of its runs can be compared: let the model keep no state (a count of its calls, a "
            "cache), and draw random numbers from torch's own generator"
        )


@contextmanager
def same_draws(number: int) -> Iterator[None]:
    """A block that draws the same random numbers for every run of batch ``number``; the generators are restored."""
    with torch.random.fork_rng():
        torch.manual_seed(number)
        yield


@contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """A block that compiles and runs a model under ``what``, a policy.

    Raises:
        ValueError: the policy cannot be carried out in this model; the message says why and names the remedy.
    """
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, UnroundedError | ValueError | TypeError):
            raise ValueError(f"the model cannot be rounded to {what}: {error.inner_exception}") from error
        raise


class Clock:
    """The time of the calls for one policy, without the first one, which compiles, unless there is no other."""

    def __init__(self) -> None:
        self._first = 0.0
        self._others: list[float] = []
        self._calls = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block of which the time is taken."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        if self._calls:
            self._others.append(seconds)
        else:
            self._first = seconds
        self._calls += 1

    @property
    def seconds(self) -> float:
        """The mean time of a call."""
        return sum(self._others) / len(self._others) if self._others else self._first
