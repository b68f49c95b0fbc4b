"""The operators ``fpsim::flash_attention`` and ``fpsim::flash_attention_backward``, and the function around them."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fpsim.attention.flash import FlashLike, parse_flash, parsed
from fpsim.attention.steps import Call, backward, forward
from fpsim.rounding.carriers import CARRIERS, check_tensor, working_dtype
from fpsim.rounding.flushing import keeping_subnormals
from fpsim.rounding.ops import SOURCE
from fpsim.tensor_functions import seed_tensor

_CALL = "Tensor? mask, Tensor? seed, bool causal, float scale, int salt, str steps, str source"
_library = torch.library.Library("fpsim", "FRAGMENT")
_library.define(f"flash_attention(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor, Tensor)")
_library.define(
    "flash_attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor output, Tensor logsumexp, "
    f"{_CALL}) -> (Tensor, Tensor, Tensor)"
)

#: O and L (`fpsim.attention.steps.forward`) for ``q``, ``k`` and ``v`` with the same leading axes. ``steps`` is the
#: text of a `FlashAttention`, and ``source`` is `fpsim.rounding.ops.SOURCE`.
flash_op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fpsim.flash_attention.default
#: The gradients of ``q``, ``k`` and ``v`` (`fpsim.attention.steps.backward`).
flash_backward_op: Callable[..., tuple[Tensor, Tensor, Tensor]] = torch.ops.fpsim.flash_attention_backward.default

#: The number of tensors before the mask, for each operator.
TENSORS = {flash_op: 3, flash_backward_op: 6}


def compute(operator: Callable[..., Any], *arguments: Any, watch: Any = None) -> tuple[Tensor, ...]:
    """The results of ``operator``, one of `TENSORS`, in operations of aten and roundings."""
    count = TENSORS[operator]
    mask, seed, causal, scale, salt, steps, _ = arguments[count:]
    tensors = arguments[:count]
    leading = tuple(tensors[0].shape[:-2])
    call = Call(parsed(steps), scale, causal, mask, leading, seed, salt, watch)
    merged = [x.reshape(math.prod(leading), *x.shape[len(leading) :]) for x in tensors]
    steps_of_call: Callable[..., tuple[Tensor, ...]] = forward if operator is flash_op else backward
    results = steps_of_call(*merged, call)
    return tuple(x.reshape(*leading, *x.shape[1:]) for x in results)


@torch.library.register_fake("fpsim::flash_attention", lib=_library)
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((*q.shape[:-1], v.shape[-1])), q.new_empty(q.shape[:-1], dtype=working_dtype(q.dtype))


@torch.library.register_fake("fpsim::flash_attention_backward", lib=_library)
def _backward_fake(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _batched(operator: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """`torch.vmap` of ``operator``: the samples become one more leading axis. With one seed each draws its own."""
    count = TENSORS[operator]
    if in_dims[count + 1] is not None:
        raise NotImplementedError(
            f"attention under torch.vmap takes one seed for all samples, got {info.batch_size}: give all of them one "
            "seed, with which each draws numbers of its own, or call attention in a loop"
        )
    tensors = [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(arguments[:count], in_dims[:count], strict=True)
    ]
    mask, dim = arguments[count], in_dims[count]
    if dim is not None:
        mask = mask.movedim(dim, 0)
        mask = mask.reshape(len(mask), *[1] * (tensors[0].dim() - mask.dim()), *mask.shape[1:])
    results = operator(*tensors, mask, *arguments[count + 1 :])
    return results, (0,) * len(results)


for _name, _operator in (("flash_attention", flash_op), ("flash_attention_backward", flash_backward_op)):
    _library.impl(_name, keeping_subnormals(functools.partial(compute, _operator)), "CompositeExplicitAutograd")
    torch.library.register_vmap(f"fpsim::{_name}", functools.partial(_batched, _operator), lib=_library)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, mask, seed, *ctx.call = inputs
    ctx.save_for_backward(q, k, v, *output, mask, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 10
    return (*flash_backward_op(gradient, *ctx.saved_tensors, *ctx.call), *[None] * 7)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "attention with the roundings of a kernel has no second derivative: use attention='round', or "
        "fpsim.curvature with a model in which attention is opened"
    )


torch.library.register_autograd("fpsim::flash_attention", _differentiate, setup_context=_save, lib=_library)
torch.library.register_autograd("fpsim::flash_attention_backward", _refuse, lib=_library)


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    steps: FlashLike = "flash",
    seed: int | Tensor | None = None,
    salt: int = 0,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`, computed and rounded as a tiled kernel does.

    Args:
        query: shape (..., Hq, Lq, E), of a carrier dtype.
        key: shape (..., H, Lk, E); value: shape (..., H, Lk, Ev). Leading axes broadcast.
        attn_mask: booleans (True: the query sees the key) or numbers that are added to the scores, of a shape that
            broadcasts to (..., Hq, Lq, Lk). It has no gradient.
        dropout_p: 0.
        is_causal: whether query i sees keys 0 to i only; not beside a mask.
        scale: the factor of the scores; None means 1 / sqrt(E). It is rounded to float32.
        enable_gqa: whether H may divide Hq: every key and value then serves Hq / H heads of queries in a row. Their
            gradients are added up outside of the kernel.
        steps: a `FlashAttention`, its fields, or the name of a preset: ``flash2_bf16`` (also ``flash``),
            ``flash2_fp16``, ``all_bf16``, ``flash3_fp8``.
        seed, salt: for stochastic rounding, and only for it, as in `fpsim.round`.

    Returns:
        A tensor of shape (..., Hq, Lq, Ev), of the dtype of ``query``. Rows without any key are 0. The derivative is
        that of the tiled backward pass, with its own roundings. There is no second derivative.

    Raises:
        ValueError: shapes do not fit, dropout, a mask beside ``is_causal`` or one that needs a gradient, a missing
            or needless seed, or a format that the dtype cannot hold.
        TypeError: a tensor is of no carrier dtype, or dtypes differ.

    >>> x = torch.ones(1, 4, 2)
    >>> flash_attention(x, x, x, is_causal=True, steps="all_bf16")[0, 3]
    tensor([1., 1.])
    """
    text, is_stochastic = _resolved(steps if isinstance(steps, str | Mapping) else str(steps))
    if is_stochastic:
        seed = seed_tensor(seed, "stochastic", query.device)
    elif seed is not None:
        raise ValueError("a seed has no meaning without stochastic rounding: leave it out, or use 'bf16/stochastic'")
    return attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, text, seed, salt)


