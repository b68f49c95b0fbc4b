"""The rounding operators of ``torch.ops.fpsim`` with their kernels, and the rules that torch's compilers need.

Each operator has a fake and a vmap rule. It has no autograd rule, on purpose: `torch.compile` of `torch.func`
transforms silently ignores registered derivatives, so `fpsim.round` builds its derivative from other operators. The
operators compute values only: call them on detached tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fpsim.rounding.cpu
import fpsim.rounding.cuda  # noqa: F401  (both register kernels)
from fpsim.rounding.definitions import check_arguments, check_stochastic_arguments
from fpsim.source import source_hash

#: The value of the argument ``source``. Torch's caches identify an operator by its name and arguments only. Without
#: this argument they would return code that another version of fpsim compiled, or code for vectors of another width
#: (``ATEN_CPU_CAPABILITY``), which Inductor would compile again for the width of this process.
SOURCE = f"{source_hash()} {torch.backends.cpu.get_cpu_capability()}"

round_op: Callable[..., Tensor] = torch.ops.fpsim.round.default
random_key_op: Callable[[Tensor, int], Tensor] = torch.ops.fpsim.random_key.default
round_stochastic_op: Callable[..., Tensor] = torch.ops.fpsim.round_stochastic.default
#: The keys of the salts 1, 2, ..., count. Inductor calls it, instead of generating code for every key. Each key is a
#: tensor of its own, so that equal layers have equal code, which is compiled once.
random_keys_op: Callable[[Tensor, int], list[Tensor]] = torch.ops.fpsim.random_keys.default
#: The random words of the elements of a tensor, from a key; and stochastic rounding with given words.
random_words_op: Callable[[Tensor, Tensor], Tensor] = torch.ops.fpsim.random_words.default
round_with_words_op: Callable[..., Tensor] = torch.ops.fpsim.round_with_words.default

_library = torch.library.Library("fpsim", "FRAGMENT")


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's random state: int64, shape (1,)."""
    return torch.randint(-(2**63), 2**63 - 1, [1], device=device)


@torch.library.register_fake("fpsim::round", lib=_library)
def _round_fake(
    x: Tensor, format: str, rounding: str, overflow: str, source: str = "", scale: Tensor | None = None
) -> Tensor:
    check_arguments(x, format, rounding, overflow)
    register_lowerings()
    return torch.empty_like(x)


def register_lowerings() -> None:
    """Register the operators with Inductor, if this process uses it."""
    if "torch._inductor.lowering" in sys.modules:
        import fpsim.rounding.inductor  # noqa: F401
        from fpsim.rounding.cpp_functions import inline_functions_in_cpp
        from fpsim.rounding.vector_casts import cast_whole_vectors_in_cpp

        cast_whole_vectors_in_cpp()
        inline_functions_in_cpp()


@torch.library.register_vmap("fpsim::round", lib=_library)
def _round_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    format: str,
    rounding: str,
    overflow: str,
    source: str = "",
    scale: Tensor | None = None,
) -> tuple[Tensor, int | None]:
    if scale is None:
        return round_op(x, format, rounding, overflow, source), in_dims[0]
    xs = _with_batch_first(x, in_dims[0], info.batch_size)
    if in_dims[-1] is not None:
        scale = _scales_of_batch(scale, in_dims[-1], xs)
    return round_op(xs, format, rounding, overflow, source, scale), 0


def _with_batch_first(x: Tensor, batch_dim: int | None, batch_size: int) -> Tensor:
    return x.expand(batch_size, *x.shape) if batch_dim is None else x.movedim(batch_dim, 0)


def _scales_of_batch(scale: Tensor, batch_dim: int, xs: Tensor) -> Tensor:
    """The scales of the samples of ``xs``, whose first dimension is the batch, in a shape that broadcasts."""
    scales = scale.movedim(batch_dim, 0)
    return scales.reshape(scales.shape[0], *[1] * (xs.dim() - scales.dim()), *scales.shape[1:])


@torch.library.register_fake("fpsim::random_key", lib=_library)
def _random_key_fake(seed: Tensor, salt: int) -> Tensor:
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"a seed is one int64, got {seed.dtype} of shape {tuple(seed.shape)}")
    register_lowerings()
    return seed.new_empty(2, dtype=torch.int32)


@torch.library.register_fake("fpsim::random_keys", lib=_library)
def _random_keys_fake(seed: Tensor, count: int) -> list[Tensor]:
    return [seed.new_empty(2, dtype=torch.int32) for _ in range(count)]


@torch.library.register_fake("fpsim::round_stochastic", lib=_library)
def _round_stochastic_fake(
    x: Tensor, key: Tensor, format: str, rounding: str, overflow: str, source: str, scale: Tensor | None = None
) -> Tensor:
    check_stochastic_arguments(x, format, rounding, overflow)
    register_lowerings()
    return torch.empty_like(x)


@torch.library.register_fake("fpsim::random_words", lib=_library)
def _random_words_fake(x: Tensor, key: Tensor) -> Tensor:
    register_lowerings()
    return torch.empty(x.shape, dtype=torch.int32, device=x.device)


@torch.library.register_fake("fpsim::round_with_words", lib=_library)
def _round_with_words_fake(
    x: Tensor, words: Tensor, format: str, rounding: str, overflow: str, source: str, scale: Tensor | None = None
) -> Tensor:
    check_stochastic_arguments(x, format, rounding, overflow)
    register_lowerings()
    return torch.empty_like(x)


@torch.library.register_vmap("fpsim::random_key", lib=_library)
def _random_key_vmap(info: Any, in_dims: tuple[int | None, ...], seed: Tensor, salt: int) -> tuple[Tensor, int]:
    return torch.stack([random_key_op(each, salt) for each in seed.movedim(in_dims[0] or 0, 0)]), 0


@torch.library.register_vmap("fpsim::random_words", lib=_library)
def _random_words_vmap(info: Any, in_dims: tuple[int | None, int | None], x: Tensor, key: Tensor) -> tuple[Tensor, int]:
    xs = _with_batch_first(x, in_dims[0], info.batch_size)
    if in_dims[1] is None:  # one key: every sample of the batch has draws of its own
        return random_words_op(xs, key), 0
    return torch.stack([random_words_op(a, k) for a, k in zip(xs, key.movedim(in_dims[1], 0), strict=True)]), 0


@torch.library.register_vmap("fpsim::round_stochastic", lib=_library)
def _round_stochastic_vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    key: Tensor,
    format: str,
    rounding: str,
    overflow: str,
    source: str,
    scale: Tensor | None = None,
) -> tuple[Tensor, int]:
    xs = _with_batch_first(x, in_dims[0], info.batch_size)
    if scale is not None and in_dims[-1] is not None:
        scale = _scales_of_batch(scale, in_dims[-1], xs)
    if in_dims[1] is None:  # one key: every sample of the batch has draws of its own
        return round_stochastic_op(xs, key, format, rounding, overflow, source, scale), 0
    keys = key.movedim(in_dims[1], 0)
    scales = [scale] * len(xs) if scale is None or in_dims[-1] is None else scale
    return torch.stack(
        [
            round_stochastic_op(a, k, format, rounding, overflow, source, s)
            for a, k, s in zip(xs, keys, scales, strict=True)
        ]
    ), 0
