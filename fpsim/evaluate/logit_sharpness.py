"""The logit sharpness of a language model on a text, with plain measures beside it, for ``fpsim sharpness``.

The model is a Hugging Face checkpoint, read with its tokenizer from a folder (nothing is downloaded), or the module
that a user's script builds. The compiler backend simulates formats, so that the same weights are measured under several
precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from fpsim.compile_backend.errors import UnroundedError
from fpsim.evaluate.running import under
from fpsim.evaluate.texts import task_of_checkpoint, task_of_script, unfused
from fpsim.policy import Policy
from fpsim.policy.shorthand import UNSIMULATED, parse_shorthand
from fpsim.sharpness.box import EPSILONS, ITERATIONS
from fpsim.sharpness.logits import LogitMetrics, Method, last_of, logit_metrics
from fpsim.sharpness.streaming import Accumulator, LogitSummary, gradient_norm, predictions
from fpsim.showing import Shown

#: Name of the row in which nothing is rounded.
UNROUNDED = "none"


@dataclass(frozen=True)
class Row:
    """The measurements under one precision.

    Attributes:
        format: the policy as `fpsim.policy.shorthand.parse_shorthand` reads it, or ``none``.
        every: the summary of all tokens, by epsilon.
        last: the summary of the last token of every window alone, as in the paper, by epsilon.
        gradient_norm: the norm of the mean loss's gradient with respect to the parameters; None if it was not asked
            for.
    """

    format: str
    every: dict[float, LogitSummary]
    last: dict[float, LogitSummary]
    gradient_norm: float | None


@dataclass(frozen=True)
class Report(Shown):
    """The result of `measure_checkpoint` and `measure_script`.

    Attributes:
        model, text: a folder, or a script with its function; and the file of the text.
        windows, context: the number of windows of the text, and the tokens in each.
        method: the search of the box, ``exact`` or ``lbfgsb``.
        rows: one per precision, in the order asked for.
    """

    model: Path | str
    text: Path
    windows: int
    context: int
    method: str
    rows: tuple[Row, ...]

    def table(self) -> Table:
        """A line per precision and epsilon: `LogitSummary` of all tokens, and the sharpness of the last ones."""
        tokens = next(iter(self.rows[0].every.values())).tokens
        table = Table(
            box=box.SIMPLE_HEAD,
            title=f"Logit sharpness of {self.model} on {self.text}",
            caption=f"{tokens} tokens in {self.windows} windows of up to {self.context}; sharpness in percent of "
            f"1 + loss ({self.method}), mean ± standard error over tokens",
        )
        table.add_column("format", overflow="fold")
        for heading in _HEADINGS:
            table.add_column(heading, justify="right")
        for row in self.rows:
            for number, epsilon in enumerate(row.every):
                table.add_row("" if number else row.format, *_cells(row, epsilon))
        return table


_HEADINGS = (
    "ε",
    "loss",
    "all tokens",
    "largest",
    "last tokens",
    "max |z|",
    "mean z",
    "|∂f/∂z|",
    "|∂f/∂θ|",
    "not finite",
)


def _cells(row: Row, epsilon: float) -> list[str]:
    every, last = row.every[epsilon], row.last[epsilon]
    return [
        f"{epsilon:g}",
        f"{every.loss:.4f}",
        f"{every.sharpness:.4g} ± {every.stderr:.1g}",
        f"{every.max_sharpness:.4g}",
        f"{last.sharpness:.4g} ± {last.stderr:.1g}",
        f"{every.max_abs_logit:.4g}",
        f"{every.mean_logit:.3g}",
        f"{every.gradient_norm:.4g}",
        "-" if row.gradient_norm is None else f"{row.gradient_norm:.4g}",
        str(every.nonfinite),
    ]


def measure_checkpoint(
    model: Path,
    text: Path,
    *,
    formats: Sequence[str] = (),
    epsilons: Sequence[float] = EPSILONS,
    method: Method = "exact",
    iterations: int = ITERATIONS,
    windows: int = 16,
    context: int | None = None,
    gradients: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    backend: str = "fpsim_eager",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """The logit sharpness of a causal language model on the beginning of a text, unrounded and in each of ``formats``.

    The text is cut into windows that follow each other; every token but the first is predicted once. Under a format,
    logits are the rounded model's own; the norm of the gradient is then that of its straight-through surrogate.
    Simulating a format drops what the process had compiled (``torch._dynamo.reset``). The fused kernels of
    `torch.nn.TransformerEncoder` are off meanwhile, unrounded and rounded.

    Args:
        model: folder of a Hugging Face checkpoint, with its tokenizer; models over bytes (256 words) need none.
        text: a UTF-8 file. No special tokens are added to it.
        formats: policies as `fpsim.policy.shorthand.parse_shorthand` reads them: a cast of all operands of all matrix
            products (``e4m3fn``, ``e8m3/toward_zero``), two casts (``e4m3fn+e5m2``) or a preset (``paper:e8m3``).
            Here ``fp32`` rounds operands to float32.
        epsilons, method, iterations: as for `fpsim.sharpness.logit`.
        windows: the greatest number of windows.
        context: tokens per window; None is the model's own, at most 1024.
        gradients: also measure the norm of the parameters' gradient, by a second forward and a backward pass.
        dtype: of the weights: float32, or the dtype in which the model was trained.
        device: the device of the model.
        backend: ``fpsim_eager`` or ``fpsim``, which compiles: same values, faster on long texts.
        progress: called with (windows done, windows).

    Raises:
        FileNotFoundError, IsADirectoryError: ``model`` is not a checkpoint's folder, or ``text`` not a file.
        ModuleNotFoundError: transformers is not installed.
        ValueError: text that is not UTF-8 or too short, no tokenizer, an unknown format or choice, a model with
            operators that cannot be rounded.
    """
    task = task_of_checkpoint(model, text, windows=windows, context=context, dtype=dtype, device=device)
    batches = list(task.batches())
    rows = _rows(task.network, batches, formats, epsilons, method, iterations, gradients, backend, progress)
    return Report(model, text, len(batches), task.context, method, rows)


def measure_script(
    script: str,
    text: Path,
    *,
    weights: Path | None = None,
    formats: Sequence[str] = (),
    epsilons: Sequence[float] = EPSILONS,
    method: Method = "exact",
    iterations: int = ITERATIONS,
    windows: int = 16,
    context: int | None = None,
    gradients: bool = True,
    device: str | torch.device = "cpu",
    backend: str = "fpsim_eager",
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """`measure_checkpoint` for the model of a user's script, in the dtypes in which it is built.

    Args:
        script: ``path/to/script.py:function``, as `fpsim.evaluate.load` describes it.
        text: a UTF-8 file; its bytes are the tokens, unless the script has a function ``tokenize``.
        weights: a file with the module's state dict; None keeps the weights that the function makes.
        context: tokens per window; None is the number of the script or its module, or else 128.
        formats, epsilons, method, iterations, windows, gradients, device, backend, progress: as for
            `measure_checkpoint`.

    Raises:
        FileNotFoundError, IsADirectoryError: no such script, weights or text.
        ValueError: a function that is missing or builds no module, weights that do not fit, a module that gives no
            logits or does not take such tokens, text that is not UTF-8 or too short, an unknown format or choice, a
            model with operators that cannot be rounded.
    """
    task = task_of_script(script, text, windows=windows, context=context, weights=weights, device=device)
    batches = list(task.batches())
    rows = _rows(task.network, batches, formats, epsilons, method, iterations, gradients, backend, progress)
    return Report(script, text, len(batches), task.context, method, rows)


def _rows(
    network: nn.Module,
    batches: list[tuple[Tensor, Tensor]],
    formats: Sequence[str],
    epsilons: Sequence[float],
    method: Method,
    iterations: int,
    gradients: bool,
    backend: str,
    progress: Callable[[int, int], None] | None,
) -> tuple[Row, ...]:
    if not epsilons:
        raise ValueError("epsilons is empty: give at least one, such as 5e-4")
    policies = {UNROUNDED: None, **{name: _policy(name) for name in formats}}
    total = len(policies) * len(batches)
    rows = []
    with unfused():
        for index, (name, policy) in enumerate(policies.items()):
            done = index * len(batches)
            tick = (lambda count, done=done: progress(done + count, total)) if progress is not None else None
            model = _under(network, policy, backend)
            try:
                rows.append(_row(name, model, batches, epsilons, method, iterations, gradients, tick))
            except torch._dynamo.exc.BackendCompilerFailed as error:
                if isinstance(error.inner_exception, UnroundedError):
                    raise ValueError(f"the model cannot be rounded to {name}: {error.inner_exception}") from error
                raise
    return tuple(rows)


def _policy(name: str) -> Policy:
    """The policy that ``name`` stands for; ``fp32`` rounds operands to float32, which changes float64 models."""
    return Policy.from_options(parse_shorthand(name) or {"format": UNSIMULATED})


def _row(
    name: str,
    model: Any,
    batches: list[tuple[Tensor, Tensor]],
    epsilons: Sequence[float],
    method: Method,
    iterations: int,
    gradients: bool,
    tick: Callable[[int], object] | None,
) -> Row:
    every = {epsilon: Accumulator() for epsilon in epsilons}
    last = {epsilon: Accumulator() for epsilon in epsilons}
    for done, (logits, targets) in enumerate(predictions(model, batches), 1):
        for epsilon in epsilons:
            found = logit_metrics(logits, targets, epsilon=epsilon, method=method, iterations=iterations)
            every[epsilon].add(found)
            last[epsilon].add(_last(found))
        if tick is not None:
            tick(done)
    return Row(
        format=name,
        every={epsilon: summary.result() for epsilon, summary in every.items()},
        last={epsilon: summary.result() for epsilon, summary in last.items()},
        gradient_norm=gradient_norm(model, batches) if gradients else None,
    )


def _last(metrics: LogitMetrics) -> LogitMetrics:
    return replace(metrics, counted=last_of(metrics.counted))


def _under(model: nn.Module, policy: Policy | None, backend: str) -> Any:
    if policy is None:
        return model
    torch._dynamo.reset()  # a model may be compiled under many policies, and torch gives up after a few
    return under(model, policy, backend)
