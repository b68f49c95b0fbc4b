"""``fpsim verify`` prints a verdict per mode, writes tables and JSON, and ends with code 1 after a mismatch."""

import json
import re
import sys

import torch

from fpsim.source import proven_hash
from fpsim.verify import run as verify
from tests.shared.command_line import run

QUICK = ("--samples", "1000", "--path", "eager")


def test_verify_prints_a_verdict_for_every_format_and_rounding():
    lines = run("verify", "--format", "e4m3fn", "--format", "e2m1fn", "--rounding", "up", "--rounding", "down", *QUICK)
    assert [line.split(":")[0] for line in lines.splitlines()] == [
        "e4m3fn up sat_finite", "e4m3fn down sat_finite", "e2m1fn up sat_finite", "e2m1fn down sat_finite",
    ]  # fmt: skip
    assert all("no mismatch in" in line for line in lines.splitlines())


def test_verify_takes_all_roundings_and_other_carriers():
    lines = run(
        "verify", "--format", "e5m2", "--rounding", "all", "--carrier", "float16", "--exhaustive", "--path", "eager"
    )
    assert len(lines.splitlines()) == 6
    assert all("65,536 inputs (all float16, eager)" in line for line in lines.splitlines())


def test_verify_writes_a_table(tmp_path, monkeypatch):
    file = tmp_path / "table.md"
    arguments = f"verify --format tf32 --format e2m1fn --samples 10 --path eager --markdown {file}".split()
    monkeypatch.setattr(sys, "argv", ["/usr/bin/fpsim", *arguments])
    run(*arguments)
    first, *rest = file.read_text().splitlines()
    assert first.startswith(f"`fpsim {' '.join(arguments)}` (torch {torch.__version__}, ")
    assert [line.split(" | ")[:3] for line in rest if " sampled float32: " in line] == [
        ["| tf32 = e8m10", "nearest_even", "ovf_inf"],
        ["| e2m1fn", "nearest_even", "sat_finite"],
    ]
    assert all(line.count("|") == 8 for line in rest if line.startswith("|"))


def test_verify_ends_with_code_1_and_shows_the_inputs_that_went_wrong(monkeypatch):
    original = verify.round_tensor
    monkeypatch.setattr(verify, "round_tensor", lambda x, *a, **k: torch.where(x == 3, 4.0, original(x, *a, **k)))
    output = run("verify", "--format", "e5m2", "--carrier", "float16", "--exhaustive", "--path", "eager", code=1)
    assert output.splitlines()[0].startswith("e5m2 nearest_even ovf_inf: 1 MISMATCHES in 65,536 inputs")
    assert output.splitlines()[1:] == [
        "  input 0x4200 = 3.0 became 0x4400 = 4.0, not 0x4200 = 3.0: e5m2 nearest_even ovf_inf, float16 eager"
    ]


def test_verify_writes_json_to_a_file_or_to_standard_output(tmp_path):
    file = tmp_path / "verdicts.json"
    arguments = ("verify", "--format", "e2m1fn", "--rounding", "up", "--rounding", "stochastic:8", *QUICK)
    assert len(run(*arguments, "--json", str(file)).splitlines()) == 2
    written = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(each["rounding"], each["ok"], each["source"]) for each in written] == [
        ("up", True, proven_hash()),
        ("stochastic:8", True, proven_hash()),
    ]
    for last in (["--json"], ["--json", "--seed", "0"]):
        shown = [json.loads(line) for line in run(*arguments, *last).splitlines()]
        assert [each["inputs"] for each in shown] == [each["inputs"] for each in written]


def test_verify_all_goes_through_the_plan_and_sums_it_up():
    *groups, total = run("verify", "--all", "--format", "e2m1fn", "--path", "eager", "--jobs", "1").splitlines()
    carriers = ("float32", "float64", "bfloat16", "float16")
    assert [line.split(":")[0] for line in groups] == [f"e2m1fn on {carrier}, eager" for carrier in carriers]
    assert [re.search(r"(\d+) modes, no mismatch in", line)[1] for line in [*groups, total]] == [
        "10",
        "2",
        "2",
        "2",
        "16",
    ]


