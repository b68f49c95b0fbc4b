"""The logit sharpness of a language model on a text, with plain measures beside it, for ``fpsim sharpness``.

The model is a Hugging Face checkpoint, read with its tokenizer from a folder (nothing is downloaded), or the module
that a user's script builds. The compiler backend simulates formats, so that the same weights are measured under several
precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from fpsim.compile_backend.errors import UnroundedError
from fpsim.curvature.losses import IGNORED
from fpsim.evaluate.load import BYTES, errors_of_checkpoint, errors_of_script, load_checkpoint, load_script, positions
from fpsim.policy import Policy
from fpsim.policy.shorthand import UNSIMULATED, parse_shorthand
from fpsim.sharpness.box import EPSILONS, ITERATIONS
from fpsim.sharpness.logits import LogitMetrics, Method, last_of, logit_metrics
from fpsim.sharpness.streaming import Accumulator, LogitSummary, gradient_norm, logits_of, predictions

#: Name of the row in which nothing is rounded.
UNROUNDED = "none"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")
#: Bytes of text per token to read: more than any tokenizer makes a token of in prose.
_BYTES_PER_TOKEN = 64


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
class Report:
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
    network = load_checkpoint(model, dtype).to(device)
    limit = positions(network)
    if context is None:
        context = min(limit or 1024, 1024)
    _check(windows, context, limit)
    tokens = _tokens(model, text, network.config.get_text_config().vocab_size, windows * context + 1)
    batches = [(inputs.to(device), targets.to(device)) for inputs, targets in _windows(tokens, context)]
    rows = _rows(network, batches, formats, epsilons, method, iterations, gradients, backend, progress)
    return Report(model, text, len(batches), context, method, rows)


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
    own = load_script(script, context=context, weights=weights)
    network = own.network.to(device)
    _check(windows, own.context, positions(network))
    tokens = _tokens_of_script(own.tokenize, text, windows * own.context + 1)
    batches = [(inputs.to(device), targets.to(device)) for inputs, targets in _windows(tokens, own.context)]
    _check_logits(script, network, batches[0][0], int(tokens.max()))
    rows = _rows(network, batches, formats, epsilons, method, iterations, gradients, backend, progress)
    return Report(script, text, len(batches), own.context, method, rows)


def _check(windows: int, context: int, limit: int | None) -> None:
    if windows < 1:
        raise ValueError(f"windows must be at least 1, got {windows}")
    if context < 1 or (limit and context > limit):
        raise ValueError(f"context must be from 1 to {limit or 'any number'}, the model's positions, got {context}")


def _check_logits(script: str, network: nn.Module, inputs: Tensor, highest: int) -> None:
    """Check by one run that ``network`` takes these tokens and gives a row of logits for each."""
    with torch.no_grad():
        try:
            with errors_of_script(script, f"on tokens of shape {tuple(inputs.shape)}"):
                logits = logits_of(network(inputs))
        except ValueError as error:
            if isinstance(error.__cause__, IndexError):
                raise ValueError(
                    f"the module of {script} does not take tokens up to {highest} in windows of {inputs.shape[1]}: let "
                    f"it take vocabulary and context, or pass a context ({error.__cause__})"
                ) from error
            raise
    if not logits.is_floating_point() or logits.dim() != 3 or logits.shape[:2] != inputs.shape:
        raise ValueError(
            f"the module of {script} must map tokens of shape {tuple(inputs.shape)} to floating-point logits of shape "
            f"(1, {inputs.shape[1]}, vocabulary), got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    if highest >= logits.shape[-1]:
        raise ValueError(
            f"the module of {script} has logits of {logits.shape[-1]} words, and the text has token {highest}: let it "
            "take vocabulary, or let the script tokenize"
        )


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
    with _unfused():
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


@contextmanager
def _unfused() -> Iterator[None]:
    """A block without the fused kernels of `nn.TransformerEncoder` and its like, whose products cannot be rounded.

    They run in evaluation mode alone, so that training, as in the study, does not see them.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
    """``model`` under ``policy``; its parameters are the same tensors."""
    if policy is None:
        return model
    torch._dynamo.reset()  # a model may be compiled under many policies, and torch gives up after a few
    options: dict[str, Any] = {"policy": policy}
    return torch.compile(model, backend=backend, options=options, dynamic=False)


def _tokens(folder: Path, path: Path, vocabulary: int, count: int) -> Tensor:
    """The first ``count`` tokens of the text, or as many as there are: int64, shape (tokens,)."""
    text = _text(path, count * _BYTES_PER_TOKEN)
    if any((folder / name).is_file() for name in _TOKENIZER_FILES):
        from transformers import AutoTokenizer

        with errors_of_checkpoint(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    elif vocabulary == BYTES:
        tokens = _bytes(text)
    else:
        raise ValueError(
            f"no tokenizer in {folder}, and its model has {vocabulary} words, not {BYTES} for bytes: "
            "add it with tokenizer.save_pretrained(folder)"
        )
    if len(tokens) and int(tokens.max()) >= vocabulary:
        raise ValueError(f"the tokenizer in {folder} made token {int(tokens.max())}, its model has {vocabulary} words")
    return _enough(tokens, path)[:count]


def _tokens_of_script(tokenize: Callable[[str], Sequence[int]] | None, path: Path, count: int) -> Tensor:
    """The first ``count`` tokens of the text by the script's ``tokenize``, or its bytes."""
    if tokenize is None:
        return _enough(_bytes(_text(path, count)), path)[:count]
    made = tokenize(_text(path, count * _BYTES_PER_TOKEN))
    try:
        tokens = torch.as_tensor(made)
    except (TypeError, ValueError, RuntimeError):
        tokens = torch.zeros(())
    whole = (tokens.dim() == 1 and not (tokens.is_floating_point() or tokens.is_complex())) or not tokens.numel()
    if not whole or (tokens.numel() and int(tokens.min()) < 0):
        raise ValueError(f"tokenize must return a sequence of integers from 0 on, got {str(made)[:60]!r}")
    return _enough(tokens.to(torch.int64), path)[:count]


def _bytes(text: str) -> Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.int64)


def _enough(tokens: Tensor, path: Path) -> Tensor:
    if len(tokens) < 2:
        raise ValueError(f"{path} holds {len(tokens)} tokens: at least two are needed, one to predict from the other")
    return tokens


def _text(path: Path, limit: int) -> str:
    """About the first ``limit`` bytes of the file, cut between characters."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name one text file")
    if not path.exists():
        raise FileNotFoundError(f"no text file at {path} (working directory {Path.cwd()})")
    with path.open("rb") as file:
        data = file.read(limit)
        while (rest := file.read(1)) and rest[0] & 0xC0 == 0x80:  # a continuation byte
            data += rest
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None


def _windows(tokens: Tensor, context: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, (1, context) each; the last window is filled up with targets that do not count."""
    context = min(context, len(tokens) - 1)
    for start in range(0, len(tokens) - 1, context):
        inputs, targets = tokens[start:-1][:context], tokens[start + 1 :][:context]
        missing = context - len(targets)
        yield (
            torch.nn.functional.pad(inputs, (0, missing)).unsqueeze(0),
            torch.nn.functional.pad(targets, (0, missing), value=IGNORED).unsqueeze(0),
        )
