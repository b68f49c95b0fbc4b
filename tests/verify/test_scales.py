"""Scales of OCP MX, compared with the reference for many magnitudes; a wrong rule is found."""

from __future__ import annotations

import pytest
import torch

from fpsim.scaling import rules
from fpsim.verify.scales import verify_scale


@pytest.mark.parametrize("format", ["e4m3fn", "int8:unit=-6"])
def test_compiled_scales_are_those_of_the_reference(format: str) -> None:
    verdict = verify_scale(format, "mx:32:even", samples=4000)
    assert (verdict.mismatches, verdict.paths, verdict.inputs > 4000) == (0, ("compiled",), True)


def test_each_scale_is_compiled_whatever_else_was() -> None:
    with torch._dynamo.config.patch(recompile_limit=1):
        for rule in ("rceil", "floor", "ceil"):
            assert verify_scale("e5m2", f"mx:32:{rule}", samples=100).mismatches == 0


def test_a_wrong_rule_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert verify_scale("e2m1fn", "mx:32:floor", samples=4000, compiled=False).mismatches == 0
    monkeypatch.setattr(rules, "E8M0_BIAS", 126)  # scales above 2^126 become 2^126
    verdict = verify_scale("e2m1fn", "mx:32:floor", samples=4000, compiled=False)
    assert verdict.mismatches > 0 and len(verdict.examples) > 0
