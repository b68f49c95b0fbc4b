"""Logit sharpness of a model over batches of tokens, in constant memory.

Memory holds the logits of one batch at a time, and the workspace of `fpsim.sharpness.logits`. Logits are not upcast or
shifted as a whole: a Hugging Face model is called without labels, and rows of its logits are selected by index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fpsim.curvature.losses import IGNORED, refuse_sharded
from fpsim.sharpness.logits import (
    EPSILON,
    ITERATIONS,
    CountedTokens,
    LogitMetrics,
    Method,
    Tokens,
    cross_entropy_gradient,
    logit_metrics,
)
from fpsim.sharpness.steps import accumulation_dtype, total_norm
from fpsim.showing import Shown

_NOTHING_COUNTS = "no token counts: check the labels, the mask, and that sequences hold two tokens or more"

#: A function of tokens, or of the entries of a mapping as keyword arguments.
Model = Callable[..., Any]
#: Tokens; a mapping such as the output of a Hugging Face tokenizer; or a pair of inputs and targets.
Batch = Tensor | Mapping[str, Any] | tuple[Any, Tensor]


@dataclass(frozen=True)
class LogitSummary(Shown):
    """Means and maxima of `LogitMetrics` over many tokens.

    Attributes:
        tokens: the number of tokens that count and have a finite loss.
        sharpness: mean over tokens, in percent of 1 + loss.
        stderr: standard error of that mean, as if tokens were independent; NaN for fewer than two tokens.
        max_sharpness: the largest sharpness of a token.
        loss: mean cross-entropy, nats.
        max_abs_logit: the largest |z| of all tokens.
        mean_logit: mean over tokens of the mean over the vocabulary.
        gradient_norm: mean over tokens of the norm of the gradient with respect to the logits.
        nonfinite: the number of tokens that all other fields leave out because their loss is not finite.
    """

    tokens: int
    sharpness: float
    stderr: float
    max_sharpness: float
    loss: float
    max_abs_logit: float
    mean_logit: float
    gradient_norm: float
    nonfinite: int


def logit_stream(
    model: Model,
    batches: Iterable[Batch],
    *,
    epsilon: float = EPSILON,
    method: Method = "exact",
    tokens: Tokens = "all",
    ignore_index: int = IGNORED,
    iterations: int = ITERATIONS,
) -> Iterator[LogitMetrics]:
    """The `logit_metrics` of a language model, computed batch by batch on request.

    It measures the logits that the model computes. If the model rounds (``torch.compile(model, backend="fpsim",
    ...)``, or `fpsim.round` inside), they are the logits of the rounded model; no derivative is involved.

    Args:
        model: a model in evaluation mode. It maps a batch to logits of shape (..., tokens, vocabulary), or to an object
            with ``.logits``, a mapping with ``"logits"``, or a tuple that begins with the logits.
        batches: on the model's device, each in one of three forms. A tensor of tokens, shape (..., tokens): the target
            of each token is the next token, and the last token has none. A mapping of the model's keyword arguments
            with ``input_ids``: its ``labels`` (which the model does not get), or else ``input_ids``, are shifted to
            targets in the same way, and padding (a zero of ``attention_mask``) is no target. A pair of inputs and
            targets: nothing is shifted.
        epsilon, method, tokens, ignore_index, iterations: as for `fpsim.sharpness.logit`.

    Yields:
        One `LogitMetrics` per batch, in the shape of its targets, for ``last`` without the last dimension.

    Raises:
        ValueError: the model is in training mode, or `logit` raises it.
        TypeError: a batch or an output has another form, or `logit` raises it.

    Source: arXiv 2405.18710 section 3.
    """
    for logits, targets in predictions(model, batches, ignore_index=ignore_index):
        yield logit_metrics(
            logits,
            targets,
            epsilon=epsilon,
            method=method,
            tokens=tokens,
            ignore_index=ignore_index,
            iterations=iterations,
        )


def summarize(metrics: Iterable[LogitMetrics]) -> LogitSummary:
    """The `LogitSummary` of all tokens that count, accumulated batch by batch in float64.

    Raises:
        ValueError: no token counts.
    """
    summary = Accumulator()
    for batch in metrics:
        summary.add(batch)
    return summary.result()


def summarize_over_ranks(metrics: Iterable[LogitMetrics], *, group: dist.ProcessGroup | None = None) -> LogitSummary:
    """`summarize` for the tokens of all processes, each of which passes its own ``metrics``.

    Every token has the same weight on every rank. Ranks may have different numbers of tokens and batches, or none. The
    ranks exchange a few numbers once, at the end, and merge them in the order of the ranks, so all ranks get the same
    bits. Models under `DistributedDataParallel` and FSDP2 need no change. Under FSDP all ranks must run the same number
    of batches, because they gather parameters together.

    Args:
        metrics: of this rank's batches, from `logit_stream`.
        group: the process group; None is the default group.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: no token counts on any rank; all ranks raise it.
    """
    if not dist.is_initialized():
        raise RuntimeError("summarize_over_ranks() needs a process group: call torch.distributed.init_process_group")
    own = Accumulator()
    for batch in metrics:
        own.add(batch)
    parts: list[Accumulator] = [own] * dist.get_world_size(group)
    dist.all_gather_object(parts, own, group=group)
    total = Accumulator()
    for part in parts:
        total.merge(part)
    return total.result()


class Accumulator:
    """The sums behind `summarize`: a few numbers for any number of tokens."""

    def __init__(self) -> None:
        self._tokens = self._nonfinite = 0
        self._mean = torch.zeros(4, dtype=torch.float64)
        self._deviation = 0.0
        self._max_sharpness = self._max_abs_logit = -math.inf

    def add(self, batch: LogitMetrics) -> None:
        """Add the tokens of ``batch`` that count."""
        finite = batch.counted & batch.sharpness.isfinite()
        self._nonfinite += int((batch.counted & ~finite).sum())
        columns = (batch.sharpness, batch.loss, batch.mean_logit, batch.gradient_norm)
        values = torch.stack([column[finite] for column in columns]).cpu()
        count = values.shape[1]
        if not count:
            return
        mean = values.mean(1)
        self._join(count, mean, float((values[0] - mean[0]).square().sum()))
        self._max_sharpness = max(self._max_sharpness, float(values[0].max()))
        self._max_abs_logit = max(self._max_abs_logit, float(batch.max_abs_logit[finite].max()))

    def merge(self, other: Accumulator) -> None:
        """Add all tokens of ``other``."""
        self._nonfinite += other._nonfinite
        if other._tokens:
            self._join(other._tokens, other._mean, other._deviation)
        self._max_sharpness = max(self._max_sharpness, other._max_sharpness)
        self._max_abs_logit = max(self._max_abs_logit, other._max_abs_logit)

    def _join(self, count: int, mean: Tensor, deviation: float) -> None:
        """Update mean and sum of squared deviations with those of more tokens (Chan, Golub and LeVeque)."""
        before, self._tokens = self._tokens, self._tokens + count
        shift = mean - self._mean
        self._mean += shift * (count / self._tokens)
        self._deviation += deviation + float(shift[0]) ** 2 * count * before / self._tokens

    def result(self) -> LogitSummary:
        """The summary of all tokens added so far.

        Raises:
            ValueError: no token counts.
        """
        tokens = self._tokens
        if not tokens and not self._nonfinite:
            raise ValueError(_NOTHING_COUNTS)
        sharpness, loss, mean_logit, gradient_norm = self._mean.tolist() if tokens else [math.nan] * 4
        return LogitSummary(
            tokens=tokens,
            sharpness=sharpness,
            stderr=math.sqrt(self._deviation / (tokens - 1) / tokens) if tokens > 1 else math.nan,
            max_sharpness=self._max_sharpness if tokens else math.nan,
            loss=loss,
            max_abs_logit=self._max_abs_logit if tokens else math.nan,
            mean_logit=mean_logit,
            gradient_norm=gradient_norm,
            nonfinite=self._nonfinite,
        )


def gradient_norm(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    tokens: Tokens = "all",
    ignore_index: int = IGNORED,
) -> float:
    """The Euclidean norm of the gradient of the mean cross-entropy with respect to the model's parameters.

    It is the baseline for sharpness as an early sign of divergence. It takes memory for twice the logits of one batch
    (the gradient with respect to them is computed chunk by chunk), and for twice the parameters. If the model rounds,
    it is the gradient of the straight-through surrogate, with rounded gradients if the model rounds them.

    Arguments and errors are those of `logit_stream`. Parameters that do not require gradients are left out. Under
    `DistributedDataParallel` it is the gradient of this rank's batches.

    Raises:
        ValueError: also if no parameter requires a gradient, or parameters are sharded (FSDP) and so get no gradient.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module  # without the wrapper, which would wait for a backward pass to average gradients
    refuse_sharded(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("no parameter requires a gradient: call model.requires_grad_()")
    sums = [torch.zeros_like(parameter, dtype=accumulation_dtype(parameter.dtype)) for parameter in parameters]
    count = 0
    for logits, targets in predictions(model, batches, ignore_index=ignore_index, gradients=True):
        cotangent = torch.zeros_like(logits)
        for chunk, z, target in CountedTokens(logits, targets, tokens, None, ignore_index).rows():
            gradient = cross_entropy_gradient(z, target).to(logits.dtype)
            cotangent[chunk] = gradient if chunk else gradient[0]
            count += len(target)
        parts = torch.autograd.grad(logits, parameters, cotangent, allow_unused=True)
        for total, part in zip(sums, parts, strict=True):
            if part is not None:
                total += part
    if not count:
        raise ValueError(_NOTHING_COUNTS)
    return total_norm(sums) / count


def predictions(
    model: Model, batches: Iterable[Batch], *, ignore_index: int = IGNORED, gradients: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """The logits of every batch and their targets; batches and errors are those of `logit_stream`."""
    if getattr(model, "training", False):
        raise ValueError("the model is in training mode, where dropout makes it random: call model.eval()")
    for batch in batches:
        inputs, keywords, targets = _arguments(batch, ignore_index)
        with torch.set_grad_enabled(gradients):
            logits = logits_of(model(*inputs, **keywords))
        yield logits, targets


def _arguments(batch: Batch, ignore_index: int) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Positional and keyword arguments for the model, and the targets of its logits."""
    if isinstance(batch, Tensor):
        return (batch,), {}, _next_tokens(batch, ignore_index)
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return (batch[0],), {}, batch[1]
    if not isinstance(batch, Mapping):
        raise TypeError(
            "a batch is a tensor of tokens, a mapping with 'input_ids', or a pair of inputs and targets, got "
            + type(batch).__name__
        )
    keywords = {name: value for name, value in batch.items() if name != "labels"}
    if "input_ids" not in keywords:
        raise TypeError(f"a mapping needs 'input_ids', got {', '.join(map(str, batch)) or 'nothing'}")
    labels = batch.get("labels", keywords["input_ids"])
    if keywords.get("attention_mask") is not None:
        labels = labels.masked_fill(keywords["attention_mask"] == 0, ignore_index)
    return (), keywords, _next_tokens(labels, ignore_index)


def _next_tokens(tokens: Tensor, ignore_index: int) -> Tensor:
    """The targets: the tokens are shifted, because a slice of the logits costs a padded copy in the backward pass."""
    return torch.nn.functional.pad(tokens[..., 1:].to(torch.int64), (0, 1), value=ignore_index)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: the output itself, ``.logits``, its entry ``"logits"``, or its first element.

    Raises:
        TypeError: the output has none of these forms.
    """
    found = output
    if hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            f"the model must return logits, or an object with .logits, got {type(output).__name__}: "
            "wrap it in a function that does"
        )
    return found
