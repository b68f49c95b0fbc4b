"""The command line: exact answers to known questions, and one clear line for wrong input."""

import bisect
import itertools
import json
import re
import sys
import types
from fractions import Fraction

import pytest
import torch
from rich.table import Table
from typer.testing import CliRunner

from fpsim import reference
from fpsim.cli import exact_numbers as number_text
from fpsim.cli import explain_number as round_command
from fpsim.cli.main import app
from fpsim.formats import NAMED_FORMATS, parse_format
from fpsim.source import proven_hash
from fpsim.verify import run as verify


def run(*arguments: str, code: int = 0) -> str:
    """Standard output of the command, or standard error if ``code`` is 2."""
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.stderr if code == 2 else result.stdout


NEAREST = ("--rounding", "nearest_even")


def blocks(output: str) -> list[dict[str, str]]:
    """What ``fpsim round`` shows of each number in one rounding, by heading."""
    return [dict(line.split(maxsplit=1) for line in block.splitlines()) for block in output.split("\n\n")[1:]]


# -- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", Fraction(1, 10)),
        ("-2.5e-3", Fraction(-1, 400)),
        (".5", Fraction(1, 2)),
        ("5.", Fraction(5)),
        ("+1e3", Fraction(1000)),
        ("1/3", Fraction(1, 3)),
        ("-7/2", Fraction(-7, 2)),
        ("0x1.8p3", Fraction(12)),
        ("-0x.8p-1", Fraction(-1, 4)),
        ("0X1P-149", Fraction(1, 2**149)),
        ("0x10", Fraction(16)),
        ("1e-400", Fraction(1, 10**400)),
        ("0.1000000000000000055511151231257827", Fraction(1000000000000000055511151231257827, 10**34)),
        ("0", Fraction(0)),
        ("-0", reference.NEGATIVE_ZERO),
        ("-0.0e5", reference.NEGATIVE_ZERO),
        ("-0x0p0", reference.NEGATIVE_ZERO),
        ("inf", reference.INFINITY),
        ("-Infinity", reference.NEGATIVE_INFINITY),
        ("NaN", reference.NAN),
        ("-nan", reference.NAN),
    ],
)
def test_numbers_are_read_exactly(text, value):
    assert number_text.parse_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "abc", "1.2.3", "1/0", "1/2/3", "0x", "0x.p3", "--1", "+-1", "1e", "e5", "1_000", "१"]
)
def test_what_is_no_number_is_an_error_that_shows_how_to_write_one(text):
    with pytest.raises(ValueError, match=r"cannot read .* as a number: use a decimal .*0x1\.8p3"):
        number_text.parse_number(text)


@pytest.mark.parametrize("text", ["1e999999999", "0x1p-999999999", "1e-4001"])
def test_an_exponent_that_would_fill_the_memory_is_an_error(text):
    with pytest.raises(ValueError, match="beyond 4000"):
        number_text.parse_number(text)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Fraction(12), "12"),
        (Fraction(-13, 128), "-0.1015625"),
        (Fraction(1, 2**24), "5.9604644775390625e-8"),
        (Fraction(1, 3), "1/3"),
        (Fraction(10) ** 30, "1e30"),
        (Fraction(2) ** 127, "~1.70141e38"),
        (Fraction(1, 2**149), "~1.4013e-45"),
        (reference.NEGATIVE_ZERO, "-0"),
        (reference.NEGATIVE_INFINITY, "-inf"),
    ],
)
def test_numbers_are_shown_exactly_or_marked_as_not(value, shown):
    assert number_text.show_number(value) == shown


# -- fpsim round -------------------------------------------------------------------------------------------------


def test_round_shows_result_code_error_and_neighbours():
    output = run("round", "0.1", "--format", "e4m3fn", *NEAREST)
    assert output == (
        "e4m3fn, nearest_even, sat_finite\n"
        "\n"
        "input       0.1\n"
        "result      0.1015625 = 0x1.ap-4\n"
        "code        0x1d = 0 0011 101\n"
        "error       0.0015625 = 0.2 ulp\n"
        "neighbours  0.09375 (0x1c) below, 0.109375 (0x1e) above\n"
    )


def test_round_never_reads_a_decimal_as_a_float():
    # Just above the tie of 1 and 1.125: float64 has no number between.
    [block] = blocks(run("round", "1.06250000000000000000000000000001", "--format", "e4m3fn", *NEAREST))
    assert block["result"] == "1.125 = 0x1.2p0"
    [tie] = blocks(run("round", "1.0625", "--format", "e4m3fn", *NEAREST))
    assert tie["result"] == "1 = 0x1p0"


