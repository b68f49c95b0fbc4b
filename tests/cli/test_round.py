"""``fpsim round`` shows exact answers to known questions."""

import pytest

from tests.shared.command_line import cells, run

NEAREST = ("--rounding", "nearest_even")


def blocks(output: str) -> list[dict[str, str]]:
    """The facts that ``fpsim round`` shows of each number in one rounding, by heading."""
    return [dict(line.split(maxsplit=1) for line in block.splitlines()) for block in output.split("\n\n")[1:]]


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


def test_round_survives_numbers_far_outside_of_every_float():
    huge, tiny = blocks(run("round", "1e4000", "-1e-4000", "--format", "bf16", *NEAREST))
    assert (huge["result"], tiny["result"]) == ("inf", "-0")
    assert tiny["error"] == "1e-4000 = 1.0889e-3960 ulp"


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


def test_round_shows_elements_and_scales_of_formats_with_scales():
    rows = cells(run("round", "957", "1", "448", "449", "--format", "e4m3fn/mx:2"))
    assert rows[-4:] == [
        ["957", "0", "240", "4", "960"],
        ["1", "0", "0.25", "4", "1"],
        ["448", "1", "224", "2", "448"],
        ["449", "1", "224", "2", "448"],
    ]
    assert cells(run("round", "3", "-1", "0", "--format", "dynamic4"))[-3:] == [
        ["3", "0", "1", "3", "3"],
        ["-1", "0", "-0.4375", "3", "-1.3125"],
        ["0", "0", "0", "3", "0"],
    ]
