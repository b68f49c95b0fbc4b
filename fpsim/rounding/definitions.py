"""The rounding operators of ``torch.ops.fpsim``: their schemas, and kernels of plain torch operations for any device.

``round`` is deterministic rounding. ``round_stochastic`` is stochastic rounding, a function of a key that
``random_key`` computes from a seed and a salt. Neither holds state, so a compiler may merge, repeat or move the calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from fpsim.formats import FloatFormat, check_rounding, parse_format, resolve_overflow, split_rounding
from fpsim.rounding.carriers import check_carrier, check_tensor
from fpsim.rounding.random_words import random_key, random_word
from fpsim.rounding.tensors import round_with_torch_ops

#: Elements per thread that a CPU kernel handles at a time, so that its temporaries stay in the cache.
CHUNK = 1 << 17

_library = torch.library.Library("fpsim", "DEF")
_library.define(
    'round(Tensor x, str format, str rounding, str overflow, str source="", Tensor? scale=None) -> Tensor',
    tags=(torch.Tag.pointwise,),
)
_library.define("random_key(Tensor seed, int salt) -> Tensor")
_library.define("random_keys(Tensor seed, int count) -> Tensor[]")
_library.define(
    "round_stochastic(Tensor x, Tensor key, str format, str rounding, str overflow, str source, "
    "Tensor? scale=None) -> Tensor",
    tags=(torch.Tag.pointwise,),
)
_library.define("random_words(Tensor x, Tensor key) -> Tensor")
_library.define(
    "round_with_words(Tensor x, Tensor words, str format, str rounding, str overflow, str source, "
    "Tensor? scale=None) -> Tensor",
    tags=(torch.Tag.pointwise,),
)


def check_arguments(x: Tensor, format: str, rounding: str, overflow: str) -> FloatFormat:
    """The format named by the arguments of ``fpsim::round``; raises if they are wrong or ``x`` cannot carry it."""
    fmt = parse_format(format)
    if x.layout is not torch.strided:
        check_tensor(x)
    check_carrier(x.dtype, fmt)
    check_rounding(rounding)
    resolve_overflow(fmt, overflow)
    return fmt


def check_stochastic_arguments(x: Tensor, format: str, rounding: str, overflow: str) -> FloatFormat:
    """The same for the arguments of ``fpsim::round_stochastic``."""
    fmt = parse_format(format)
    if x.layout is not torch.strided:
        check_tensor(x)
    check_carrier(x.dtype, fmt)
    if not split_rounding(rounding)[1]:
        raise ValueError(f"rounding {rounding!r} is not stochastic: use fpsim::round")
    resolve_overflow(fmt, overflow)
    return fmt


def random_words_at(key: Tensor, first: int, count: int) -> Tensor:
    """The random words of elements ``first``, ``first + 1``, ..., ``first + count - 1``."""
    index = torch.arange(first, first + count, device=key.device)
    return random_word(key[0] ^ index.to(torch.int32), key[1] ^ (index >> 32).to(torch.int32))


def pieces(*tensors: Tensor, keep: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Views of tensors of one shape: the same parts of each, so small that their temporaries stay in the cache.

    Tensors on other devices, and tensors that a transform or a tracer holds, stay whole.

    Args:
        keep: the number of the last dimensions that are not split. In these the shapes may differ.
    """
    x = tensors[0]
    size = CHUNK * torch.get_num_threads()
    whole = x.device.type != "cpu" or type(x) not in (Tensor, torch.nn.Parameter)
    if x.numel() <= size or whole or is_functorch_wrapped_tensor(x) or get_proxy_mode() is not None:
        yield tensors
        return
    dim = max(range(x.dim() - keep), key=lambda d: x.shape[d])
    count = min(-(-x.numel() // size), x.shape[dim])
    if count < 2:
        yield tensors
        return
    for parts in zip(*(tensor.tensor_split(count, dim) for tensor in tensors), strict=True):
        yield from pieces(*parts, keep=keep)


def scales_of(scale: Tensor | None, x: Tensor, chunk: int) -> Iterable[Tensor | None]:
    """The scale of each piece of ``x``, which is split into pieces of ``chunk`` elements in row-major order."""
    if scale is None or scale.numel() == 1:
        return itertools.repeat(None if scale is None else scale.reshape(()))
    return scale.expand_as(x).reshape(-1).split(chunk)


@torch.library.impl(_library, "round", "CompositeExplicitAutograd")
def round_generally(
    x: Tensor, format: str, rounding: str, overflow: str, source: str = "", scale: Tensor | None = None
) -> Tensor:
    """``fpsim::round`` on any device."""
    fmt = check_arguments(x, format, rounding, overflow)
    out = torch.empty_like(x)
    return out.copy_(round_with_torch_ops(x, fmt, rounding, overflow, scale=scale))


@torch.library.impl(_library, "random_key", "CompositeExplicitAutograd")
def _random_key(seed: Tensor, salt: int) -> Tensor:
    key = random_key(seed.reshape(()), salt)
    return torch.stack([key, key >> 32]).to(torch.int32)  # the low half and the high half; the cast keeps 32 bits


@torch.library.impl(_library, "random_keys", "CompositeExplicitAutograd")
def _random_keys(seed: Tensor, count: int) -> list[Tensor]:
    keys = random_key(seed.reshape(()), torch.arange(1, count + 1, device=seed.device))
    return [key.clone() for key in torch.stack([keys, keys >> 32], 1).to(torch.int32)]


@torch.library.impl(_library, "round_stochastic", "CompositeExplicitAutograd")
def round_stochastic(
    x: Tensor, key: Tensor, format: str, rounding: str, overflow: str, source: str, scale: Tensor | None = None
) -> Tensor:
    """``fpsim::round_stochastic`` on any device. Random words are assigned to the elements in row-major order."""
    fmt = check_stochastic_arguments(x, format, rounding, overflow)
    values = x.contiguous().view(-1)
    rounded = torch.empty_like(values)
    chunk = CHUNK * torch.get_num_threads() if x.device.type == "cpu" else max(x.numel(), 1)
    pieces = zip(values.split(chunk), rounded.split(chunk), scales_of(scale, x, chunk), strict=False)
    for first, (piece, target, factor) in enumerate(pieces):
        word = random_words_at(key, first * chunk, piece.numel())
        target.copy_(round_with_torch_ops(piece, fmt, rounding, overflow, word, factor))
    rounded = rounded.view(x.shape)
    return rounded if rounded.stride() == x.stride() else torch.empty_like(x).copy_(rounded)


@torch.library.impl(_library, "random_words", "CompositeExplicitAutograd")
def _random_words(x: Tensor, key: Tensor) -> Tensor:
    return random_words_at(key, 0, x.numel()).view(x.shape)


@torch.library.impl(_library, "round_with_words", "CompositeExplicitAutograd")
def _round_with_words(
    x: Tensor, words: Tensor, format: str, rounding: str, overflow: str, source: str, scale: Tensor | None = None
) -> Tensor:
    """Stochastic rounding with the random words of the elements, int32 of the shape of ``x``."""
    fmt = check_stochastic_arguments(x, format, rounding, overflow)
    return torch.empty_like(x).copy_(round_with_torch_ops(x, fmt, rounding, overflow, words, scale))
