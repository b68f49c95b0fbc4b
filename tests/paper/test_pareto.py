"""The curve of loss against cost: its images, its costs and its frontier."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

from fpsim.cli.main import app
from fpsim.paper import pareto
from fpsim.paper.images import CLASSES, ImageTask, Residual, ResNet8
from fpsim.paper.models import ModelConfig, build
from fpsim.paper.pareto import Mean, Point, Size, frontier, markdown, means, multiply_adds

TINY = Size({"resnet": (2,), "llama": (8,)}, seeds=1, steps=2)


def test_an_image_without_noise_is_a_shifted_and_scaled_pattern_of_its_class() -> None:
    generator = torch.Generator().manual_seed(3)
    images, labels = ImageTask(noise=0.0).batch(40, generator)
    assert images.shape == (40, 3, 16, 16)
    patterns, seen = ImageTask(noise=0.0, shift=0).batch(200, generator)
    by_class = {int(label): pattern for pattern, label in zip(patterns, seen, strict=True)}
    assert len(by_class) == CLASSES
    for image, label in zip(images, labels, strict=True):
        pattern = by_class[int(label)]
        pattern = pattern / pattern.norm()
        shifts = [(i, j) for i in range(-3, 4) for j in range(-3, 4)]
        errors = [(image / image.norm() - pattern.roll(shift, (1, 2))).norm() for shift in shifts]
        assert min(errors) < 1e-5


def test_multiply_adds_are_those_of_the_layers() -> None:
    w, area = 4, 256
    stem = 3 * w * 9 * area
    blocks = 2 * w * w * 9 * area
    blocks += (w * 2 * w + 2 * w * 2 * w) * 9 * area // 4 + w * 2 * w * area // 4
    blocks += (2 * w * 4 * w + 4 * w * 4 * w) * 9 * area // 16 + 2 * w * 4 * w * area // 16
    assert multiply_adds(ResNet8(w), torch.zeros(1, 3, 16, 16)) == stem + blocks + 4 * w * 10
    config = ModelConfig(layers=1, hidden=8, heads=2, mlp=16, context=4, vocabulary=10)
    per_token = 4 * 8 * 8 + 3 * 8 * 16 + 8 * 10
    attention = 2 * 4 * 8  # per token: queries with 4 keys, and weights with 4 values, over both heads
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert multiply_adds(build(config, seed=0), tokens) == 4 * (per_token + attention)


def test_the_frontier_is_what_nothing_dominates() -> None:
    generator = torch.Generator().manual_seed(0)
    costs, losses = torch.randint(20, (2, 60), generator=generator).tolist()
    found = [Mean("m", i, "f", loss, 0.0, cost) for i, (cost, loss) in enumerate(zip(costs, losses, strict=True))]
    found.append(Mean("m", 60, "f", math.nan, 0.0, -1.0))
    expected = {
        (each.cost, each.loss)
        for each in found[:-1]
        if not any(
            other.cost <= each.cost and other.loss <= each.loss and (other.cost, other.loss) != (each.cost, each.loss)
            for other in found[:-1]
        )
    }
    best = frontier(found)
    assert [(each.cost, each.loss) for each in best] == sorted(expected)


def test_a_shortcut_is_a_convolution_with_a_stride() -> None:
    block = Residual(2, 4, 2).double().eval()
    x = torch.randint(-4, 5, (3, 2, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        for convolution in (block.first, block.second, block.shortcut[0]):
            convolution.weight.copy_(torch.randint(-4, 5, convolution.weight.shape))
        inner = block.second_norm(block.second(functional.relu(block.first_norm(block.first(x)))))
        shortcut = block.shortcut[1](functional.conv2d(x, block.shortcut[0].weight, stride=2))
        assert torch.equal(block(x), functional.relu(inner + shortcut))


def test_means_are_over_seeds() -> None:
    points = [Point("resnet", 4, "int4", seed, 2, loss, 10.0, 40.0) for seed, loss in enumerate([1.0, 2.0, 3.0])]
    assert means(points) == [Mean("resnet", 4, "int4", 2.0, pytest.approx(1 / math.sqrt(3)), 40.0)]
    assert "| resnet | 4 | int4 | 40 | 2.000 ± 0.577 | yes |" in markdown(means(points))


def test_points_are_computed_once_and_only_rounded_formats_differ(tmp_path, monkeypatch) -> None:
    lines: list[str] = []
    (point,) = pareto.pareto(["llama"], ["int4"], TINY, tmp_path, interpret=True, tell=lines.append)
    assert lines == [f"run 1 of 1: llama of width {point.width}, int4, seed 0", f"  loss {point.loss:.3f}"]
    points = pareto.pareto(["resnet"], ["bf16", "int4"], TINY, tmp_path, interpret=True)
    assert [(each.family, each.format) for each in points] == [
        ("llama", "int4"),
        ("resnet", "bf16"),
        ("resnet", "int4"),
    ]
    assert all(math.isfinite(point.loss) for point in points)
    assert [point.cost / point.multiply_adds for point in points] == [4, 16, 4]
    monkeypatch.setattr(pareto, "_point", None)  # a second call computes none
    assert pareto.pareto(["resnet"], ["bf16", "int4"], TINY, tmp_path) == points
    monkeypatch.setattr(pareto, "_point", lambda *run: Point(*run[:5], 0.0, 1.0, 1.0))
    assert [each.steps for each in pareto.pareto(["llama"], ["int4"], replace(TINY, steps=3), tmp_path)] == [3]
    assert len(pareto.pareto(["llama"], ["int4"], replace(TINY, seeds=2), tmp_path)) == 4
    assert pareto.pareto(["llama"], ["int4"], TINY, tmp_path) == points  # neither other steps nor other seeds
    content = json.loads((tmp_path / "points.json").read_text())
    (tmp_path / "points.json").write_text(json.dumps({**content, "source": "another"}))
    with pytest.raises(ValueError, match="another version of fpsim: name another folder"):
        pareto.pareto(["resnet"], ["int4"], TINY, tmp_path)


def test_the_command_writes_a_table_and_a_figure(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pareto, "SIZES", {"quick": TINY})
    arguments = ["study", "pareto", "--families", "resnet", "--formats", "int4", "bf16", "--interpret"]
    run = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert "run 2 of 2: resnet of width 2, bf16, seed 0\n  loss " in run.output
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    assert (tmp_path / "pareto.md").read_text().count("\n| resnet") == 2
    run = CliRunner().invoke(app, ["study", "pareto", "--formats", "int5", "--out", str(tmp_path / "other")])
    assert run.exit_code == 2 and "unknown format 'int5'" in run.output
