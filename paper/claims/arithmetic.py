"""Claims about one step of arithmetic: test beds without training, seconds each.

Signal-to-noise ratios are ``10 log10(sum x^2 / sum (x - rounded)^2)`` in decibels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

import fpsim

from .claim import Claim


def signal_to_noise(exact: Tensor, approximate: Tensor) -> float:
    """The signal-to-noise ratio of ``approximate`` in decibels; infinite where the two are equal.

    Args:
        exact, approximate: two tensors of one shape, any floating-point dtype.
    """
    signal, error = exact.double(), (exact - approximate).double()
    noise = float(error.square().sum())
    return math.inf if noise == 0 else 10 * math.log10(float(signal.square().sum()) / noise)


def relative_error(exact: Tensor, approximate: Tensor) -> float:
    """The 2-norm of the error over the 2-norm of ``exact``."""
    return float((exact - approximate).double().norm() / exact.double().norm())


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def accumulation(seed: int) -> Mapping[str, float]:
    """Mean relative errors of 64 sums over K = 4096 on Hopper's FP8 tensor cores, without and with promotion."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (fpsim.round(torch.rand(8, 4096, generator=generator), "e4m3fn") for _ in range(2))
    exact = a.double() @ b.double().T

    def error(promote: int | None) -> float:
        sums = fpsim.matmul(a, b.T.contiguous(), accumulator="hopper_fp8", promote=promote)
        return abs(float(((sums.double() - exact) / exact).mean()))

    return {"plain": error(None), "promoted": error(128)}


def all_reduce(seed: int) -> Mapping[str, float]:
    """Gain of FP8-LM's pre-scale in decibels, when 16 ranks (and 2) sum their gradients in FP8, rounding each sum."""

    def decibels(ranks: int, prescale: float) -> tuple[float, float]:
        shared, own = _normal(seed, 1, 1 << 14), _normal(seed + 1, ranks, 1 << 14)
        gradients = shared + 0.5 * own
        scale = 2.0 ** math.floor(math.log2(448 / float(gradients.abs().max()))) * prescale
        parts = fpsim.round(gradients * scale, "e4m3fn", overflow="sat_finite")
        total = parts[0]
        clipped = torch.zeros(total.shape, dtype=torch.bool)
        for part in parts[1:]:
            clipped |= (total + part).abs() > 448
            total = fpsim.round(total + part, "e4m3fn", overflow="sat_finite")
        return signal_to_noise(gradients.sum(0), total / scale), float(clipped.double().mean())

    plain, clipped = decibels(16, 1.0)
    two = decibels(2, 2**-0.5)[0] - decibels(2, 1.0)[0]
    return {"gain_16_ranks": decibels(16, 0.25)[0] - plain, "gain_2_ranks": two, "clipped_16_ranks": clipped}


def normal_float(seed: int) -> Mapping[str, float]:
    """Decibels that NF4 gains over bitsandbytes' FP4 on Gaussian weights, and over INT4 on uniform ones."""
    gaussian, uniform = _normal(seed, 256, 512), torch.rand(256, 512, generator=torch.Generator().manual_seed(seed))
    uniform = 2 * uniform - 1

    def decibels(x: Tensor, name: str) -> float:
        return signal_to_noise(x, fpsim.round(x, f"{name}/group:64"))

    return {
        "gain_over_fp4": decibels(gaussian, "nf4") - decibels(gaussian, "fp4_bnb"),
        "gain_over_int4_uniform": decibels(uniform, "nf4") - decibels(uniform, "int4"),
    }


def rotated_outlier(seed: int) -> Mapping[str, float]:
    """Decibels that a Hadamard rotation of width 512 gains where one channel is 50 times the others, and where none is.

    The tensor is rotated, rounded and rotated back. The rotation is orthogonal, so it changes no norm.
    """
    plain = _normal(seed, 256, 512)
    outlier = plain.clone()
    outlier[:, seed % 512] *= 50

    def gain(x: Tensor, name: str) -> float:
        rotated = fpsim.round(x, f"{name}/hadamard:512")
        return signal_to_noise(x, rotated) - signal_to_noise(x, fpsim.round(x, name))

    return {
        "int8_gain": gain(outlier, "int8/tensor"),
        "fp8_gain": gain(outlier, "e4m3fn/tensor"),
        "int8_gain_without_outlier": gain(plain, "int8/tensor"),
    }


