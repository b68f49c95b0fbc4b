"""A claim about INT8 after training and in training: a small convolutional network on the images of `over_time`."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fpsim.recipes import int8_qat

from .claim import Claim
from .over_time import CLASSES, noisy_images

#: An image is a pattern of one channel.
SHAPE = (1, 8, 8)


def calibrated_integers(seed: int) -> Mapping[str, float]:
    """Accuracy that rounding to 8 and to 3 bits loses after training, and after further training with it.

    Three convolutions with batch normalization are trained in float32 for 400 steps. Then they are rounded with ranges
    from 8 batches. What is lost in training is lost against the network that trains on in float32, for 200 steps too.
    """
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1))
    blocks = [part for layer in layers for part in (layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())]
    trained = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, CLASSES))
    patterns = torch.randn(CLASSES, *SHAPE, generator=torch.Generator().manual_seed(seed))
    held_out = noisy_images(patterns, 4096, torch.Generator().manual_seed(seed + 1))
    _train(trained, patterns, seed, steps=400, rate=0.02)
    calibration = [noisy_images(patterns, 64, torch.Generator().manual_seed(seed + 2 + i))[0] for i in range(8)]

    def accuracies(model: nn.Module) -> tuple[float, float]:
        """Before and after further training."""
        before = _accuracy(model, *held_out)
        _train(model, patterns, seed + 10, steps=200, rate=0.002)
        return before, _accuracy(model, *held_out)

    def rounded(format: str) -> nn.Module:
        part = int8_qat(weight=format, activation=format).preparation
        assert part is not None
        return part.apply(copy.deepcopy(trained).eval(), calibration)

    exact, exact_longer = accuracies(copy.deepcopy(trained))
    after, in_training = accuracies(rounded("int8"))
    after_3_bits, in_training_3_bits = accuracies(rounded("int3"))
    return {
        "lost_after_training": exact - after,
        "lost_in_training": exact_longer - in_training,
        "regained_with_3_bits": in_training_3_bits - after_3_bits,
        "lost_with_3_bits": exact - after_3_bits,
    }


def _train(model: nn.Module, patterns: Tensor, seed: int, *, steps: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.train().parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        inputs, labels = noisy_images(patterns, 64, generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * float((model.eval()(inputs).argmax(-1) == labels).double().mean())


CLAIMS = (
    Claim(
        "calibrated_integers",
        "int8_qat",
        "INT8 with weights scaled per channel loses up to 2 % of accuracy after training and 1 % in training, which "
        "regains what fewer bits lose",
        "Krishnamoorthi (arXiv 1806.08342), sections 3.1 and 3.2",
        "three convolutions with batch normalization on noisy 8 x 8 patterns; control: 3 bits after training",
        calibrated_integers,
    ),
)
