"""Texts of rounded models: how they are drawn, measured and compared."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import fpsim
from fpsim.cli.main import app
from fpsim.paper import generation
from fpsim.paper.generation import Quality, Sampling, Size, differences, distinct_share, generate, measure, rounded
from fpsim.paper.models import LanguageModel, build

VOCABULARY = 7


class Chain(nn.Module):
    """The logits of the next token depend on the last one alone: row ``t`` of a fixed table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)) * 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens]


def test_tokens_are_drawn_with_their_probabilities_among_the_top_k() -> None:
    model = LanguageModel(Chain())
    prompts = torch.zeros(20_000, 1, dtype=torch.long)
    sampling = Sampling(temperature=0.7, top_k=3, length=1)
    drawn = Counter(generate(model, prompts, sampling, context=4, seed=5)[:, 0].tolist())
    scores = {token: math.exp(value / 0.7) for token, value in enumerate(model.network.table[0].tolist())}
    best = sorted(scores, key=lambda token: -scores[token])[:3]
    assert set(drawn) == set(best)
    total = sum(scores[token] for token in best)
    for token in best:
        share = scores[token] / total
        assert abs(drawn[token] / 20_000 - share) < 5 * math.sqrt(share * (1 - share) / 20_000)


def test_the_judge_gives_the_mean_negative_log_probability() -> None:
    judge = LanguageModel(Chain())
    texts, prompts = torch.tensor([[1, 2, 2], [3, 0, 6]]), torch.tensor([[5], [4]])
    logs = torch.log_softmax(judge.network.table.detach().double(), 1)
    steps = [(5, 1), (1, 2), (2, 2), (4, 3), (3, 0), (0, 6)]
    expected = -sum(float(logs[pair]) for pair in steps) / 6
    found = measure(texts, prompts, judge, 2, frozenset())
    assert found["judged_loss"] == pytest.approx(expected, rel=1e-6)
    assert found["distinct"] != found["distinct"]  # three tokens hold no sequence of four


def test_words_and_sequences_are_counted() -> None:
    text = list(b"x the the zzz the y")
    known = measure(torch.tensor([text]), torch.tensor([[0]]), LanguageModel(Wide()), 2, frozenset({"the"}))
    assert known["known_words"] == pytest.approx(3 / 4)
    assert distinct_share([1, 2, 1, 2, 1, 2], 2) == pytest.approx(2 / 5)


class Wide(nn.Module):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, 256)


def test_only_linear_weights_beside_the_head_are_rounded() -> None:
    network = nn.ModuleDict({"embed": nn.Embedding(8, 64), "inner": nn.Linear(64, 4), "lm_head": nn.Linear(64, 8)})
    model = LanguageModel(nn.Sequential())
    model.network = network
    copied = rounded(model, "nf4/group:64")
    expected = fpsim.round(network["inner"].weight.detach(), "nf4/group:64")
    assert torch.equal(copied.network["inner"].weight, expected)
    for name in ("embed.weight", "inner.bias", "lm_head.weight"):
        assert torch.equal(copied.network.get_parameter(name), network.get_parameter(name))
    assert rounded(model, None) is not model


def test_differences_are_paired_by_seed() -> None:
    qualities = [
        Quality(name, seed, Sampling(), 0.0, loss, 1.0, 1.0)
        for name, losses in (("fp32", (2.0, 5.0, 8.0)), ("nf4", (2.1, 5.2, 8.3)))
        for seed, loss in enumerate(losses)
    ]
    ((mean, half),) = differences(qualities, "nf4", "judged_loss").values()
    assert mean == pytest.approx(0.2)
    assert half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)  # Student, two degrees of freedom


def test_the_study_writes_in_every_format_and_setting(tmp_path, monkeypatch, config) -> None:
    size = Size(replace(config, steps=1, backend="interpreted"), seeds=1, texts=2)
    monkeypatch.setattr(generation, "SAMPLINGS", (Sampling(length=3), Sampling(temperature=1.0, length=3)))
    lines: list[str] = []
    qualities = generation.study(size, ["fp32", "fp4"], tmp_path, tell=lines.append)
    assert lines == [
        "training the model of seed 0",
        "training the judge of seed 1",
        "seed 0: texts of the weights in fp32",
        "seed 0: texts of the weights in fp4",
    ]
    assert [(each.format, each.sampling.temperature) for each in qualities] == [
        (name, temperature) for name in ("fp32", "fp4") for temperature in (0.8, 1.0)
    ]
    assert qualities[0].loss != qualities[2].loss
    monkeypatch.setattr(generation, "train", None)  # a second call computes nothing
    assert repr(generation.study(size, ["fp32", "fp4"], tmp_path)) == repr(qualities)  # some are NaN
    assert generation.markdown(qualities).count("\n| fp4 |") == 2
    monkeypatch.setattr(generation, "train", lambda config, data: LanguageModel(build(config.model, seed=config.seed)))
    more = generation.study(replace(size, seeds=2), ["fp32"], tmp_path)  # another judge: seed 0 is judged again
    assert [(each.format, each.seed) for each in more] == [("fp32", seed) for seed in (0, 0, 1, 1)]
    assert more[0].judged_loss != qualities[0].judged_loss
    with pytest.raises(ValueError, match="unknown format 'fp5'"):
        generation.study(size, ["fp5"], tmp_path)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        Sampling(temperature=0.0)


def test_the_command_says_what_it_does_and_writes_a_table_and_a_figure(tmp_path, monkeypatch, config) -> None:
    size = Size(replace(config, steps=1, backend="interpreted"), seeds=1, texts=2)
    monkeypatch.setattr(generation, "SIZES", {"quick": size})
    monkeypatch.setattr(generation, "SAMPLINGS", (Sampling(length=3),))
    run = CliRunner().invoke(app, ["study", "generation", "--formats", "fp4", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert "training the judge of seed 1\nseed 0: texts of the weights in fp32\n" in run.output
    assert (tmp_path / "generation.png").stat().st_size > 5000
    assert (tmp_path / "generation.md").read_text().count("\n| fp4 |") == 1
