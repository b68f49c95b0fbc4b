"""The report agrees with the runs, needs no other file, and opens in a browser without an error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fpsim.paper.comparison import pairs
from fpsim.paper.config import RunConfig, run_key, to_dict
from fpsim.paper.figures import heat_maps, loss_curves, loss_differences, sharpness_and_loss
from fpsim.paper.ranges import Examination, Misfit, Tried
from fpsim.paper.record import Record
from fpsim.paper.report import judge_sweep, report
from fpsim.paper.storage import to_parquet
from fpsim.paper.sweeps import read_sweep

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

STEPS = 400


def history(onset: int | None, level: float) -> list[Record]:
    """A run that falls to ``level`` and, from the step ``onset`` on, rises; its sharpness rises 30 steps earlier."""
    records, smoothed = [], 0.0
    for index in range(STEPS):
        ahead = max(0, index + 1 - onset) if onset else 0
        warning = max(0, index + 31 - onset) if onset else 0
        loss = level + 3 * np.exp(-index / 60) + min(0.05 * ahead, 3) + 0.01 * (-1) ** index
        smoothed += max(2 / 11, 1 / (index + 1)) * (loss - smoothed)
        measured = (index + 1) % 5 == 0
        records.append(
            Record(
                index + 1,
                loss,
                1.0 + 0.01 * ahead,
                1e-3,
                loss if index + 1 == STEPS else None,
                0.01,
                smoothed_loss=smoothed,
                sharpness_5e4=0.1 + 0.02 * warning if measured else None,
                sharpness_1e3=0.2 + 0.02 * warning if measured else None,
                max_abs_logit=10.0 if measured else None,
                saturated_gradient=0.25 if index + 1 == 100 else None,
            )
        )
    return records


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sweep as it is stored: two conditions, two rates, three seeds; of the twelve runs three diverge."""
    folder = tmp_path_factory.mktemp("sweep")
    plan = []
    for condition, options in (("high", None), ("low <b>", {"format": "e8m1"})):
        for rate in (0.01, 0.1):
            for seed in range(3):
                config = RunConfig(options=options, learning_rate=rate, seed=seed, steps=STEPS, warmup=10)
                onset = 200 + 20 * seed if options and rate == 0.1 else None
                key = run_key(config)
                plan.append({"key": key, "condition": condition, "config": to_dict(config)})
                facts = {"key": key, "config": to_dict(config), "git": "0" * 40, "packages": {"torch": "2.13.0"}}
                if options:
                    misfit = Misfit("head", "weight", "underflows", (seed + 1) / 4)
                    tried = (Tried("power-of-two scales", (misfit,)), Tried("head unrounded", ()))
                    facts["ranges"] = Examination((misfit,), tried).to_dict()
                (folder / "runs").mkdir(exist_ok=True)
                (folder / "runs" / f"{key}.parquet").write_bytes(to_parquet(history(onset, 2.0 + 0.1 * seed), facts))
    experiment = {"reference": "high", "pairs": [["low <b>", "high"]], "question": "Why?", "claim": "", "differs": ""}
    start = {"time": "2026-11-22 12:00:00 +0000", "command": "fpsim study experiment 1"}
    content = {"title": "A title & more", "plan": plan, "starts": [start], "experiment": experiment}
    (folder / "sweep.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Path:
    return report(folder)


def numbers(folder: Path) -> dict[str, list[dict[str, str]]]:
    return json.loads((folder / "outcomes.json").read_text())


def test_conditions_are_counted(folder, page):
    high, low = numbers(folder)["Conditions"]
    assert high == {
        "condition": "high",
        "diverged": "0/6 [0.00, 0.46]",
        "undecided": "0",
        "spiked": "0/6 [0.00, 0.46]",
        "spikes per run": "0.00",
        "trained": "6/6 [0.54, 1.00]",
        "final loss": high["final loss"],
        "validation loss": high["validation loss"],
    }
    assert re.fullmatch(r"2\.1\d\d \[2\.0\d\d, 2\.2\d\d\]", high["final loss"])
    assert low["diverged"] == "3/6 [0.12, 0.88]"
    assert low["trained"] == "3/6 [0.12, 0.88]"


def test_the_comparison_is_fishers(folder, page):
    [row] = [row for row in numbers(folder)["Fisher's exact test"] if row["outcome"] == "diverged"]
    assert (row["first"], row["second"]) == ("3/6 [0.12, 0.88]", "0/6 [0.00, 0.46]")
    assert float(row["p, first more often"]) == pytest.approx(20 / 220, rel=1e-2)  # (6 choose 3) / (12 choose 3)


def test_signals_are_ranked_as_they_were_made(folder, page):
    found = {(row["signal"], row["score"]): row["AUC"] for row in numbers(folder)["Prediction"]}
    assert float(found["logit sharpness, ε = 5e-4", "value"].split()[0]) > 0.95
    assert found["max |z|", "value"].startswith("0.500")
    leads = {row["signal"]: row for row in numbers(folder)["Who warns first"]}
    assert leads["logit sharpness, ε = 5e-4"]["diverging runs warned"].startswith("3/3")
    assert 30 <= float(leads["logit sharpness, ε = 5e-4"]["lead"]) <= 50
    assert leads["max |z|"]["diverging runs warned"].startswith("0/3")


def test_what_does_not_fit_is_named_with_the_cheapest_fix_in_the_worst_run(folder, page):
    [row] = numbers(folder)["What does not fit, and the cheapest fix"]
    assert row == {
        "condition": "low <b>",
        "what does not fit": "weights of head underflow (75 %)",
        "cheapest fix found": "head unrounded",
        "evidence": "power-of-two scales: 1 left, the worst: weights of head underflow (75 %); "
        "head unrounded: none left",
    }


def test_ranges_are_shown_where_they_were_counted(folder, page):
    rows = numbers(folder)["Ranges"]
    assert {row["saturated, gradient"] for row in rows} == {"25 %"}
    assert {row["underflowed, weight"] for row in rows} == {"-"}


class Sources(HTMLParser):
    """What a page would load, and its visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_page_needs_nothing_beside_it_and_says_everything(page):
    parsed = Sources()
    parsed.feed(page.read_text())
    assert len(parsed.loads) == 7
    assert all(source.startswith("data:image/png;base64,") for source in parsed.loads)
    for text in ("A title & more", "low <b>", "Why?", "[diverged]", "fpsim study experiment 1", "0" * 40):
        assert text in parsed.text
    assert "<b>" not in page.read_text().replace("low &lt;b&gt;", "")


def test_the_figures_are_files_too_and_not_blank(folder, page):
    image = pytest.importorskip("matplotlib.image")
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names == {
        "loss.png",
        "loss_differences.png",
        "heat_maps.png",
        "loss_by_rate.png",
        "sensitivity.png",
        "sharpness.png",
        "roc.png",
    }
    for name in names:
        pixels = image.imread(folder / "figures" / name)
        assert len(np.unique(pixels[..., :3] @ np.array([1.0, 1000.0, 1e6]))) > 50


@pytest.mark.parametrize("draw", [loss_curves, sharpness_and_loss])
def test_a_legend_of_many_conditions_is_shown_whole(folder, draw):
    runs, _ = read_sweep(folder)
    many = [replace(run, condition=f"condition {number}") for number in range(24) for run in runs[:1]]
    figure = draw(judge_sweep(many, {"experiment": {"reference": "condition 0"}}))
    figure.canvas.draw()
    [legend] = figure.legends
    assert len(legend.get_texts()) == 24
    box, whole = legend.get_window_extent(), figure.bbox
    assert box.y0 >= whole.y0 and box.y1 <= whole.y1 and box.x1 <= whole.x1


def test_the_page_opens_with_the_verdicts(page):
    parsed = Sources()
    parsed.feed(page.read_text())
    opening = parsed.text[: parsed.text.index("Question")]
    assert "high trained in 6 of 6, the reference, although up to 25 % of gradients saturate." in opening
    assert (
        "low <b> did not train in 3 of 6 (3 diverged, the first at step 215): up to 25 % of gradients saturate; head "
        "unrounded would likely mend it." in opening
    )


def test_the_report_of_a_user_says_nothing_of_the_paper_and_has_no_map_of_one_rate(folder, page, tmp_path):
    own = tmp_path / "own"
    shutil.copytree(folder / "runs", own / "runs")
    content = json.loads((folder / "sweep.json").read_text())
    del content["experiment"]
    content["starts"] = []
    content["plan"] = [entry for entry in content["plan"] if entry["config"]["learning_rate"] == 0.01]
    (own / "sweep.json").write_text(json.dumps(content))
    parsed = Sources()
    parsed.feed(report(own).read_text())
    assert "paper" not in parsed.text.lower()
    assert not (own / "figures" / "heat_maps.png").exists()
    assert "The words" in parsed.text and "[diverged]" not in parsed.text


def test_differences_are_those_of_pairs_that_trained(folder):
    runs, facts = read_sweep(folder)
    judged = judge_sweep(runs, facts)
    chosen = {"low <b>": [(i, j) for i, j in pairs(judged, "low <b>") if judged.trained[i] and judged.trained[j]]}
    slow, fast = loss_differences(judged, chosen).axes
    assert [line.get_label() for line in slow.lines] == ["low <b>", "high"]
    assert np.array_equal(slow.lines[0].get_ydata(), np.zeros(STEPS))  # both conditions have the same losses
    assert [line.get_label() for line in fast.lines] == ["high"]


def test_heat_maps_hold_the_numbers(folder):
    runs, facts = read_sweep(folder)
    judged = judge_sweep(runs, facts)
    high, low, _ = heat_maps(judged).axes
    assert [each.get_text() for each in high.texts] == [
        f"{v.final_loss:.2f}" for v in np.array(judged.verdicts)[[0, 3, 1, 4, 2, 5]]
    ]
    assert len(low.texts) == 3  # the other runs diverged


def test_an_unfinished_sweep_can_be_reported(folder, page, tmp_path):
    part = tmp_path / "part"
    shutil.copytree(folder / "runs", part / "runs")
    shutil.copy(folder / "sweep.json", part)
    for path in sorted((part / "runs").iterdir())[1:]:
        path.unlink()
    (part / "failures").mkdir()
    (part / "failures" / "aa.json").write_text(
        json.dumps({"condition": "high", "tries": 3, "text": "x\nValueError: y"})
    )
    text = report(part).read_text()
    assert "1 of 12 planned runs are finished, 1 were given up." in text
    assert "ValueError: y" in text


def test_a_folder_without_a_sweep_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sweep at"):
        report(tmp_path)


_CHECK = """<script>
addEventListener("error", e => document.title = "ERROR " + e.message);
addEventListener("load", () => { document.title = "IMAGES " +
  [...document.images].map(i => i.id + ":" + (i.complete && i.naturalWidth > 200)).join(",") +
  " OVERFLOW " + (document.documentElement.scrollWidth > innerWidth); });
</script></head>"""


def test_the_page_opens_in_chromium_with_its_plots_and_without_errors(page, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    copy = tmp_path / "page.html"  # the same page, which tells in its title what it shows
    copy.write_text(page.read_text().replace("</head>", _CHECK))
    options = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    options += " disable-component-update disable-sync enable-logging=stderr dump-dom"
    arguments = [chromium, *(f"--{option}" for option in options.split()), f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([*arguments, copy.as_uri()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    assert "CONSOLE" not in done.stderr
    title = re.search("<title>(.*?)</title>", done.stdout).group(1)
    assert title == (
        "IMAGES loss:true,loss_differences:true,heat_maps:true,loss_by_rate:true,"
        "sensitivity:true,sharpness:true,roc:true OVERFLOW false"
    )


def test_every_column_of_a_record_is_stored(folder):
    from fpsim.paper.sweeps import read_sweep

    runs, _ = read_sweep(folder)
    assert set(runs[0].columns) == {entry.name for entry in fields(Record)}
