"""Federated learning in FP8: a grid with a learned clipping value, unbiased messages, and the server's step.

Source: Wang et al., Towards Federated Learning with On-device Training and Communication in 8-bit Floating Point (arXiv
2407.02610); the grid is that of Kuzmin et al., FP8 Quantization: The Power of the Exponent (arXiv 2208.09225), and the
code, Qualcomm-AI-research/FP8-quantization, ``fp8_quantizer.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Alpha = Tensor | float


def round_to_grid(x: Tensor, alpha: Alpha, *, mantissa_bits: int = 3, exponent_bits: int = 4) -> Tensor:
    """``x`` rounded to a floating-point grid whose largest value is ``alpha``, with derivatives for both.

    With M mantissa bits, E exponent bits and the real bias b = 2^E - log2(alpha) + log2(2 - 2^-M) - 1::

        x_c = clamp(x, -alpha, alpha)           p = max(floor(log2 abs(x_c) + b), 1)
        step = 2^(p - M - b)                    result = step round(x_c / step), ties to even

    All codes are numbers: the grid has no infinity and no NaN. A NaN stays one.

    The derivative takes rounding as the identity and floor as a constant. It is 1 for ``x`` within the clipping value,
    and 0 outside. For ``alpha`` it is the sign of x outside, and inside (result - x_c) / alpha.

    Args:
        x: float32 or float64, any shape.
        alpha: a positive number, or a tensor that broadcasts against ``x``. It may require a gradient.
        mantissa_bits, exponent_bits: M at least 0, and E at least 1.

    Returns:
        A tensor of the dtype of ``x``.

    Raises:
        ValueError: ``alpha`` is not positive, or M or E is out of range.

    >>> round_to_grid(torch.tensor([0.3, 5.0, -0.07]), 1.0)
    tensor([ 0.3000,  1.0000, -0.0667])
    """
    clipped, step = _clipped_and_step(x, alpha, mantissa_bits, exponent_bits)
    ratio = clipped / step
    return step * (ratio + (ratio.round() - ratio).detach())


@torch.no_grad()
def send(
    x: Tensor,
    alpha: Alpha,
    generator: torch.Generator,
    *,
    mantissa_bits: int = 3,
    exponent_bits: int = 4,
) -> Tensor:
    """What the other side receives of ``x``: its elements rounded stochastically to the grid of `round_to_grid`.

    An element between two numbers of the grid becomes the upper one with the probability (x - lower) / step, so that
    the mean of messages is ``x`` where it is within the clipping value.

    Args:
        x, alpha, mantissa_bits, exponent_bits: as in `round_to_grid`.
        generator: the source of random numbers, one of float64 for each element.

    Raises:
        ValueError: as in `round_to_grid`.
    """
    clipped, step = _clipped_and_step(x.double(), alpha, mantissa_bits, exponent_bits)
    ratio = clipped / step
    lower = ratio.floor()
    drawn = torch.rand(ratio.shape, dtype=torch.float64, generator=generator, device=x.device)
    message = step * (lower + (drawn < ratio - lower))
    return torch.where(message.abs() > alpha, clipped, message).to(x.dtype)


@torch.no_grad()
def average(messages: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    """The mean of what clients sent, weighted by the numbers of their samples: the server's step of FedAvg.

    Args:
        messages: tensors of one shape and dtype.
        counts: a positive number for each.

    Returns:
        The sum of counts[k] messages[k] in the order of the clients, divided by the sum of counts, in their dtype.

    Raises:
        ValueError: there is no message, or the counts are not as many, or one is not positive.
    """
    if not messages or len(messages) != len(counts) or not all(0 < count < math.inf for count in counts):
        raise ValueError(f"each message has a positive count, got {len(messages)} messages and counts {list(counts)}")
    total = torch.zeros_like(messages[0])
    for message, count in zip(messages, counts, strict=True):
        total = total + count * message
    return total / sum(counts)


def server_step(
    messages: Sequence[Tensor],
    alphas: Sequence[float],
    counts: Sequence[float],
    *,
    steps: int = 5,
    lr: float = 0.1,
    grid: int = 50,
) -> tuple[Tensor, float]:
    """The server's step of the method "UQ+": weights and a clipping value whose rounded weights are near the messages.

    It begins with the averages w and alpha of messages and clipping values. ``steps`` steps of gradient descent on w
    lower E(w, alpha) = sum_k counts[k] mean((round_to_grid(w, alpha) - messages[k])^2) / sum(counts). Then alpha
    becomes that of ``grid`` equally spaced values from the least to the largest of the clients' with the least E, the
    first one of equals.

    Args:
        messages: the weights of one tensor that clients sent, of one shape, float32 or float64.
        alphas, counts: their clipping values and numbers of samples.
        steps, lr: the number and the size of steps of gradient descent. lr multiplies half of the derivative times the
            number of elements, so that a step moves w by the share lr of the mean difference.
        grid: the number of clipping values to try, at least 2.

    Returns:
        The new weights and clipping value, which the server sends by `send`.

    Raises:
        ValueError: as in `average` and `round_to_grid`.
    """
    with torch.no_grad():
        w = average(messages, counts)
        alpha = float(average([torch.tensor(a, dtype=torch.float64) for a in alphas], counts))
        target = average(messages, counts)
        for _ in range(steps):
            inside = (w.abs() <= alpha).to(w.dtype)  # the derivative of round_to_grid
            w = w - lr * inside * (round_to_grid(w, alpha) - target)
        tried = torch.linspace(min(alphas), max(alphas), grid, dtype=torch.float64).tolist()
        errors = [_error(w, value, messages, counts) for value in tried]
    return w, tried[errors.index(min(errors))]


def _error(w: Tensor, alpha: float, messages: Sequence[Tensor], counts: Sequence[float]) -> float:
    rounded = round_to_grid(w, alpha).double()
    errors = [float((rounded - message).square().mean()) for message in messages]
    return sum(n * e for n, e in zip(counts, errors, strict=True)) / sum(counts)


def _clipped_and_step(x: Tensor, alpha: Alpha, mantissa_bits: int, exponent_bits: int) -> tuple[Tensor, Tensor]:
    """``x`` clipped, and the distance of grid points around each element, differentiable by ``alpha``."""
    if mantissa_bits < 0 or exponent_bits < 1:
        raise ValueError(f"a grid has at least 0 mantissa and 1 exponent bits, got {mantissa_bits} and {exponent_bits}")
    alpha = alpha if isinstance(alpha, Tensor) else torch.tensor(alpha, dtype=x.dtype, device=x.device)
    if not bool((alpha > 0).all() & alpha.isfinite().all()):
        raise ValueError(f"the clipping value of a grid is a positive number, got {alpha}")
    alpha = alpha.to(x.dtype)
    clipped = torch.where(x.abs() > alpha, alpha * x.sign(), x)
    # Relative to alpha the grid is that of a format: 2^-b is alpha / largest 2^-top.
    largest, top = 2 - 2.0**-mantissa_bits, 2**exponent_bits - 1
    relative = clipped.detach().double().abs() / alpha.detach().double() * largest
    exponent = torch.frexp(relative).exponent - 1  # floor(log2), for zero any number
    p = (exponent + top).clamp(min=1)
    power = torch.ldexp(torch.ones_like(relative), p - top - mantissa_bits)
    return clipped, (power / largest).to(x.dtype) * alpha
