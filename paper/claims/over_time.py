"""Claims about precision over time and outside of products: FracTrain, rotary positions, layer norms, 16-bit training.

Small classifiers learn classes of images: an image is the pattern of its class plus Gaussian noise, so much that a few
percent of images look like those of another class. Accuracies are those on fresh images, in percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from fpsim.policy.policy import KINDS
from fpsim.recipes import Recipe, amp_bf16, fractrain, mcu_fp16, mosaic_layernorm
from fpsim.recipes.rotary import shift_distance
from fpsim.training.schedules import Scheduled

from ..training import run
from .claim import Claim
from .training import BASE

CLASSES = 10


def noisy_images(patterns: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and their classes; ``patterns`` has one image for each class."""
    deviation = patterns[0].numel() ** 0.5 / 2.7  # two patterns are 3.8 of it apart
    labels = torch.randint(CLASSES, (count,), generator=generator)
    noise = torch.randn(count, *patterns.shape[1:], generator=generator)
    return patterns[labels] + deviation * noise, labels


def _accuracy(
    model: nn.Module,
    recipe: Recipe | None,
    seed: int,
    shape: tuple[int, ...],
    *,
    steps: int,
    rate: float,
    momentum: float = 0.0,
    each_step: Callable[[nn.Module], None] = lambda model: None,
) -> float:
    """Train ``model`` by ``recipe`` (None: in float32) on images of ``shape``; the accuracy at the end."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(CLASSES, *shape, generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    network = model
    if recipe is not None:
        network, optimizer = recipe.apply(model, optimizer, backend="fpsim_eager")
    torch.manual_seed(seed)
    for _ in range(steps):
        images, labels = noisy_images(patterns, 64, generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        each_step(network)
        if isinstance(network, Scheduled):
            network.step(loss)
    images, labels = noisy_images(patterns, 4096, generator)
    with torch.no_grad():
        right = torch.cat([network(part).argmax(-1) for part in images.split(64)]) == labels
    return 100 * float(right.double().mean())


def progressive_precision(seed: int) -> Mapping[str, float]:
    """Accuracy that FracTrain's schedule and static 3 bits lose against static 8 bits, and the cost of the schedule.

    A convolutional network with three layers of convolutions, 400 steps. The cost is the number of bit operations, b_w
    b_a + b_w b_g + b_a b_g, relative to that of 8 bits.
    """

    def network() -> nn.Module:
        torch.manual_seed(seed)
        layers = (nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1))
        return nn.Sequential(
            *(part for layer in layers for part in (layer, nn.ReLU())), nn.Flatten(), nn.Linear(64, 10)
        )

    costs: list[float] = []

    def count(model: nn.Module) -> None:
        assert isinstance(model, Scheduled)
        policy = model.policy
        bits, gradient = (policy.cast(KINDS[0], "weight"), policy.cast("dgrad", "gradient"))
        assert bits is not None and gradient is not None
        b, g = bits.format.bits, gradient.format.bits
        costs.append((b * b + 2 * b * g) / (3 * 8 * 8))

    def accuracy(recipe: Recipe) -> float:
        costs.clear()
        settings = {"steps": 400, "rate": 0.02, "momentum": 0.9}
        return _accuracy(network(), recipe, seed, (1, 8, 8), each_step=count, **settings)  # type: ignore[arg-type]

    static = accuracy(fractrain(forward=(8,), backward=(8,)))
    narrow = accuracy(fractrain(forward=(3,), backward=(6,)))
    progressive = accuracy(fractrain(interval=12))
    return {"lost": static - progressive, "cost": sum(costs) / len(costs), "lost_by_3_bits": static - narrow}


def shifted_positions(seed: int) -> Mapping[str, float]:
    """How much attention depends on the origin of positions, in bfloat16 and in float32, at 128 and 1024 tokens.

    Queries and keys of 64 channels are Gaussian. The first key is a sink: it has a large product with every query.
    """

    def distance(tokens: int, precision: str) -> tuple[float, float]:
        q, k = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(seed))
        q[:, [31, 63]], k[0, [31, 63]] = 8.0, 3.0  # the slowest pair of channels
        found = shift_distance(q, k, 16, precision)
        return found.distance, found.first_key

    short, long = (distance(tokens, "products") for tokens in (128, 1024))
    exact = distance(1024, "fp32")[0]
    return {
        "over_fp32": long[0] / exact,
        "growth": long[0] / short[0],
        "share_of_first_key_times_tokens": long[1] * 1024,
        "fp32": exact,
    }


@lru_cache(maxsize=64)
def _gpt2_loss(recipe: str, seed: int) -> float:
    """The smoothed loss at the end of a run of a small GPT-2, which has layer norms."""
    config = replace(BASE, model=replace(BASE.model, family="gpt2"), recipe=Recipe.from_json(recipe), seed=seed)
    loss = run(config)[-1].smoothed_loss
    return math.inf if loss is None or math.isnan(loss) else loss


def narrow_norms(seed: int) -> Mapping[str, float]:
    """Final losses of a small GPT-2 under low-precision layer norms, minus that of amp_bf16."""
    baseline = _gpt2_loss(amp_bf16().to_json(), seed)
    gap = _gpt2_loss(mosaic_layernorm().to_json(), seed) - baseline
    control = _gpt2_loss(mosaic_layernorm(statistics="same").to_json(), seed) - baseline
    return {"baseline": baseline, "gap": gap, "control": control}


def sixteen_bits(seed: int) -> Mapping[str, float]:
    """Accuracy that training wholly in 16 bits loses against float32, and the weights that small updates never move.

    A perceptron whose first products have 576 terms, 200 steps; every partial sum and every weight is in 16 bits.
    """

    def network() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(576, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def accuracy(recipe: Recipe | None) -> float:
        return _accuracy(network(), recipe, seed, (24, 24), steps=200, rate=0.02)

    exact = accuracy(None)
    stuck = network()
    before = [p.detach().bfloat16().float() for p in stuck.parameters()]
    _accuracy(stuck, mcu_fp16(), seed, (24, 24), steps=20, rate=1e-5)
    same = [p.detach() == old for p, old in zip(stuck.parameters(), before, strict=True)]
    unmoved = sum(int(part.sum()) for part in same) / sum(part.numel() for part in same)
    return {
        "lost_in_fp16": exact - accuracy(mcu_fp16(format="fp16")),
        "lost_in_bf16": exact - accuracy(mcu_fp16()),
        "unmoved_by_small_updates": unmoved,
    }


CLAIMS = (
    Claim(
        "progressive_precision",
        "fractrain",
        "precision that grows from 3 to 8 bits trains to the accuracy of 8 bits at a fraction of their cost",
        "Fu et al., FracTrain (NeurIPS 2020)",
        "a network of three convolutions on noisy 8 x 8 patterns, 400 steps; control: 3 bits all along",
        progressive_precision,
    ),
    Claim(
        "shifted_positions",
        "bf16_rope",
        "in bfloat16 attention depends on the origin of rotary positions, more so in long contexts, by the first token",
        "Wang et al. (arXiv 2411.13476), section 3",
        "Gaussian queries and keys with a sink, 128 and 1024 tokens, shift 16; control: float32",
        shifted_positions,
    ),
    Claim(
        "narrow_norms",
        "mosaic_layernorm",
        "layer norms with bfloat16 arguments and results train to the same loss",
        "Portes et al., MosaicBERT (arXiv 2312.17482)",
        "GPT-2 with 2 layers of width 64 on bytes of Shakespeare, 300 steps; control: statistics in bfloat16 too",
        narrow_norms,
    ),
    Claim(
        "sixteen_bits",
        "mcu_fp16",
        "training wholly in 16 bits, without master weights and loss scaling, has the accuracy of float32",
        "Nadalini et al. (FGCS 2023)",
        "a perceptron with products of 576 terms on noisy patterns; control: small updates leave weights as they are",
        sixteen_bits,
    ),
)