@torch._dynamo.assume_constant_result
def _resolved(steps: str | Mapping[str, Any]) -> tuple[str, bool]:
    """The text of a `FlashAttention`, and whether it is stochastic."""
    given = parsed(steps) if isinstance(steps, str) and steps.startswith("{") else parse_flash(steps)
    return str(given), given.is_stochastic


@torch.compiler.allow_in_graph  # Dynamo cannot trace it, but the tracer after Dynamo can
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    steps: str = "{}",
    seed: Tensor | None = None,
    salt: int = 0,
) -> Tensor:
    """`flash_attention` with the text of a `FlashAttention` as ``steps``, and a tensor as ``seed``."""
    if dropout_p:
        raise ValueError(
            f"tiled attention simulates no dropout, got dropout_p={dropout_p}: set it to 0, or use attention='round'"
        )
    query, key, value, attn_mask = (_autocast(x, query.device.type) for x in (query, key, value, attn_mask))
    for x in (query, key, value):
        if check_tensor(x, "attend to") not in CARRIERS:
            raise TypeError(f"attention takes floating-point tensors, got {x.dtype}: convert it, e.g. x.float()")
        if x.dtype != query.dtype:
            raise TypeError(f"query, key and value have one dtype, got {query.dtype} and {x.dtype}: convert one")
        if x.dim() < 2:
            raise ValueError(f"attention takes tensors of shape (..., L, E), got {tuple(x.shape)}")
    if enable_gqa:
        key, value = _repeated(key, query), _repeated(value, query)
    leading = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, key, value)))
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise ValueError(f"shapes {shapes} do not fit: query and key share E, and key and value share their length")
    mask = _checked_mask(attn_mask, is_causal, (*leading, query.shape[-2], key.shape[-2]))
    factor = in_float32(1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    tensors = [x.expand(*leading, *x.shape[-2:]) for x in (query, key, value)]
    return flash_op(*tensors, mask, seed, is_causal, factor, salt, steps, SOURCE)[0]


def _autocast(x: Any, device: str) -> Any:
    """``x`` in the dtype of `torch.autocast`, if that is in force and casts ``x``, as it does for torch's attention."""
    if not torch.is_autocast_enabled(device) or not isinstance(x, Tensor) or x.dtype not in CARRIERS:
        return x
    return x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device))


def in_float32(number: float) -> float:
    """The float32 number nearest to ``number``."""
    return float(struct.unpack("f", struct.pack("f", number))[0])


def _repeated(x: Tensor, query: Tensor) -> Tensor:
    """``x`` with every head repeated for the heads of ``query`` that share it."""
    heads, wanted = x.shape[-3], query.shape[-3]
    if wanted % heads:
        raise ValueError(f"enable_gqa needs heads that divide those of the query, got {heads} and {wanted}")
    return x.repeat_interleave(wanted // heads, -3)


def _checked_mask(mask: Tensor | None, is_causal: bool, shape: tuple[int, ...]) -> Tensor | None:
    if mask is None:
        return None
    if is_causal:
        raise ValueError("attention takes a mask or is_causal=True, not both: put the causal mask into attn_mask")
    if mask.requires_grad:
        raise ValueError(
            "tiled attention gives a mask no gradient, and attn_mask needs one: detach it, or use attention='round'"
        )
    pairs = zip(reversed(mask.shape), reversed(shape), strict=False)
    if mask.dim() > len(shape) or any(own not in (1, size) for own, size in pairs):
        raise ValueError(f"attn_mask of shape {tuple(mask.shape)} does not broadcast to {shape}")
    return mask.reshape((1,) * (2 - mask.dim()) + tuple(mask.shape)) if mask.dim() < 2 else mask