def test_verify_all_takes_what_other_options_leave():
    arguments = ("--rounding", "all", "--overflow", "ovf_inf", "--carrier", "float16", "--path", "eager", "--jobs", "1")
    group, total = run("verify", "--all", "--format", "e5m2", "--format", "e2m1fn", *arguments).splitlines()
    assert group.startswith("e5m2 on float16, eager: 6 modes, no mismatch in ")
    assert total.rpartition(", ")[0] == group.partition(": ")[2].rpartition(", ")[0]  # all but the time


def test_verify_all_shows_each_wrong_mode_and_ends_with_code_1(monkeypatch):
    original = verify.round_tensor

    def wrong_upwards(x, *args, rounding, **kwargs):
        rounded = original(x, *args, rounding=rounding, **kwargs)
        return torch.where(x == 3, 4.0, rounded) if rounding == "up" else rounded

    monkeypatch.setattr(verify, "round_tensor", wrong_upwards)
    arguments = ("--format", "e2m1fn", "--path", "eager", "--carrier", "float16", "--rounding", "all", "--jobs", "1")
    summary, wrong, *examples, total = run("verify", "--all", *arguments, code=1).splitlines()
    assert re.match(r"e2m1fn on float16, eager: 6 modes, \d+ MISMATCHES in ", summary)
    assert re.match(r"e2m1fn up sat_finite: \d+ MISMATCHES in ", wrong)
    assert set(examples) == {
        "  input 0x4200 = 3.0 became 0x4400 = 4.0, not 0x4200 = 3.0: e2m1fn up sat_finite, float16 eager"
    }
    assert re.match(r"6 modes, \d+ MISMATCHES in ", total)


def test_verify_without_a_compiler_says_what_to_do_in_one_line(monkeypatch):
    def no_compiler(*args):
        raise verify.CompilationError("torch.compile does not work here: verify the eager path alone")

    monkeypatch.setattr(verify, "_compile", no_compiler)
    shown = run("verify", "--format", "e2m1fn", "--samples", "1000", code=2)
    assert shown == "error: torch.compile does not work here: verify the eager path alone\n"


def test_verify_compares_scales_with_the_reference(monkeypatch):
    arguments = ("verify", "--format", "e4m3fn", "--format", "int8:unit=-6", "--scale", "mx:16:even", "--path", "eager")
    lines = run(*arguments, "--samples", "1000").splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "e4m3fn mx:16:even scale: no mismatch in 2",
        "int8:unit=-6 mx:16:even scale: no mismatch in 2",
    ]
    from fpsim.scaling import definitions

    original = definitions.mx_multiplier_code
    monkeypatch.setattr(definitions, "mx_multiplier_code", lambda amax, *rest: original(amax + 1, *rest))
    output = run("verify", "--format", "e4m3fn", "--scale", "mx", "--path", "eager", "--samples", "0", code=1)
    amax, got, want = 448 * 2.0**-127, 2.0**-126, 2.0**-127
    assert f"input 0x04600000 = {amax} became 0x00800000 = {got}, not 0x00400000 = {want}: e4m3fn mx:32:rce" in output


def test_verify_writes_scales_of_every_rule_to_a_table(tmp_path):
    table = tmp_path / "scales.md"
    arguments = ("verify", "--format", "e4m3fn", "--format", "int4", "--scale", "all", "--path", "eager")
    run(*arguments, "--samples", "0", "--markdown", str(table))
    rows = [line.split(" | ") for line in table.read_text().splitlines() if "sampled" in line]
    assert [(row[0], row[1]) for row in rows] == [
        (f"| {name}", f"mx:32:{rule}") for name in ("e4m3fn", "int4") for rule in ("rceil", "floor", "ceil", "even")
    ]
    assert all(row[2] == "eager" and row[4] == "0" for row in rows)


def test_verify_of_scales_refuses_what_has_no_meaning_there():
    assert "leave out --rounding" in run("verify", "--format", "e4m3fn", "--scale", "mx", "--rounding", "up", code=2)
    assert "has no E8M0 codes" in run("verify", "--format", "e4m3fn", "--scale", "row", code=2)
