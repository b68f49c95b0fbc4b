"""Claims about rounding after training: sorted keys without a model, and a small trained Llama that is rounded.

The Llama is that of `training`, trained in float32. Two channels behind each of its norms are then made 30 times
larger, and the weights that read them 30 times smaller: the model computes the same, and has outlier channels. Losses
are means over held-out text, nats per token.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

import fpsim
from fpsim.posttraining import linear_layers
from fpsim.recipes import Recipe, comet, k_sort, zeroquant_fp

from ..data import Data, batches, load, validation_batches
from ..generation import train
from ..models import mean_cross_entropy
from .arithmetic import relative_error, signal_to_noise
from .claim import Claim
from .training import BASE

#: The channels that become outliers, and by how much.
OUTLIERS, FACTOR = (5, 40), 30.0


def sorted_keys(seed: int) -> Mapping[str, float]:
    """Decibels that sorting the channels of keys gains in their products with queries, by length of blocks.

    Keys of 128 channels are Gaussian. Four channels, one in each quarter of the head, are 10 times the others.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(256, 128, generator=generator).double() for _ in range(2))
    plain = key.clone()
    key[:, torch.randint(32, (4,), generator=generator) + torch.arange(0, 128, 32)] *= 10

    def gain(key: Tensor, block: int) -> float:
        part: Any = k_sort(block=block).preparation
        order = key.square().sum(0).argsort(descending=True)

        def ratio(order: Tensor) -> float:
            rounded = fpsim.round(query[:, order], part.query) @ fpsim.round(key[:, order], part.key).T
            return signal_to_noise(query @ key.T, rounded)

        return ratio(order) - ratio(torch.arange(128))

    return {
        "gain_128": abs(gain(key, 128)),
        "gain_64": gain(key, 64),
        "gain_32": gain(key, 32),
        "gain_64_without_outliers": gain(plain, 64),
    }


@lru_cache(maxsize=8)
def _trained(seed: int) -> tuple[nn.Module, Data]:
    """The trained network with outlier channels, and its data."""
    config = replace(BASE, seed=seed)
    data = load(config.data, context=config.model.context)
    network: Any = train(config, data).eval().network
    network.config.use_cache = False
    with torch.no_grad():
        for block in network.model.layers:
            attention, mlp = block.self_attn, block.mlp
            readers = {
                block.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
                block.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
            }
            for norm, layers in readers.items():
                norm.weight[list(OUTLIERS)] *= FACTOR
                for layer in layers:
                    layer.weight[:, list(OUTLIERS)] /= FACTOR
    return network, data


def _rounded(recipe: Recipe, seed: int) -> nn.Module:
    """The trained network under a recipe, calibrated on 8 batches of training text."""
    network, data = _trained(seed)
    found = batches(data.train, batch=8, context=BASE.model.context, seed=seed)
    calibration = [inputs for inputs, _ in islice(found, 8)]
    return recipe.apply(copy.deepcopy(network), batches=calibration, backend="fpsim_eager")[0]


def _loss(network: nn.Module, seed: int) -> float:
    held_out = validation_batches(_trained(seed)[1].validation, batch=16, context=BASE.model.context, count=16)
    with torch.no_grad():
        losses = [mean_cross_entropy(network(inputs).logits, targets) for inputs, targets in held_out]
    return float(torch.stack(losses).mean())


def _group(**options: Any) -> Recipe:
    """ZeroQuant-FP in groups of 32, without constraints and compensation unless they are named."""
    return zeroquant_fp(**{"group": 32, "constraint": None, "rank": 0, **options})


def float_activations(seed: int) -> Mapping[str, float]:
    """The loss with INT8 activations, minus that with E4M3, and minus that with unrounded ones."""
    fp8, int8, exact = (_loss(_rounded(_group(activation=name), seed), seed) for name in ("e4m3fn", "int8", None))
    return {"int8_minus_fp8": int8 - fp8, "int8_gap": int8 - exact}


