"""hAdam: Adam that keeps the root of its second moment, for training in which every number is float16.

Source: Björck et al., Low-Precision Reinforcement Learning: Running Soft Actor-Critic in Half Precision (arXiv
2102.13565), section 4.1 and 4.4, and their code, nilsjohanbjorck/low-precision-rl, ``algs/opt.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fpsim.casts import CastLike, parse_cast
from fpsim.training.arithmetic import format_of, rounding_to
from fpsim.training.compensation import kahan_add
from fpsim.training.per_parameter import PerParameterOptimizer


class HypotAdam(PerParameterOptimizer):
    """Adam with w in place of the second moment v: w = (1 - beta1) / sqrt(1 - beta2) * sqrt(v).

    A step computes, with the gradient g::

        m = beta1 m + (1 - beta1) g
        w = hypot(sqrt(beta2) w, (1 - beta1) g)     as L sqrt(1 + (S / (L + eps))^2), L and S the larger and smaller one
        p = p - lr (1 - beta1) / (sqrt(1 - beta2) (1 - beta1^t)) m / (w / sqrt(1 - beta2^t) + eps)

    No gradient is squared, so w is 0 only where g is, and overflows only where g does. In exact arithmetic, and with
    eps = 0, this is Adam. Each result is rounded to `arithmetic`; coefficients are float32 numbers. Both products of a
    sum with one coefficient, such as ``x + a y``, count as one result, as in torch's kernels.

    Args:
        params: parameters, or groups of them with options of their own.
        lr, betas, eps: as in Adam. The paper takes eps 1e-4, beside gradients multiplied by a loss scale of 1e4.
        weight_decay: the factor of the parameter that is added to its gradient.
        kahan: whether the parameter is updated by `fpsim.training.compensation.kahan_add` ("Kahan gradients").
        arithmetic: the format in which every result is rounded; None means that of the parameters' dtype. With
            ``"fp16"`` and float32 parameters the bits are those of float16 parameters.

    States: ``exp_avg`` (m), ``hypot`` (w), ``compensation`` with ``kahan``, and the count ``step``.

    Raises:
        ValueError: an option is out of range; ``arithmetic`` is unknown or stochastic. In a step: a gradient is sparse.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        kahan: bool = False,
        arithmetic: CastLike | None = None,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} of HypotAdam is at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas of HypotAdam are at least 0 and below 1, got {betas}")
        rounding_to(arithmetic, "HypotAdam")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "kahan": kahan}
        text = None if arithmetic is None else str(parse_cast(arithmetic))
        super().__init__(params, {**defaults, "arithmetic": text})

    def update(self, group: dict[str, Any], p: Tensor, gradient: Tensor) -> None:
        """Take the step of one parameter, as the class describes it."""
        format = format_of(p.dtype, group["arithmetic"])
        q = rounding_to(format, "HypotAdam")
        (beta1, beta2), eps, state = group["betas"], group["eps"], self.state[p]
        if not state:
            names = ("exp_avg", "hypot", *["compensation"] * group["kahan"])
            state.update({"step": 0, **{name: torch.zeros_like(p) for name in names}})
        state["step"] += 1
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        x, g, m, w = (t.to(wide) for t in (p, gradient, state["exp_avg"], state["hypot"]))
        if group["weight_decay"]:
            g = q(g + group["weight_decay"] * x)

        m = q(q(beta1 * m) + (1 - beta1) * g)
        new, old = q((1 - beta1) * g.abs()), q(math.sqrt(beta2) * w)
        larger, smaller = torch.maximum(new, old), torch.minimum(new, old)
        ratio = q(smaller / q(larger + eps))
        w = q(larger * q(q(1 + q(ratio * ratio)).sqrt()))
        denominator = q(q(w / math.sqrt(1 - beta2 ** state["step"])) + eps)
        rate = group["lr"] * (1 - beta1) / (math.sqrt(1 - beta2) * (1 - beta1 ** state["step"]))
        if group["kahan"]:
            update = q(q(-rate * m) / denominator)
            x, lost = kahan_add(x, state["compensation"].to(wide), update, format)
            state["compensation"].copy_(lost)
        else:
            x = q(x - rate * (m / denominator))
        for kept, value in ((p, x), (state["exp_avg"], m), (state["hypot"], w)):
            kept.copy_(value)
