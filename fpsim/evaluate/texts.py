"""Language models with texts to predict: a Hugging Face checkpoint or the user's script, and the windows of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fpsim.curvature.losses import IGNORED, cross_entropy
from fpsim.evaluate.load import BYTES, errors_of_checkpoint, errors_of_script, load_checkpoint, load_script, positions
from fpsim.sharpness.streaming import logits_of
from fpsim.showing import counted

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "spiece.model")
#: Bytes of text per token to read: more than any tokenizer makes a token of in prose.
_BYTES_PER_TOKEN = 64


def token_loss(outputs: Any, targets: Tensor) -> Tensor:
    """The mean cross-entropy in nats of a model's outputs, over the targets that count."""
    return cross_entropy(logits_of(outputs), targets)


@dataclass(frozen=True, eq=False)
class Task:
    """A language model, and the tokens that it is to predict.

    Attributes:
        network: the model, in evaluation mode.
        tokens: int64, shape (tokens,), on the CPU.
        context: tokens per window.
        device: the device of the model.
    """

    network: nn.Module
    tokens: Tensor
    context: int
    device: torch.device

    @property
    def windows(self) -> int:
        """The number of windows: they follow each other, and every token but the first is predicted once."""
        return -(-(len(self.tokens) - 1) // min(self.context, len(self.tokens) - 1))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The windows, one after the other: inputs and targets, (1, context) each, on the device of the model.

        The last window is filled up with targets that do not count (`fpsim.curvature.losses.IGNORED`).
        """
        for inputs, targets in _windows(self.tokens, self.context):
            yield inputs.to(self.device), targets.to(self.device)


def task_of_checkpoint(
    model: Path,
    text: Path,
    *,
    windows: int,
    context: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Task:
    """The model of a Hugging Face checkpoint, and the beginning of a text by its tokenizer.

    Args:
        model: the folder of the checkpoint, with its tokenizer; models over bytes (256 words) need none.
        text: a UTF-8 file. No special tokens are added to it.
        windows: the greatest number of windows.
        context: tokens per window; None is the model's own, at most 1024.
        dtype: of the weights.
        device: of the model.

    Raises: the errors of `fpsim.evaluate.logit_sharpness.measure_checkpoint` for its model and text.
    """
    network = load_checkpoint(model, dtype).to(device)
    limit = positions(network)
    if context is None:
        context = min(limit or 1024, 1024)
    _check(windows, context, limit)
    tokens = _tokens(model, text, network.config.get_text_config().vocab_size, windows * context + 1)
    return Task(network, tokens, context, torch.device(device))


def task_of_script(
    script: str,
    text: Path,
    *,
    windows: int,
    context: int | None = None,
    weights: Path | None = None,
    device: str | torch.device = "cpu",
) -> Task:
    """The model of a user's script, and the beginning of a text by the script's ``tokenize``, or its bytes.

    Args:
        script: ``path/to/script.py:function``, as `fpsim.evaluate.load` describes it.
        weights: a file with the module's state dict; None keeps the weights that the function makes.
        context: tokens per window; None is the number of the script or its module, or else 128.
        text, windows, device: as for `task_of_checkpoint`.

    Raises: the errors of `fpsim.evaluate.logit_sharpness.measure_script` for its script and text.
    """
    own = load_script(script, context=context, weights=weights)
    network = own.network.to(device)
    _check(windows, own.context, positions(network))
    tokens = _tokens_of_script(own.tokenize, text, windows * own.context + 1)
    task = Task(network, tokens, own.context, torch.device(device))
    _check_logits(script, network, next(task.batches())[0], int(tokens.max()))
    return task


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


@contextmanager
def unfused() -> Iterator[None]:
    """A block without the fused kernels of `nn.TransformerEncoder` and its like, whose products cannot be rounded.

    They run in evaluation mode alone, so that training, as in the study, does not see them.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


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
        raise ValueError(
            f"{path} holds {counted(len(tokens), 'token')}: at least two are needed, one to predict from the other"
        )
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