def test_round_takes_signs_fractions_hexadecimals_and_specials():
    shown = blocks(run("round", "-1/3", "0x1.8p3", "-inf", "nan", "-0", "-1e5", "--format", "e5m2", *NEAREST))
    assert [block["result"] for block in shown] == ["-0.3125 = -0x1.4p-2", "12 = 0x1.8p3", "-inf", "nan", "-0", "-inf"]
    assert [block["code"].split(" ")[0] for block in shown] == ["0xb5", "0x4a", "0xfc", "0x7e", "0x80", "0xfc"]
    assert shown[0]["error"] == "1/48 = 0.333333 ulp"
    assert shown[1]["error"] == "0 (exact)"
    assert shown[3]["neighbours"] == "none below, none above"
    assert shown[5]["error"] == "not finite"


@pytest.mark.parametrize(
    ("arguments", "result", "neighbours"),
    [
        (["1000", "--format", "e4m3fn"], "448 = 0x1.cp8", "416 (0x7d) below, none above"),
        (["1000", "--format", "e4m3fn", "--overflow", "ovf_inf"], "nan", "none below, none above"),
        (["65519", "--format", "fp16"], "65504 = 0x1.ffcp15", "65472 (0x7bfe) below, inf (0x7c00) above"),
        (["65520", "--format", "fp16"], "inf", "65504 (0x7bff) below, none above"),
        (
            ["65520", "--format", "fp16", "--rounding", "down"],
            "65504 = 0x1.ffcp15",
            "65472 (0x7bfe) below, inf (0x7c00) above",
        ),
        (["0", "--format", "e2m1fn"], "0", "-0.5 (0x9) below, 0.5 (0x1) above"),
        (["0.5", "--format", "e2m1fn"], "0.5 = 0x1p-1", "0 (0x0) below, 1 (0x2) above"),
        (["-0.5", "--format", "e2m1fn"], "-0.5 = -0x1p-1", "-1 (0xa) below, 0 (0x0) above"),
        (["0", "--format", "e2m1:finite:nosubnormals"], "0", "-1 (0xa) below, 1 (0x2) above"),
        (["1", "--format", "e2m1:finite:nosubnormals"], "1 = 0x1p0", "0 (0x0) below, 1.5 (0x3) above"),
        (["0", "--format", "e4m3:unsigned"], "0", "none below, 0.001953125 (0x01) above"),
        (["0.5", "--format", "e8m0fnu"], "0.5 = 0x1p-1", "0.25 (0x7d) below, 1 (0x7f) above"),
    ],
)
def test_round_knows_the_ends_of_formats(arguments, result, neighbours):
    [block] = blocks(run("round", *NEAREST, *arguments))  # of two options the last one holds
    assert (block["result"], block["neighbours"]) == (result, neighbours)


@pytest.mark.parametrize(
    "name", ["e4m3fn", "e5m2", "e4m3fnuz", "e2m1fn", "e3m2:nosubnormals", "e3m2:unsigned", "e8m0fnu", "e1m0"]
)
def test_neighbours_are_next_to_each_other_in_the_order_of_values(name):
    fmt = parse_format(name)
    decoded = {reference.decode(code, fmt) for code in range(1 << fmt.bits)}
    values = sorted(decoded - {reference.NAN, reference.NEGATIVE_ZERO}, key=reference.values.order)
    for below, above in zip([None, *values], [*values, None], strict=True):
        for start, step, end in ((below, 1, above), (above, -1, below)):
            if start is not None:
                code = round_command.neighbour(start, fmt, step)
                reached = None if code is None else reference.decode(code, fmt)
                assert reached == end or (reached, end) == (reference.NEGATIVE_ZERO, 0), (start, step)


def test_round_survives_numbers_far_outside_of_every_float():
    huge, tiny = blocks(run("round", "1e4000", "-1e-4000", "--format", "bf16", *NEAREST))
    assert (huge["result"], tiny["result"]) == ("inf", "-0")
    assert tiny["error"] == "1e-4000 = 1.0889e-3960 ulp"


def cells(output: str) -> list[list[str]]:
    """The rows of tables, without their headings."""
    lines = [line.strip() for line in output.splitlines() if line.startswith("  ") and line.strip()]
    split = [re.split(r" {2,}", line) for line in lines]
    return [row for row in split if row[0] not in ("rounding", "code", "format")]


