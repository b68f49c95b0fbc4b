"""The scripts of docs/examples run at toy size and print the results of other arithmetic.

That of long sums is tested in ``tests/accumulators/test_long_sums.py``.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fpsim
from tests.documents.pages import ROOT


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def test_five_recipes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step: losses by hand, unrounded and in bfloat16. The table has means and standard errors."""
    example = script("five_recipes")
    monkeypatch.setattr(example, "RECIPES", ("amp_bf16", "te_current"))  # two of the five: each takes seconds
    losses = example.main(["--steps", "0", "--seeds", "2"])
    assert list(losses) == ["unrounded", *example.RECIPES]
    for name, cast in (("unrounded", torch.Tensor.float), ("amp_bf16", bf16)):
        for seed in range(2):
            torch.manual_seed(seed)
            model, total = example.Model(), 0.0
            for x, y in map(example.batch, range(1, 5)):
                features = cast(x)
                for layer in (model.first, *(block[0] for block in model.blocks), model.head):
                    result = cast(nn.functional.linear(cast(features), cast(layer.weight), layer.bias))
                    inner = layer in (block[0] for block in model.blocks)
                    features = features + result.relu() if inner else result
                total += nn.functional.cross_entropy(features, y).item()
            assert losses[name][seed] == pytest.approx(total / 4, abs=2e-6)
    assert losses["amp_bf16"] != losses["unrounded"]
    apart = np.subtract(losses["te_current"], losses["unrounded"])
    mean, error = apart.mean(), apart.std(ddof=1) / math.sqrt(2)
    assert f"te_current    {np.mean(losses['te_current']):.4f}  {mean:+.4f} +- {error:.4f}" in capsys.readouterr().out


def test_own_codebook() -> None:
    example = script("own_codebook")
    assert example.lloyd(torch.tensor([-1.0, -0.75, 0.25, 0.375, 0.5, 1.0]), 3).values == (-1.0, 0.375, 1.0)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(4, 64)
    found = example.main(model, x)
    assert list(found) == [(name, path) for name in ("int4", "nf4", "own") for path in ("0", "2")]
    for path in ("0", "2"):
        weight = model[int(path)].weight.detach().double()
        groups = weight.reshape(-1, 64)
        amax = groups.abs().amax(1, keepdim=True)
        values = torch.tensor(example.codebook_of(weight.float()).values, dtype=torch.float64)
        nearest = (groups / amax).unsqueeze(-1).sub(values).abs().argmin(-1)
        error = groups - values[nearest] * amax
        ratio = 10 * math.log10((groups.square().sum() / error.square().sum()).item())
        assert found["own", path][0] == pytest.approx(ratio, abs=1e-4)
        assert ratio > max(found["int4", path][0], found["nf4", path][0])
    inputs = x.double()
    exact = inputs @ model[0].weight.detach().double().T
    off = inputs @ fpsim.round(model[0].weight.detach(), "nf4/group:64").double().T - exact
    assert found["nf4", "0"][1] == pytest.approx((off.norm() / exact.norm()).item(), rel=1e-4)


def test_accumulator_width() -> None:
    """The width for one product, by sums of float64 numbers that numpy rounds to M bits after every addition."""
    example = script("accumulator_width")
    torch.manual_seed(0)
    layer = nn.Linear(64, 8)
    example.WIDTHS = range(7, 11)
    got = example.main(layer, 16)
    assert set(got) == {("", "fprop"), ("", "wgrad")}
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    a, b = (fpsim.round(each, "e4m3fn", scale="power_of_two").double().numpy() for each in (x, layer.weight.detach()))
    exact = a @ b.T
    rounding = np.linalg.norm(exact - x.double().numpy() @ layer.weight.detach().double().numpy().T)
    for width in example.WIDTHS:
        sums = np.zeros_like(exact)
        for k in range(64):
            significand, exponent = np.frexp(sums + np.outer(a[:, k], b[:, k]))
            sums = np.ldexp(np.rint(np.ldexp(significand, width + 1)), exponent - width - 1)
        if np.linalg.norm(sums - exact) < example.SHARE * rounding:
            break
    assert 7 < width < 10 and got["", "fprop"] == (width, width)  # promotion changes nothing in sums of 64
