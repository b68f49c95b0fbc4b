"""``fpsim formats`` shows exact facts and values."""

import re
from fractions import Fraction

import pytest

from fpsim import reference
from fpsim.cli import exact_numbers
from fpsim.formats import NAMED_FORMATS, WHOLE_FORMATS, parse_format
from tests.shared.command_line import cells, run


def rows(output: str) -> list[list[str]]:
    return [re.split(r" {2,}", line.strip()) for line in output.splitlines() if re.match(r" +e?\w+\d", line)]


def test_formats_shows_the_facts_of_every_named_format():
    shown = {row[0].split(" ")[0]: row[1:] for row in rows(run("formats"))}
    assert list(shown) == [*NAMED_FORMATS, *WHOLE_FORMATS]
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
        assert decimal == exact_numbers.show_number(value)
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


def test_formats_lists_names_of_elements_with_scales():
    assert ["mxfp8", "e4m3fn", "mx"] in cells(run("formats"))
    assert ["dynamic8:unsigned", "dynamic8:unsigned", "group:256"] in cells(run("formats"))
    shown = cells(run("formats", "dynamic4", "nf4/group:64:double"))
    assert ["dynamic4", "dynamic4", "group:128"] in shown
    assert ["nf4/group:64:double", "nf4", "group:64:double"] in shown
    assert "unknown scale 'group'" in run("formats", "nf4/group", code=2)
    assert cells(run("formats", "nvfp4", "int8"))[-2:] == [["nvfp4", "e2m1fn", "nv"], ["int8", "int8", "row"]]