def test_round_shows_every_rounding_if_none_is_given():
    output = run("round", "-1/10", "--format", "e4m3fn")
    assert output.startswith(
        "e4m3fn, sat_finite\n"
        "\n"
        "input       -1/10 = -0.1\n"
        "below       -0.1015625 = -0x1.ap-4 (0x9d = 1 | 0011 | 101)\n"
        "above       -0.09375 = -0x1.8p-4 (0x9c = 1 | 0011 | 100)\n"
        "ulp         0.0078125 = 2^-7\n"
    )
    away = ["-0.1015625", "-0x1.ap-4", "0x9d", "1 | 0011 | 101", "-0.2"]
    toward_zero = ["-0.09375", "-0x1.8p-4", "0x9c", "1 | 0011 | 100", "0.8"]
    assert cells(output) == [
        ["nearest_even", *away],
        ["nearest_away", *away],
        ["toward_zero", *toward_zero],
        ["up", *toward_zero],
        ["down", *away],
        ["to_odd", *away],
        ["stochastic:23", *away, "3355443/4194304 = 0.8"],
        ["stochastic:23", *toward_zero, "838861/4194304 = 0.2"],
    ]


def test_round_shows_the_candidates_of_one_stochastic_rounding():
    output = run("round", "1/3", "1", "nan", "--format", "e4m3fn", "--rounding", "stochastic_b:4")
    assert output.startswith("e4m3fn, stochastic_b:4, sat_finite\n")
    assert cells(output) == [
        ["stochastic_b:4", "0.34375", "0x1.6p-2", "0x2b", "0 | 0101 | 011", "1/3 = 0.333333", "0.6875"],
        ["stochastic_b:4", "0.3125", "0x1.4p-2", "0x2a", "0 | 0101 | 010", "-2/3 = -0.666667", "0.3125"],
        ["stochastic_b:4", "1", "0x1p0", "0x38", "0 | 0111 | 000", "0", "1"],
        ["stochastic_b:4", "nan", "nan", "0x7f", "0 | 1111 | 111", "0", "1"],
    ]


@pytest.mark.parametrize("rounding", ["stochastic:4", "stochastic_b:4", "stochastic_c:4"])
@pytest.mark.parametrize("sixty_fourths", [0, 1, 2, 3, 31, 32, 33, 61, 62, 63])
def test_probabilities_are_the_share_of_all_random_numbers(rounding, sixty_fourths):
    number, fmt = 1 + Fraction(sixty_fourths, 64) / 8, parse_format("e4m3fn")
    every = [reference.round(number, fmt, rounding, random=random) for random in range(16)]
    shares = {outcome.result: outcome.probability for outcome in round_command.outcomes(number, fmt, rounding)}
    assert shares == {value: Fraction(every.count(value), 16) for value in every}


@pytest.mark.parametrize(
    "name", ["e4m3fn", "e5m2", "e4m3fnuz", "e2m1fn", "e3m2:nosubnormals", "e3m2:unsigned", "e8m0fnu"]
)
def test_a_number_lies_between_the_values_that_bracket_it(name):
    fmt = parse_format(name)
    decoded = {reference.decode(code, fmt) for code in range(1 << fmt.bits)}
    values = sorted(decoded - {reference.NAN, reference.NEGATIVE_ZERO}, key=reference.values.order)

    def value_of(code):
        value = None if code is None else reference.decode(code, fmt)
        return Fraction(0) if value is reference.NEGATIVE_ZERO else value

    finite = [value for value in values if isinstance(value, Fraction)]
    middles = [(below + above) / 3 for below, above in itertools.pairwise(finite) if below + above]
    ends = [finite[0] - 10**6, finite[-1] * 100, Fraction(1, 10**50), reference.INFINITY, reference.NEGATIVE_INFINITY]
    order = reference.values.order
    keys = [order(value) for value in values]
    for number in [*middles, *ends, *values]:
        left, right = bisect.bisect_left(keys, order(number)), bisect.bisect_right(keys, order(number))
        below, above = [None, *values][left], [*values, None][right]
        assert tuple(map(value_of, round_command.bracket(number, fmt))) == (below, above), number


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (Fraction(1, 3), "1/3"),
        (Fraction(884279719003555, 2**48), "3.141592653589793115997963468544185161590576171875"),
        (Fraction(2) ** 127, "170141183460469231731687303715884105728"),
        (Fraction(1, 3**200), "~3.76486e-96"),
        (reference.NAN, "nan"),
    ],
)
def test_the_input_is_shown_with_all_its_digits(value, shown):
    assert number_text.show_exactly(value) == shown