def low_rank(seed: int) -> Mapping[str, float]:
    """What compensation of rank 8 gains: the error of the weights, and the loss."""
    plain, compensated = (_rounded(_group(rank=rank), seed) for rank in (0, 8))
    exact = linear_layers(_trained(seed)[0], "lm_head")

    def error(network: nn.Module) -> float:
        pairs = zip(exact.values(), linear_layers(network, "*lm_head").values(), strict=True)
        return sum(relative_error(a.matrix, b.matrix) for a, b in pairs) / len(exact)

    before, after = _loss(plain, seed), _loss(compensated, seed)
    return {
        "error_ratio": error(compensated) / error(plain),
        "loss_gain": before - after,
        "loss_of_rounding": before - _loss(_trained(seed)[0], seed),
    }


def constraints(seed: int) -> Mapping[str, float]:
    """Differences of losses between constraints of the scales, and between formats of the weights."""
    m1, m2, up, free = (_loss(_rounded(_group(constraint=name), seed), seed) for name in ("m1", "m2", "m2_up", None))
    e3m0 = _loss(_rounded(_group(weight="e3m0finite"), seed), seed)
    return {"m1_minus_m2": m1 - m2, "m1_minus_m2_up": m1 - up, "m1_gap": m1 - free, "e3m0_minus_e2m1": e3m0 - free}


def outlier_blocks(seed: int) -> Mapping[str, float]:
    """Errors of the logits over that of W4A8: W4A4 with outlier channels in INT8 blocks of 8, and W4A4 alone."""
    network, data = _trained(seed)
    (inputs, _), *_ = validation_batches(data.validation, batch=16, context=BASE.model.context, count=1)

    def plain(bits: int) -> Recipe:
        fprop = {"activation": f"int{bits}/block:8", "weight": "int4/block:8"}
        policy = fpsim.Policy(fprop=fprop, products="weights", attention="keep", skip="lm_head")
        return Recipe(f"W4A{bits}", "control", policy)

    with torch.no_grad():
        exact = network(inputs).logits
        recipes = {"eight": plain(8), "four_bits": plain(4), "mixed": comet(block=8, ratio=8, key_value=None)}
        errors = {
            name: relative_error(exact, _rounded(recipe, seed)(inputs).logits) for name, recipe in recipes.items()
        }
    return {name: error / errors["eight"] for name, error in errors.items()}


_BED = (
    "Llama with 2 layers of width 64, trained for 300 steps on bytes of Shakespeare, two channels of 64 made 30 times "
    "larger; groups of 32 weights; loss on held-out text"
)

CLAIMS = (
    Claim(
        "sorted_keys",
        "k_sort",
        "sorted channels lower the error of 4-bit keys in blocks of 64 and 32, and not in blocks of the whole head",
        "K-sort (arXiv 2403.20137)",
        "256 Gaussian keys and queries of 128 channels, four of them 10 times larger; control: no outlier",
        sorted_keys,
    ),
    Claim(
        "float_activations",
        "zeroquant_fp",
        "FP8 activations are better than INT8 ones, with FP4 weights",
        "ZeroQuant-FP (arXiv 2307.09782), section 3",
        f"{_BED}; control: INT8 activations lose against unrounded ones",
        float_activations,
    ),
    Claim(
        "low_rank_compensation",
        "zeroquant_fp",
        "low-rank compensation lowers the error of FP4 weights and the loss",
        "ZeroQuant-FP (arXiv 2307.09782), section 3",
        f"{_BED}; rank 8 in INT8; control: rounding costs loss",
        low_rank,
    ),
    Claim(
        "power_of_two_ratios",
        "zeroquant_fp",
        "power-of-two ratios (M2) are not worse than power-of-two scales (M1), and E2M1 is better than E3M0",
        "ZeroQuant-FP (arXiv 2307.09782), section 3",
        f"{_BED}; control: M1 loses against scales in float32",
        constraints,
    ),
    Claim(
        "outlier_blocks",
        "comet",
        "outlier channels in a few INT8 blocks bring W4A4 near W4A8",
        "COMET (arXiv 2410.12168), section 3",
        f"{_BED.partition(';')[0]}; errors of the logits, 12.5 % of the channels in INT8; control: W4A4 alone",
        outlier_blocks,
    ),
)
