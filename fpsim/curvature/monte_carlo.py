"""The Fisher matrix from sampled labels (Martens and Grosse 2015, section 5; Kunstner et al. 2019, section 2.2)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fpsim.curvature.data import Weight, fingerprint
from fpsim.curvature.linear import Operator
from fpsim.curvature.losses import CrossEntropy
from fpsim.curvature.operators import gauss_newton
from fpsim.curvature.products import Mode, OutputProduct
from fpsim.curvature.vectors import Params, Select


def monte_carlo_fisher(
    outputs: Callable[..., Tensor],
    loss: CrossEntropy | Literal["squared"],
    params: Params,
    *,
    samples: int = 1,
    seed: int = 0,
    batches: Iterable[Any] | None = None,
    weight: Weight = None,
    select: Select = None,
    mode: Mode = "reverse",
    keep: bool | None = None,
    vector_dtype: torch.dtype | None = None,
    vector_device: torch.device | str | None = None,
) -> Operator:
    """The Fisher matrix, where labels that the model itself draws stand for the expectation over labels.

    It is the mean of ``g g^T`` over tokens and samples, with g the gradient of a token's loss at a sampled label. Its
    expectation over seeds is the Fisher matrix, which for these losses is `gauss_newton`. Its variance falls with
    ``1 / samples``, and its rank is at most the number of tokens times ``samples``.

    Args:
        outputs, params, batches, weight, select, mode, keep, vector_dtype, vector_device: as for `gauss_newton`.
        loss: a `CrossEntropy` (labels are drawn from the softmax of the outputs, where the target counts), or
            ``"squared"`` (targets are the outputs plus standard normal noise).
        samples: how many labels are drawn for each token.
        seed: of the draws. They depend on the seed and the batch alone: each product has the same, and batches have
            different ones.

    Raises:
        TypeError: samples or seed is no int.
        ValueError: another loss, or no samples; and as `gauss_newton`.
        CurvatureError, FloatingPointError: as `gauss_newton`.
    """
    if not (isinstance(loss, CrossEntropy) or loss == "squared"):
        raise ValueError(f"labels are drawn for a CrossEntropy or 'squared', got {loss!r}: use gauss_newton")
    for name, number in (("samples", samples), ("seed", seed)):
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be an int, got {number!r}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    operator = gauss_newton(
        outputs,
        _Sampled(loss, samples, seed),
        params,
        batches=batches,
        weight=weight,
        select=select,
        mode=mode,
        keep=keep,
        vector_dtype=vector_dtype,
        vector_device=vector_device,
    )
    return replace(operator, name="Monte-Carlo Fisher")


@dataclass(frozen=True)
class _Sampled:
    """The loss with which `gauss_newton` gives the Monte-Carlo Fisher."""

    loss: CrossEntropy | Literal["squared"]
    samples: int
    seed: int

    def __call__(self, outputs: Tensor, batch: Any = None) -> Tensor:
        raise NotImplementedError("gauss_newton takes the product of this loss, and not its value")

    def output_product(self, batch: Any) -> OutputProduct:
        def at(outputs: Tensor) -> Callable[[Tensor], Tensor]:
            rows = outputs.detach().flatten(0, -2) if outputs.dim() > 1 else outputs.detach().unsqueeze(0)
            draw = generator_of(self.seed, batch)
            if isinstance(self.loss, CrossEntropy):
                counted = self.loss.counted(self.loss.targets_of(batch), outputs).reshape(-1)
                return self._of_labels(rows, counted, draw)
            noise = torch.randn(self.samples, *rows.shape, dtype=rows.dtype, generator=draw).to(rows.device)

            def product(tangent: Tensor) -> Tensor:
                u = tangent.reshape(rows.shape)
                return ((noise * u).sum(-1, keepdim=True) * noise).sum(0).div(len(rows) * self.samples).view_as(tangent)

            return product

        return at

    def _of_labels(self, rows: Tensor, counted: Tensor, draw: torch.Generator) -> Callable[[Tensor], Tensor]:
        """``u -> sum of d (d . u)`` over samples, for d = p - (1 at the label), divided by tokens and samples."""
        labels = draw_labels(rows, self.samples, draw)
        scale = counted.to(rows.dtype).unsqueeze(-1) / (counted.sum() * self.samples)

        def product(tangent: Tensor) -> Tensor:
            u, p = tangent.reshape(rows.shape), rows.softmax(-1)
            along = ((p * u).sum(-1, keepdim=True) - u.gather(-1, labels)) * scale
            return (p * along.sum(-1, keepdim=True)).scatter_add(-1, labels, -along).view_as(tangent)

        return product


def draw_labels(logits: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """Labels from the softmax of ``logits``, shape ``(tokens, classes)``: int64, shape ``(tokens, samples)``."""
    p = logits.double().softmax(-1).cpu()
    return torch.multinomial(p, samples, replacement=True, generator=generator).to(logits.device)


def generator_of(seed: int, batch: Any) -> torch.Generator:
    """A source of random numbers that depends on the seed and the batch alone."""
    text = repr((seed, fingerprint(batch)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
