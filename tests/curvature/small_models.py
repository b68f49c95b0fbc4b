"""Small float64 models, each with an operation whose second derivative is error-prone, and the dense judge.

The judge is `torch.autograd.functional.hessian`, two reverse passes. `torch.func.hessian` cannot be the judge: it is
wrong for some of these models (``test_operators.py`` shows it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fpsim.curvature import functional_loss, layout

CLASSES, WIDTH, LENGTH = 5, 4, 6


class Attention(nn.Module):
    """Self-attention by scaled_dot_product_attention, with ``groups`` key heads for ``heads`` query heads."""

    def __init__(self, heads: int = 2, groups: int = 2, masked: bool = False) -> None:
        super().__init__()
        self.heads, self.groups, self.masked = heads, groups, masked
        each = WIDTH // heads
        self.query = nn.Linear(WIDTH, heads * each, bias=False)
        self.key = nn.Linear(WIDTH, groups * each, bias=False)
        self.value = nn.Linear(WIDTH, groups * each, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.query(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k, v = (m(x).view(batch, length, self.groups, -1).transpose(1, 2) for m in (self.key, self.value))
        padding = torch.arange(length) < length - 2 if self.masked else None
        mask = None if padding is None else padding.expand(batch, 1, length, length)
        attended = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.groups < self.heads
        )
        return x + attended.transpose(1, 2).reshape(batch, length, -1)


class Tied(nn.Module):
    """Embedding and output layer share a weight; the embedding may have a padding row."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH, padding_idx=padding)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.embed(tokens))))


class Tokens(nn.Module):
    """A function from tokens to logits over classes, with ``inner`` between embedding and output layer."""

    def __init__(self, inner: nn.Module, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH, padding_idx=padding)
        self.inner = inner
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(tokens)))


class ChannelsLast(nn.Module):
    """``inner``, which takes (batch, channels, length), as a module on (batch, length, channels)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class Case:
    """A model with its batch of tokens and targets, as functions of the parameters."""

    model: nn.Module
    batch: tuple[Tensor, Tensor]

    @property
    def params(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    @property
    def loss(self) -> Callable[..., Tensor]:
        return functional_loss(self.model, token_loss, batch=self.batch)


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gelu": lambda: Tokens(nn.Sequential(nn.Linear(WIDTH, 6), nn.GELU(), nn.Linear(6, WIDTH))),
    "layer norm": lambda: Tokens(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU())),
    "rms norm": lambda: Tokens(nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.SiLU())),
    "batch norm, training": lambda: Tokens(ChannelsLast(nn.BatchNorm1d(WIDTH))),
    "batch norm, evaluation": lambda: Tokens(ChannelsLast(nn.BatchNorm1d(WIDTH))).eval(),
    "group norm and convolution": lambda: Tokens(
        ChannelsLast(nn.Sequential(nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(2, WIDTH), nn.Tanh()))
    ),
    "tied": Tied,
    "attention": lambda: Tokens(Attention()),
    "grouped attention": lambda: Tokens(Attention(heads=2, groups=1)),
    "attention over padding": lambda: Tokens(Attention(masked=True)),
    "padding row": lambda: Tokens(nn.Tanh(), padding=0),
    "padding row, tied": lambda: Tied(padding=0),
    "encoder layer": lambda: Tokens(nn.TransformerEncoderLayer(WIDTH, 2, 6, dropout=0.0, batch_first=True)),
}


def case(name: str, seed: int = 0) -> Case:
    """The model of that name with random weights; some tokens are padding, and some targets are ignored."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name]().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.5 * torch.randn_like(parameter) + (0.5 if parameter.ndim == 1 else 0.0))
        tokens = torch.randint(0, CLASSES, (3, LENGTH))
        targets = torch.randint(0, CLASSES, (3, LENGTH))
    tokens[0, 0] = 0
    targets[0, 1] = targets[2, 3] = -100
    return Case(model, (tokens, targets))


def dense_hessian(loss: Callable[[Any], Tensor], params: Any) -> Tensor:
    """The judge: the Hessian over the flat vector of the parameters that vary, by two reverse passes of autograd."""
    arranged = layout(params)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(lambda v: loss(arranged.point(v)), arranged.join(arranged.values))


def relative(got: Tensor, want: Tensor) -> float:
    """The relative error of ``got``, in the Euclidean norm."""
    return float((got - want).norm() / want.norm())


def spectrum_matrix(values: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric float64 matrix with these eigenvalues, and eigenvectors from seeds that no start vector has."""
    generator = torch.Generator().manual_seed(1000 + seed)
    basis, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64, generator=generator))
    matrix = basis @ torch.diag(values.double()) @ basis.T
    return (matrix + matrix.T) / 2


def network_spectrum(size: int = 400, seed: int = 0) -> Tensor:
    """Eigenvalues as networks have: most near zero, some negative, a few large; ascending, float64."""
    generator = torch.Generator().manual_seed(seed)
    bulk = 0.5 * torch.randn(size - 25, generator=generator, dtype=torch.float64) ** 2
    negative = -1.36 * torch.rand(20, generator=generator, dtype=torch.float64)
    top = torch.tensor([11.37, 10.91, 8.0, 6.0, 5.0], dtype=torch.float64)
    return torch.cat([negative, bulk, top]).sort().values
