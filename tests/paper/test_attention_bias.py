"""The one-sided errors of attention have the size that was found before, where it was found."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from fpsim.cli.main import app
from fpsim.paper import attention_bias
from fpsim.paper.attention_bias import Bias, attentions, markdown, sums

#: The mean error of the sum of P V, for 200,000 rows, from an independent computation: with other exponentials of 0,
#: with small ones, and with the cure. Its standard error is .0008.
KNOWN = {
    2: (-0.0003, -0.079, -0.006),
    3: (0.0004, -0.047, -0.007),
    4: (0.001, -0.041, 0.009),
    8: (0.0001, -0.024, 0.0007),
}
ROWS = 20_000


def cells(found: list[Bias], quantity: str) -> dict[tuple[int, str, str], Bias]:
    return {(each.repeated, each.rest, each.rounding): each for each in found if each.quantity == quantity}


def test_the_remainder_breaks_ties_to_one_side_and_the_cure_makes_them_fair() -> None:
    found = cells(sums(rows=ROWS), "sum of P V")
    assert len(found) == 5 * 2 * 4
    for r, (alone, with_remainder, _) in KNOWN.items():
        for rest, known in (("zero", alone), ("small", with_remainder)):
            bias = found[r, rest, "nearest"]
            assert abs(bias.mean - known) < 4 * bias.error + 4 * 0.0008
        biased = found[r, "small", "nearest"]
        assert biased.mean < -5 * biased.error
        cured = found[r, "small", "nearest, cured"]
        assert abs(cured.mean) < 0.01 and abs(cured.mean) < 4 * cured.error
        assert found[r, "small", "truncated"].mean > 0.4
    assert all(abs(bias.mean) <= 4 * bias.error for bias in found.values() if bias.rounding == "stochastic")


def test_one_maximum_loses_the_whole_remainder_and_the_cure_changes_nothing() -> None:
    found = cells(sums(rows=ROWS, repeated=[1]), "sum of P V")
    for name in ("nearest", "nearest, cured", "truncated"):
        assert found[1, "zero", name].mean == 0 and abs(found[1, "small", name].mean - 0.35) < 0.01


def test_the_error_of_whole_attention_enters_delta() -> None:
    found = attentions(rows=500, repeated=[2])
    for quantity in ("O", "delta"):
        own = cells(found, quantity)
        assert own[2, "small", "accumulator"].mean < -0.05
        assert own[2, "small", "all_bf16"].mean < -0.15
        for name in ("accumulator, cured", "accumulator, stochastic", "flash2_bf16"):
            assert abs(own[2, "small", name].mean) < 5 * own[2, "small", name].error
        assert own[2, "small", "accumulator, truncated"].mean > 0.3
        assert abs(own[2, "zero", "accumulator"].mean) < 4 * own[2, "zero", "accumulator"].error


def test_the_command_writes_tables_and_a_figure(tmp_path: Path, monkeypatch) -> None:
    few = sums(rows=100, repeated=[1, 2]), attentions(rows=4, repeated=[1, 2])
    monkeypatch.setattr(attention_bias, "sums", lambda seed: few[0])
    monkeypatch.setattr(attention_bias, "attentions", lambda seed: few[1])
    shown = CliRunner().invoke(app, ["study", "attention", "--out", str(tmp_path)])
    assert shown.exit_code == 0 and (tmp_path / "attention.png").stat().st_size > 10_000
    assert (tmp_path / "attention.md").read_text() == markdown([*few[0], *few[1]])
    lines = markdown([Bias(2, "zero", "nearest", "O", 0.25, 0.01), Bias(2, "small", "nearest", "O", -0.5, 0.02)])
    assert "| repeated maxima | nearest |\n|---|---|\n| 2 | 0.2500 ± 0.0100 |" in lines and "-0.5000 ± 0.0200" in lines
