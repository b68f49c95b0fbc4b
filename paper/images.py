"""A small residual network and synthetic images for it: the image counterpart of the study's language models.

Nothing is downloaded. An image shows the pattern of its class, shifted and scaled at random, under noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Classes, channels and the side of an image.
CLASSES, CHANNELS, SIDE = 10, 3, 16
#: The seed of the ten patterns, which are the same for all runs.
_PATTERNS = 20_240_518


@dataclass(frozen=True)
class ImageTask:
    """Images of ten classes.

    Attributes:
        noise: standard deviation of the noise; the patterns have one of 1.
        shift: the largest shift along both sides, in pixels; images wrap around.
    """

    noise: float = 2.0
    shift: int = 3

    def batch(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images, float32, shape (count, 3, 16, 16), and their classes, int64, shape (count,)."""
        coarse = torch.randn(CLASSES, CHANNELS, 4, 4, generator=torch.Generator().manual_seed(_PATTERNS))
        patterns = functional.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        patterns = patterns / patterns.std(dim=(1, 2, 3), keepdim=True)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        shifts = torch.randint(-self.shift, self.shift + 1, (2, count), generator=generator)
        rows, columns = ((torch.arange(SIDE) - shift[:, None]) % SIDE for shift in shifts)
        gains = 0.5 + torch.rand(count, 1, 1, 1, generator=generator)
        images = patterns[labels[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
        noise = torch.randn(count, CHANNELS, SIDE, SIDE, generator=generator)
        return gains * images + self.noise * noise, labels


class Residual(nn.Module):
    """Two convolutions of 3 x 3 with batch norm and a shortcut (He et al., arXiv 1512.03385).

    The shortcut takes every second pixel before its convolution of 1 x 1, as a stride of 2 would. With the stride,
    torch 2.13 on AVX2 writes a gradient outside of its memory if there are 4 channels and Inductor puts them last.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, inputs, side, side) to (batch, outputs, side / stride, side / stride)."""
        inner = functional.relu(self.first_norm(self.first(x)))
        kept = x[:, :, :: self.stride, :: self.stride]
        return functional.relu(self.second_norm(self.second(inner)) + self.shortcut(kept))


class ResNet8(nn.Module):
    """Eight layers: a convolution, three residual blocks of widths w, 2w and 4w, and a linear layer.

    Args:
        width: w.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Images, shape (batch, 3, 16, 16), to logits, shape (batch, 10)."""
        features = self.blocks(functional.relu(self.norm(self.stem(images))))
        return self.head(features.mean(dim=(2, 3)))


class Classifier(nn.Module):
    """``network`` as a function from images and classes to the loss in nats and the logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The mean cross-entropy, and the logits."""
        logits = self.network(images)
        return functional.cross_entropy(logits, labels), logits