# -- fpsim formats -----------------------------------------------------------------------------------------------


def rows(output: str) -> list[list[str]]:
    return [re.split(r" {2,}", line.strip()) for line in output.splitlines() if re.match(r" +e?\w+\d", line)]


def test_formats_shows_the_facts_of_every_named_format():
    shown = {row[0].split(" ")[0]: row[1:] for row in rows(run("formats"))}
    assert list(shown) == list(NAMED_FORMATS)
    assert shown["e4m3fn"] == ["8", "4", "3", "7", "448", "2^-6", "2^-9", "-", "yes", "253"]
    assert shown["fp16"] == ["16", "5", "10", "15", "65504", "2^-14", "2^-24", "yes", "yes", "63,487"]
    assert shown["e8m0fnu"] == ["8", "8", "0", "127", "1.70141e+38", "2^-127", "-", "-", "yes", "255"]


def test_formats_shows_any_format_and_the_names_by_which_it_is_known():
    [half, odd] = rows(run("formats", "e5m10", "e3m4fn:bias=9"))
    assert half[0] == "fp16 = e5m10"
    assert odd[:6] == ["e3m4fn:bias=9", "8", "3", "4", "9", "0.46875"]


def test_formats_shows_all_facts_of_a_single_format():
    output = run("formats", "e5m10")
    facts = dict(re.split(r" {2,}|(?<=mode) ", line, maxsplit=1) for line in output.splitlines() if line[:1].isalpha())
    assert facts == {
        "bits": "16 = 1 sign + 5 exponent + 10 mantissa",
        "precision": "11 significant bits",
        "exponents": "-14 to 15, bias 15",
        "largest": "65504 = 2047 * 2^5 (0x7bff = 0 | 11110 | 1111111111)",
        "smallest normal": "0.00006103515625 = 2^-14 (0x0400 = 0 | 00001 | 0000000000)",
        "smallest subnormal": "5.9604644775390625e-8 = 2^-24 (0x0001 = 0 | 00000 | 0000000001)",
        "zeros": "0 and -0",
        "infinity": "0x7c00 = 0 | 11111 | 0000000000 and its negative",
        "NaN": "0x7e00 = 0 | 11111 | 1000000000, the usual one of 2,046 codes",
        "finite values": "63,487",
        "usual overflow mode": "ovf_inf",
        "carriers": "float64, float32, float16",
    }


@pytest.mark.parametrize("name", ["e4m3fn", "e8m0fnu", "e4m3fnuz", "e2m1fn", "e3m2:nosubnormals:unsigned", "e1m2"])
def test_formats_shows_every_value_of_a_narrow_format(name):
    fmt = parse_format(name)
    shown = [row for row in cells(run("formats", name)) if row[0].startswith("0x")]
    assert len(shown) == 1 << fmt.bits
    for code, (text, fields, exact, decimal) in enumerate(shown):
        value = reference.decode(code, fmt)
        assert int(text, 16) == code == int(re.sub(r"\D", "", fields), 2)
        assert decimal == number_text.show_number(value)
        if isinstance(value, Fraction):
            odd, _, power = exact.removeprefix("-").replace("2^", "* 2^", "*" not in exact).rpartition("* 2^")
            magnitude = Fraction(odd.strip() or 1) * Fraction(2) ** int(power) if "^" in exact else Fraction(power)
            assert (-magnitude if exact.startswith("-") else magnitude) == value
        else:
            assert exact == decimal == str(value)


def test_formats_shows_values_exactly():
    shown = {row[0]: row[1:] for row in cells(run("formats", "e4m3fn"))}
    assert shown["0x1d"] == ["0 | 0011 | 101", "13 * 2^-7", "0.1015625"]
    assert shown["0xfe"] == ["1 | 1111 | 110", "-7 * 2^6", "-448"]
    assert shown["0x80"] == ["1 | 0000 | 000", "-0", "-0"]
    assert shown["0xff"] == ["1 | 1111 | 111", "nan", "nan"]


# -- fpsim verify ------------------------------------------------------------------------------------------------

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


# -- fpsim demo --------------------------------------------------------------------------------------------------


