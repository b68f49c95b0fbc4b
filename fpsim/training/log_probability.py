"""Log-probabilities of squashed normal distributions whose steps stay in the range of float16.

Source: Björck et al., Low-Precision Reinforcement Learning (arXiv 2102.13565), sections 4.2 and 4.3, and their code,
nilsjohanbjorck/low-precision-rl, ``algs/distributions.py`` and ``sac.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus


def tanh_log_derivative(x: Tensor, threshold: float = 10.0) -> Tensor:
    """log(1 - tanh(x)^2), as 2 (log 2 - x - softplus(-2 x)).

    Softplus is taken as its argument above ``threshold``, so no exponential exceeds exp(threshold). torch's threshold
    of 20 lets exp(20) overflow float16, whose largest number is 65504; e^10 is 22026.

    Args:
        x: any shape and floating-point dtype. The result has the same. Each operation of torch rounds to the dtype.
    """
    return 2.0 * (math.log(2.0) - x - softplus(-2.0 * x, threshold=threshold))


def normal_log_probability(x: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """The logarithm of the normal density at ``x``: -((x - mean) / deviation)^2 / 2 - log(deviation) - log(2 pi) / 2.

    The quotient is squared, and not its parts: with a deviation of e^-5 the variance 4.5e-5 is subnormal in float16.

    Args:
        x, mean, deviation: tensors that broadcast, of one floating-point dtype, which the result has too.
    """
    return -0.5 * ((x - mean) / deviation) ** 2 - deviation.log() - math.log(math.sqrt(2 * math.pi))


def bounded_deviation(x: Tensor, low: float = -5.0, high: float = 2.0) -> Tensor:
    """exp of a number between ``low`` and ``high``: low + (high - low) (tanh(x) + 1) / 2."""
    return (low + 0.5 * (high - low) * (torch.tanh(x) + 1)).exp()


def squashed_normal_log_probability(x: Tensor, mean: Tensor, deviation: Tensor, threshold: float = 10.0) -> Tensor:
    """The log-density of tanh(x) where x is normal, at the number ``x`` before tanh.

    >>> x = torch.tensor([-12.0, 0.5], dtype=torch.float16)
    >>> squashed_normal_log_probability(x, torch.zeros(2).half(), torch.ones(2).half())
    tensor([-50.3125,  -0.8042], dtype=torch.float16)
    """
    return normal_log_probability(x, mean, deviation) - tanh_log_derivative(x, threshold)
