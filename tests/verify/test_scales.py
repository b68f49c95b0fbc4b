"""Scales of OCP MX, compared with the reference for many magnitudes; a wrong rule is found."""

from __future__ import annotations

import pytest
import torch

from fpsim import reference
from fpsim.casts import parse_cast
from fpsim.formats import NAMED_FORMATS, WHOLE_FORMATS
from fpsim.scaling import definitions, rules
from fpsim.scaling.scale import MX_RULES
from fpsim.verify import scales
from fpsim.verify.scales import SCALED_FORMATS, verify_scale, verify_scales


@pytest.mark.parametrize("format", ["e4m3fn", "int8:unit=-6"])
def test_compiled_scales_are_those_of_the_reference(format: str) -> None:
    verdict = verify_scale(format, "mx:32:even", samples=4000)
    assert (verdict.mismatches, verdict.paths, verdict.inputs > 4000) == (0, ("compiled",), True)


def test_each_scale_is_compiled_whatever_else_was() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for rule in ("rceil", "floor", "ceil"):
            assert verify_scale("e5m2", f"mx:32:{rule}", samples=100).mismatches == 0


def test_every_rule_is_verified_for_every_format_that_takes_it() -> None:
    verdicts = list(verify_scales((), "all", ["eager"], samples=0))
    assert {(v.format, v.rounding) for v in verdicts} == {
        (parse_cast(name).format.name, f"mx:32:{rule}") for name in SCALED_FORMATS for rule in MX_RULES
    }
    assert all(v.mismatches == 0 and v.inputs > 500 for v in verdicts)
    whole = {expanded.partition("/")[0] for expanded in WHOLE_FORMATS.values() if "/mx" in expanded}
    assert whole | set(NAMED_FORMATS) - {"fp64", "e8m0fnu"} <= set(SCALED_FORMATS)


def test_all_magnitudes_are_compared_in_pieces_of_one_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million magnitudes around 2^26 + 1, from which on the scale is 2^-126."""
    begin, change, end = 67_000_000, (1 << 26) + 1, 68_000_000
    assert reference.scale_steps("e4m3fn", "ceil")[:2] == ((0, 0), (change, 1))
    monkeypatch.setattr(reference, "scale_steps", lambda format, rule: ((begin, 0), (change, 1)))
    monkeypatch.setattr(scales, "MAGNITUDES", end)
    monkeypatch.setattr(scales, "_PIECE", 1 << 18)
    ends: list[int] = []
    options = {"exhaustive": True, "compiled": False, "progress": lambda done, total: ends.append(done)}
    assert verify_scale("e4m3fn", "mx:32:ceil", **options).mismatches == 0
    assert ends == [change, *range(change + (1 << 18), end, 1 << 18), end]
    original = rules.mx_multiplier_code
    wrong = (change - 1, change, end - 1)
    monkeypatch.setattr(
        definitions,
        "mx_multiplier_code",
        lambda amax, *rest: original(amax, *rest) + (torch.isin(amax, torch.tensor(wrong)).int() << 23),
    )
    verdict = verify_scale("e4m3fn", "mx:32:ceil", **options)
    assert (verdict.mismatches, [example.input for example in verdict.examples]) == (
        3,
        [f"{each:#010x}" for each in wrong],
    )


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify_scale("e2m1fn", "mx:32:floor", samples=4000, compiled=False).mismatches == 0
    monkeypatch.setattr(rules, "E8M0_BIAS", 126)  # scales above 2^126 become 2^126
    verdict = verify_scale("e2m1fn", "mx:32:floor", samples=4000, compiled=False)
    assert verdict.mismatches > 0 and len(verdict.examples) > 0