def test_demo_hands_its_options_on(monkeypatch, tmp_path):
    calls = []
    module = types.ModuleType("fpsim.paper.demo")
    module.demo = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "fpsim.paper.demo", module)
    text, out = tmp_path / "text.txt", tmp_path / "out"
    formats = ("--format", "bf16", "--format", "e4m3fn+e5m2")
    run("demo", "--steps", "3", *formats, "--text", str(text), "--out", str(out), "--loss-scale", "8")
    assert calls == [
        {"steps": 3, "formats": ["bf16", "e4m3fn+e5m2"], "text": text, "out": out, "loss_scale": 8.0},
    ]


def test_demo_without_its_extras_says_what_to_install(monkeypatch):
    module = types.ModuleType("fpsim.paper.demo")

    def demo(**options):
        raise ModuleNotFoundError("'transformers' is not installed; the demo needs it: pip install 'fpsim[paper]'")

    module.demo = demo
    monkeypatch.setitem(sys.modules, "fpsim.paper.demo", module)
    assert "pip install 'fpsim[paper]'" in run("demo", code=2)


# -- wrong input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["round", "1", "--format", "e4m3fm"], "error: unknown format 'e4m3fm': did you mean e4m3fn"),
        (["round", "one", "--format", "e4m3fn"], "error: cannot read 'one' as a number"),
        (["round", "1", "--fromat", "2", "--format", "e4m3fn"], "error: no such option: --fromat"),
        (
            ["round", "1", "--format", "e4m3fn", "--rounding", "nearest"],
            "error: unknown rounding 'nearest': use one of",
        ),
        (["round", "1", "--format", "e2m1fn", "--overflow", "ovf_inf"], "use overflow='sat_finite'"),
        (["formats", "e99m1"], "error: no such format 'e99m1'"),
        (["verify", "--format", "e4m3fn", "--rounding", "nearest"], "error: unknown rounding 'nearest'"),
        (["verify", "--format", "fp32", "--exhaustive", "--path", "eager"], "exhaustive=False"),
        (["verify", "--format", "e4m3fn", "--carrier", "int8"], "error: unknown carrier 'int8': use one of float64,"),
        (["verify", "--format", "e4m3fn", "--path", "fast"], "error: unknown path 'fast'"),
        (["verify", "--format", "bf16", "--carrier", "float16", "--path", "eager"], "convert it to torch.float32"),
        (["verify"], "error: nothing to verify: give --format, such as --format e4m3fn, or --all"),
        (["verify", "--all", "--exhaustive"], "error: --all takes samples: leave out --exhaustive"),
        (["verify", "--format", "e4m3fn", "--jobs", "2"], "error: --jobs is for --all"),
        (["verify", "--format", "e4m3fn", "--device", "cuda:99"], "CUDA devices here: use device='cpu'"),
        (["verify", "--format", "e4m3fn", "--rounding", "stochastic:0"], "random bits are 1 to 32, got '0'"),
    ],
)
def test_wrong_input_ends_with_code_2_and_one_line(arguments, message):
    error = run(*arguments, code=2)
    assert message in error
    assert len(error.splitlines()) == 1


def test_help_names_every_command():
    assert all(name in run("--help") for name in ("formats", "round", "verify", "demo"))


# -- fpsim sharpness -------------------------------------------------------------------------------------------------


def test_sharpness_hands_its_options_on_and_prints_the_table(monkeypatch, tmp_path):
    calls = []
    module = types.ModuleType("fpsim.evaluate.logit_sharpness")

    def measure_checkpoint(*arguments, progress, **options):
        progress(1, 2)
        calls.append((*arguments, options))
        return types.SimpleNamespace(table=lambda: Table("sharpness of this"))

    module.measure_checkpoint, module.EPSILONS = measure_checkpoint, (5e-4, 1e-3)
    monkeypatch.setitem(sys.modules, "fpsim.evaluate.logit_sharpness", module)
    model, text = tmp_path / "model", tmp_path / "text.txt"
    formats = ("--format", "e4m3fn", "--format", "e8m3/toward_zero")
    output = run("sharpness", str(model), str(text), *formats, "--windows", "3", "--context", "8", "--no-gradients")
    assert "sharpness of this" in output
    options = {"windows": 3, "context": 8, "gradients": False, "method": "exact", "epsilons": (5e-4, 1e-3)}
    assert calls == [(model, text, {"formats": ["e4m3fn", "e8m3/toward_zero"], **options})]


def test_sharpness_of_a_folder_that_is_not_there_is_an_error(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be")
    assert str(tmp_path / "missing") in run("sharpness", str(tmp_path / "missing"), str(text), code=2)
