"""One word names a policy: a cast, two casts, a preset, or no simulation."""

from __future__ import annotations

import pytest

from fpsim.policy import Policy
from fpsim.policy.shorthand import parse_shorthand


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("fp32", None),
        (" FP32", None),
        ("bf16", {"format": "bf16"}),
        ("E8M3", {"format": "e8m3"}),
        ("e8m3/toward_zero", {"format": "e8m3/toward_zero"}),
        ("e5m2/up/sat_finite", {"format": "e5m2/up/sat_finite"}),
        ("e4m3:bias=11", {"format": "e4m3:bias=11"}),
        ("e4m3fn+e5m2", {"activation": "e4m3fn", "weight": "e4m3fn", "gradient": "e5m2"}),
        (
            "e8m3/up + e8m3/down",
            {"activation": "e8m3/up", "weight": "e8m3/up", "gradient": "e8m3/down"},
        ),
    ],
)
def test_a_word_is_one_cast_or_two(text, options):
    assert parse_shorthand(text) == options


@pytest.mark.parametrize("name", ["fp8_hybrid", "paper:e8m3"])
def test_presets_keep_their_names(name):
    assert parse_shorthand(name) == Policy.preset(name).to_dict()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("e4m3nf", "did you mean"),
        ("", "unknown format"),
        ("e8m3/truncate", "toward_zero"),
        ("e4m3fn+", "unknown format"),
        ("e4m3fn+e5m2+bf16", "3 casts"),
        ("e4m3fn,e5m2", "unknown format"),
    ],
)
def test_a_word_without_meaning_is_refused_with_the_remedy(text, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        parse_shorthand(text)
    assert repr(text) in str(error.value)
    assert "e4m3fn+e5m2" in str(error.value)
