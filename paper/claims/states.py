"""Claims about states of optimizers, sums on the wire and the arithmetic of float16: seconds each, without a Llama."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import fpsim
from fpsim.training.clipping import clip_updates
from fpsim.training.compensation import soft_update
from fpsim.training.federated import average, round_to_grid, send

from .arithmetic import signal_to_noise
from .claim import Claim


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def range_expansion(seed: int) -> Mapping[str, float]:
    """Decibels that COAT's range expansion gains for m, for v and for m / sqrt(v), and for v with 5 % of zeros.

    ``kernel_with_zeros`` is the same for v with the least magnitude that COAT's kernel finds.
    """
    generator = _generator(seed)
    m = torch.randn(4096, generator=generator, dtype=torch.float64)
    v = torch.exp(0.35 * torch.randn(4096, generator=generator, dtype=torch.float64)) * 1e-8
    rows = v.clone()
    rows[torch.rand(4096, generator=generator) < 0.05] = 0
    rows[::128] = 0
    plain = "e4m3fn/group:128"

    def gain(x: Tensor, cast: str = f"{plain}/expand") -> float:
        return signal_to_noise(x, fpsim.round(x, cast)) - signal_to_noise(x, fpsim.round(x, plain))

    def update(cast: str) -> float:
        return signal_to_noise(m / v.sqrt(), fpsim.round(m, cast) / fpsim.round(v, cast).sqrt())

    return {
        "gain_m": gain(m),
        "gain_v": gain(v),
        "gain_update": update(f"{plain}/expand") - update(plain),
        "gain_with_zeros": gain(rows),
        "kernel_with_zeros": gain(rows, f"{plain}/expand:kernel"),
    }


def second_moment(seed: int) -> Mapping[str, float]:
    """The share of second moments that become zero with one scale for the tensor: E5M2, and E4M3 on Gaudi2 as control.

    Second moments are those of gradients whose sizes differ between rows by factors up to 2^12.
    """
    generator = _generator(seed)
    sizes = torch.exp2(12 * torch.rand(64, 1, generator=generator))
    gradients = torch.randn(200, 64, 64, generator=generator) * sizes
    v = gradients.square().mean(0)
    return {name: float((fpsim.round(v, f"{name}/tensor:encode") == 0).double().mean()) for name in ("e5m2", "e4m3")}


def clipped_spike(seed: int) -> Mapping[str, float]:
    """A regression whose data grow tenfold: the peak of AdamW's loss over that of StableAdamW, and the largest RMS.

    The peak is the largest loss after the change minus the first one.
    """
    peaks, largest = [], 0.0
    for clips in (False, True):
        generator = _generator(seed)
        w = nn.Parameter(torch.zeros(16, 1))
        optimizer = torch.optim.AdamW([w], lr=0.1, betas=(0.9, 0.999), weight_decay=0.0)
        clipped = clip_updates(optimizer) if clips else None
        losses = []
        for step in range(230):
            size = 10 if step >= 200 else 1
            x, noise = (size * torch.randn(64, n, generator=generator) for n in (16, 1))
            loss = (x @ w - x.sum(1, keepdim=True) - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if clipped is not None and 200 <= step < 208:
                largest = max(largest, clipped.rms[w])
        peaks.append(max(losses[200:]) - losses[200])
    return {"ratio_of_peaks": peaks[0] / max(peaks[1], 1e-9), "rms": largest}


def compensated_target(seed: int) -> Mapping[str, float]:
    """Distances of a float16 target network to constant weights after 500 updates, over that in float64.

    ``compensated`` is Kahan momentum, ``plain`` the same update in float16 without it. (After 2000 updates the target
    in float64 is nearer than the numbers of float16 are to each other.)
    """
    generator = _generator(seed)
    theta = torch.randn(512, generator=generator).half()
    start = (theta.float() + 0.1 * torch.randn(512, generator=generator)).half()
    plain, exact, tau = start.clone(), start.double(), 0.005
    scaled, lost, target = start * 1e4, torch.zeros_like(start), start
    for _ in range(500):
        target, scaled, lost = soft_update(scaled, lost, theta, tau=tau, scale=1e4)
        plain = tau * theta + (1 - tau) * plain
        exact = exact + tau * (theta.double() - exact)

    def distance(x: Tensor) -> float:
        return float((x.double() - theta.double()).norm())

    return {name: distance(x) / distance(exact) for name, x in (("compensated", target), ("plain", plain))}


def stochastic_links(seed: int) -> Mapping[str, float]:
    """Distances to the mean of clients' targets after 60 rounds: links rounded to nearest over stochastic ones.

    Each round moves a client by 5 % of its distance, less than half of a step of the grid in the end. ``large_steps``
    has the same with 50 %, as control.
    """

    def distance(stochastic: bool, share: float) -> float:
        generator = _generator(seed)
        centre = 0.5 + 0.4 * torch.rand(64, generator=generator)
        targets = [centre + 0.02 * k for k in range(-4, 5)]
        w = torch.full((64,), 0.4)

        def link(x: Tensor) -> Tensor:
            return send(x, 1.0, generator) if stochastic else round_to_grid(x, 1.0)

        for _ in range(60):
            received = link(w)
            w = average([link(received - share * (received - target)) for target in targets], [1] * 9)
        return float((w - centre).abs().mean())

    return {
        "ratio": distance(False, 0.05) / distance(True, 0.05),
        "large_steps": distance(False, 0.5) / distance(True, 0.5),
    }


CLAIMS = (
    Claim(
        "range_expansion",
        "coat",
        "dynamic range expansion lowers the error of both moments in FP8, and of the update",
        "COAT (arXiv 2410.19313), section 4",
        "Gaussian m and log-normal v (sigma 0.35), 4096 each, in groups of 128, float64; also v with 5 % of zeros; "
        "control: with the zeros of the released kernel expansion loses",
        range_expansion,
    ),
    Claim(
        "second_moment",
        "fp8_trillion",
        "the second moment needs the range of E5M2",
        "Fishman et al. (arXiv 2409.12517), section 5",
        "means of 200 squared gradients of 64 rows, up to 2^12 apart, one scale; control: E4M3 loses some to zero",
        second_moment,
    ),
    Claim(
        "clipped_spike",
        "switchback",
        "StableAdamW avoids the loss spikes that follow when AdamW's second moment lags behind the gradients",
        "Wortsman et al. (arXiv 2304.13013), section 3",
        "linear regression, 16 weights, data 10 times larger after 200 steps; control: RMS exceeds 2 within 8 steps",
        clipped_spike,
    ),
    Claim(
        "compensated_target",
        "low_precision_rl",
        "Kahan momentum lets a float16 target network follow as in float32",
        "Björck et al. (arXiv 2102.13565), section 4.4",
        "512 constant weights, 500 updates with tau 0.005; control: without compensation the target stalls",
        compensated_target,
    ),
    Claim(
        "stochastic_links",
        "fp8_federated",
        "unbiased links reach what links rounded to nearest do not",
        "Wang et al. (arXiv 2407.02610), section 3",
        "9 clients with targets around a common one, 64 weights, 60 rounds of small steps; control: with large steps "
        "rounding to nearest is no worse",
        stochastic_links,
    ),
)