def stochastic_gradients(seed: int) -> Mapping[str, float]:
    """Relative error of the mean of 40 rounded weight gradients: stochastic rounding over rounding to nearest.

    All 40 have the same gradient at the output, as where a direction persists over steps.
    """
    x, gradient = _normal(seed, 256, 64), _normal(seed + 1, 256, 64)
    exact = gradient.double().T @ x.double()
    nearest = fpsim.round(gradient, "nvfp4", axis=0).T.double() @ x.double()
    draws = [
        fpsim.round(gradient, "nvfp4/stochastic", seed=seed * 40 + k, axis=0).T.double() @ x.double() for k in range(40)
    ]
    error = relative_error(exact, nearest)
    return {
        "ratio_of_means": relative_error(exact, torch.stack(draws).mean(0)) / error,
        "ratio_of_one": relative_error(exact, draws[0]) / error,
    }


def wgrad_in_int8(seed: int) -> Mapping[str, float]:
    """Growth of the relative error of a weight gradient in INT8 (rows of both operands) from 256 to 4096 tokens."""

    def error(tokens: int) -> float:
        x, gradient = _normal(seed, tokens, 64), _normal(seed + 1, tokens, 64)
        exact = gradient.double().T @ x.double()
        rounded = [fpsim.round(tensor, "int8/row").double() for tensor in (gradient, x)]
        return relative_error(exact, rounded[0].T @ rounded[1])

    small, large = error(256), error(4096)
    return {"growth": large / small, "error": large}


def integer_chains(seed: int) -> Mapping[str, float]:
    """Relative errors of dynamic fixed point with 16 bits: chains of 2 products spilled to float32, and one of 256."""
    a, b = (_normal(seed + k, 8, 256) for k in range(2))
    units = [2.0 ** (14 - math.floor(math.log2(float(x.abs().max())))) for x in (a, b)]
    left, right = (fpsim.round(x * unit, "int16/unscaled") for x, unit in zip((a, b), units, strict=True))
    exact = left.double() @ right.double().T

    def sums(length: int) -> Tensor:
        """Chains of ``length`` products in INT32, and float32 sums of the chains."""
        chains = zip(left.split(length, 1), right.split(length, 1), strict=True)
        parts = [fpsim.matmul(x, y.T.contiguous(), accumulator="int32/wrap") for x, y in chains]
        return torch.stack(parts).sum(0)

    return {"spilled": relative_error(exact, sums(2)), "wrapped": relative_error(exact, sums(256))}


CLAIMS = (
    Claim(
        "accumulation",
        "deepseek_v3",
        "Hopper's FP8 accumulator loses up to 2 % of a sum over K = 4096; promotion every 128 terms mends it",
        "DeepSeek-V3 (arXiv 2412.19437), section 3.3.2",
        "64 sums of 4096 products of uniform numbers in [0, 1), operands in E4M3",
        accumulation,
    ),
    Claim(
        "all_reduce",
        "fp8_lm",
        "scaling by 1/sqrt(ranks) before an all-reduce in FP8 avoids overflow without underflow",
        "FP8-LM (arXiv 2310.18313), section 2.1; Azure/MS-AMP nn/distributed.py",
        "16 gradients, a shared part and half as much of their own, summed with a rounding to E4M3 at each addition",
        all_reduce,
    ),
    Claim(
        "normal_float",
        "nf4",
        "NF4 represents Gaussian weights better than FP4",
        "QLoRA (arXiv 2305.14314), section 3",
        "131,072 Gaussian weights in groups of 64, bitsandbytes' FP4; control: INT4 is better on uniform weights",
        normal_float,
    ),
    Claim(
        "rotated_outlier",
        "halo",
        "Hadamard rotations make INT8 work with outlier channels, and FP8 does not need them",
        "HALO (arXiv 2501.02625)",
        "256 x 512 Gaussian activations with one channel 50 times larger, one scale per tensor; control: no outlier",
        rotated_outlier,
    ),
    Claim(
        "stochastic_gradients",
        "nvfp4",
        "stochastic rounding of gradients keeps their mean over steps, which rounding to nearest biases",
        "NVIDIA, Pretraining LLMs with NVFP4 (arXiv 2509.25149)",
        "one gradient rounded 40 times; control: a single stochastic draw is worse than rounding to nearest",
        stochastic_gradients,
    ),
    Claim(
        "wgrad_in_int8",
        "switchback",
        "the error of an INT8 weight gradient grows with the number of tokens, so SwitchBack keeps it in 16 bits",
        "Wortsman et al. (arXiv 2304.13013), appendix C",
        "independent Gaussian tokens, 256 and 4096 of them; control: the error is above zero",
        wgrad_in_int8,
    ),
    Claim(
        "integer_chains",
        "dfp16",
        "INT32 sums of INT16 products overflow after two products, and short chains spilled to float32 do not",
        "Das et al. (arXiv 1802.00930), section 4",
        "64 sums of 256 products of Gaussian numbers; control: one chain that wraps around",
        integer_chains,
    ),
)
