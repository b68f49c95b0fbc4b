"""Parts of recipes: changes of a model after training, by calls of `fpsim.posttraining`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fpsim.posttraining import (
    power_of_two_ratios,
    power_of_two_scales,
    round_attention,
    round_layers,
    round_weights,
    sort_key_channels,
    split_outlier_channels,
)
from fpsim.posttraining.key_value_casts import Along
from fpsim.posttraining.weights import Method
from fpsim.recipes.exclusions import Exclusions

#: The constraints of ratios: ZeroQuant-FP's M1 and M2, and M2 with ratios that are rounded up.
CONSTRAINTS = ("m1", "m2", "m2_up")


@dataclass(frozen=True)
class RoundedWeights:
    """The weights of linear layers, rounded once by `fpsim.posttraining.round_weights`.

    Attributes:
        format: the cast of the weights.
        method, damping, block, sequential, rank, factors, as_product: the arguments of `round_weights`.
        activation_order: whether columns are rounded by descending diagonal of the Hessian.
        constraint: None, or one of `CONSTRAINTS`.
        rows: the rows in a compute block of M2; None means all.
        head: whether the output layer stays as it is.
        skip: globs of more modules that stay.
    """

    format: str
    method: Method = "gptq"
    damping: float = 0.01
    block: int = 128
    sequential: bool = True
    rank: int = 0
    factors: str | None = None
    as_product: bool = False
    activation_order: bool = False
    constraint: str | None = None
    rows: int | None = None
    head: bool = True
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.constraint not in (None, *CONSTRAINTS):
            raise ValueError(f"unknown constraint {self.constraint!r}: use one of {', '.join(CONSTRAINTS)}, or None")
        if self.rows is not None and self.constraint in (None, "m1"):
            raise ValueError(
                f"rows={self.rows} is about the compute block of M2: leave it out, or give constraint='m2'"
            )

    def apply(self, model: torch.nn.Module, batches: Iterable[Any] | None) -> torch.nn.Module:
        """Round the weights of ``model`` in place; GPTQ needs ``batches``.

        Raises: the errors of `fpsim.posttraining.round_weights`.
        """
        round_weights(
            model,
            self.format,
            batches,
            method=self.method,
            skip=_kept(model, self.head, self.skip),
            damping=self.damping,
            block=self.block,
            order="activation" if self.activation_order else "given",
            constraint=_constraint(self.constraint, self.rows),
            sequential=self.sequential,
            rank=self.rank,
            factors=self.factors,
            as_product=self.as_product,
        )
        return model

    def __str__(self) -> str:
        how = f"by GPTQ, damping {self.damping}" if self.method == "gptq" else "to the nearest values"
        texts = [f"weights {self.format} {how}"]
        texts += [f"ratios {self.constraint.upper()}"] if self.constraint else []
        place = "beside" if self.as_product else "added to"
        texts += [f"product of rank {self.rank} in {self.factors or 'full precision'} {place} them"] * bool(self.rank)
        return "; ".join(texts) + _stays(self.head, self.skip)


@dataclass(frozen=True)
class RoundedAttention:
    """Queries, keys and values, rounded when attention reads them (`fpsim.posttraining.round_attention`).

    Attributes:
        query, key, value: the format of each, or None.
        along: the axis of the scales of keys and values, ``head_dim`` or ``tokens``.
        sort_keys: whether the channels of keys are sorted before (`fpsim.posttraining.sort_key_channels`).
    """

    query: str | None = None
    key: str | None = None
    value: str | None = None
    along: Along = "head_dim"
    sort_keys: bool = False

    def apply(self, model: torch.nn.Module, batches: Iterable[Any] | None) -> torch.nn.Module:
        """Change the attention of ``model``, a model of transformers, in place; ``batches`` are not used.

        Raises: the errors of `fpsim.posttraining.round_attention` and `sort_key_channels`.
        """
        if self.sort_keys:
            sort_key_channels(model)
        round_attention(model, self.query, self.key, self.value, along=self.along)
        return model

    def __str__(self) -> str:
        sorted_ = ", channels sorted" if self.sort_keys else ""
        casts = [("queries", self.query, ""), ("keys", self.key, sorted_), ("values", self.value, "")]
        texts = [f"{name} {cast}{more}" for name, cast, more in casts if cast is not None]
        return "; ".join(texts) + f" (along {self.along})"


@dataclass(frozen=True)
class SplitChannels:
    """Linear layers split into parts ``outliers`` and ``others`` (`fpsim.posttraining.split_outlier_channels`).

    Attributes:
        ratio, block, most: the arguments of `split_outlier_channels`.
        key, value: the formats of keys and values, or None.
        along: the axis of their scales, ``head_dim`` or ``tokens``.
        head: whether the output layer stays as it is.
        skip: globs of more modules that stay.
    """

    ratio: float = 6.0
    block: int = 128
    most: float = 0.2
    key: str | None = None
    value: str | None = None
    along: Along = "tokens"
    head: bool = True
    skip: tuple[str, ...] = ()

    def apply(self, model: torch.nn.Module, batches: Iterable[Any] | None) -> torch.nn.Module:
        """Split the layers of ``model`` in place by the magnitudes of their inputs in ``batches``.

        Raises: the errors of `fpsim.posttraining.split_outlier_channels` and `round_attention`.
        """
        if batches is None:
            raise ValueError("outlier channels are found in batches: give batches=...")
        skip = _kept(model, self.head, self.skip)
        split_outlier_channels(model, batches, ratio=self.ratio, block=self.block, most=self.most, skip=skip)
        if self.key is not None or self.value is not None:
            round_attention(model, None, self.key, self.value, along=self.along)
        return model

    def __str__(self) -> str:
        text = (
            f"channels above {self.ratio:g} times the median, in blocks of {self.block} and up to {self.most:.0%} of "
            "all, are a layer 'outliers'"
        )
        stored = [f"{name} {cast}" for name, cast in (("keys", self.key), ("values", self.value)) if cast is not None]
        return "; ".join([text, *stored]) + (f" (along {self.along})" * bool(stored)) + _stays(self.head, self.skip)


@dataclass(frozen=True)
class CalibratedLayers:
    """Layers that multiply rounded weights and inputs of calibrated range (`fpsim.posttraining.round_layers`).

    Attributes:
        weight, activation, fold: the arguments of `round_layers`.
        skip: globs of the paths of layers that stay.
    """

    weight: str = "int8"
    activation: str = "int8"
    fold: bool = True
    skip: tuple[str, ...] = ()

    def apply(self, model: torch.nn.Module, batches: Iterable[Any] | None) -> torch.nn.Module:
        """Change the layers of ``model`` in place; their ranges come from ``batches``.

        Raises: the errors of `fpsim.posttraining.round_layers`.
        """
        if batches is None:
            raise ValueError("the ranges of activations are calibrated with batches: give batches=...")
        round_layers(model, batches, weight=self.weight, activation=self.activation, skip=self.skip, fold=self.fold)
        return model

    def __str__(self) -> str:
        fold = "; batch normalizations folded" if self.fold else ""
        return (
            f"weights {self.weight}, a scale per output channel; activations {self.activation}, one calibrated ratio "
            f"per tensor; derivatives straight through{fold}{_stays(False, self.skip)}"
        )


def _kept(model: torch.nn.Module, head: bool, skip: tuple[str, ...]) -> list[str]:
    return Exclusions(head=head, modules=skip).paths(model)


def _stays(head: bool, skip: tuple[str, ...]) -> str:
    kept = ["head"] * head + list(skip)
    return f"; {', '.join(kept)} unrounded" if kept else ""


def _constraint(name: str | None, rows: int | None) -> Any:
    if name in (None, "m1"):
        return None if name is None else power_of_two_scales
    return partial(power_of_two_ratios, rows=rows, up=name == "m2_up")
