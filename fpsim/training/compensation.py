"""Compensated sums in a narrow format, which keep in a second tensor what each addition loses.

Source: Kahan 1965; for weights and target networks in float16: Björck et al., Low-Precision Reinforcement Learning
(arXiv 2102.13565), sections 4.4 and 4.5, and their code, nilsjohanbjorck/low-precision-rl, ``algs/torch_utils.py``.
"""

from __future__ import annotations

from torch import Tensor

from fpsim.casts import CastLike
from fpsim.training.arithmetic import format_of, rounding_to


def kahan_add(
    total: Tensor, compensation: Tensor, update: Tensor, format: CastLike | None = None
) -> tuple[Tensor, Tensor]:
    """Add ``update`` to ``total``, and the error of earlier additions with it.

    y = update - compensation, t = total + y, c = (t - total) - y: each result is rounded to ``format``.

    Args:
        total, compensation, update: tensors of one shape and dtype. The compensation is zero at first.
        format: the format of each result, or None for that of the dtype.

    Returns:
        The new total t and the new compensation c.

    >>> import torch
    >>> total, lost = torch.tensor(1.0), torch.tensor(0.0)
    >>> for _ in range(1000):
    ...     total, lost = kahan_add(total, lost, torch.tensor(2.0**-13), "fp16")
    >>> total  # 1 + 1000/8192 = 1.12207; without compensation it stays at 1
    tensor(1.1221)
    """
    q = rounding_to(format_of(total.dtype, format), "kahan_add")
    dtype = total.dtype
    total, compensation, update = (_wide(x) for x in (total, compensation, update))
    y = q(update - compensation)
    t = q(total + y)
    return t.to(dtype), q(q(t - total) - y).to(dtype)


def soft_update(
    scaled_target: Tensor,
    compensation: Tensor,
    parameter: Tensor,
    *,
    tau: float = 0.005,
    scale: float = 1e4,
    format: CastLike | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move a target network towards a parameter by the share ``tau``: Kahan momentum.

    The target is kept multiplied by ``scale``, and with a compensation. The update tau (scale parameter - target) is
    added by `kahan_add`. Each result is rounded to ``format``.

    Args:
        scaled_target, compensation, parameter: tensors of one shape and dtype. At first they are ``scale`` times the
            target, and zero.
        tau: the share of the difference that one update takes away.
        scale: the factor of the kept target. Small weights times ``tau`` would be subnormal in float16.
        format: the format of each result, or None for that of the dtype.

    Returns:
        The new target (which the model uses), the new scaled target, and the new compensation.
    """
    q = rounding_to(format_of(parameter.dtype, format), "soft_update")
    wide, theta = _wide(scaled_target), _wide(parameter)
    update = q(tau * q(q(scale * theta) - wide))
    wide, lost = kahan_add(wide, _wide(compensation), update, format_of(parameter.dtype, format))
    return tuple(x.to(parameter.dtype) for x in (q(wide / scale), wide, lost))  # type: ignore[return-value]


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is."""
    return x.detach() if x.dtype.itemsize >= 4 else x.detach().float()
