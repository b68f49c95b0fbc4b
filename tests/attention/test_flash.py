"""The roundings of tiled attention as values: presets, fields, JSON, and contradictions."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from typing import Any

import pytest

from fpsim import FlashAttention, Policy
from fpsim.attention.flash import PRESETS, STEPS, parse_flash, parsed, preset

#: The casts of every step of each preset: of the inputs, of most steps, and of the others by name.
CASTS: dict[str, tuple[str | None, str, dict[str, str]]] = {
    "flash2_bf16": ("bf16", "fp32", dict.fromkeys(("probabilities", "score_gradients", "output"), "bf16")),
    "flash2_fp16": ("fp16", "fp32", dict.fromkeys(("probabilities", "score_gradients", "output"), "fp16")),
    "all_bf16": ("bf16", "bf16", {}),
    "flash3_fp8": ("e4m3fn/block:128x256", "fp32", {"probabilities": "e4m3fn", "output": "bf16"}),
}


def format_of(cast: Any) -> str:
    return str(cast).split("/")[0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_what_their_sources_say(name: str) -> None:
    inputs, usual, others = CASTS[name]
    steps = preset(name)
    assert steps.inputs.spelling == inputs
    for step in STEPS:
        assert steps.cast(step) == FlashAttention(output=others.get(step, usual)).cast("output")
    assert steps.late_scale == (name != "all_bf16")
    assert (steps.offset, steps.block_q, steps.block_k) == {
        "all_bf16": (0, 512, 512), "flash3_fp8": (8, 128, 128)
    }.get(name, (0, 128, 128))  # fmt: skip
    assert steps.in_backward == (preset("flash2_bf16") if name == "flash3_fp8" else steps)


VALUES = [
    "round", "keep", "flash", *PRESETS, {}, {"preset": "all_bf16", "cure": 2.0, "block_k": 64},
    {"arithmetic": "bf16/toward_zero", "products": "fp32 chunk=16"},
    {"inputs": "e4m3fn/block:64x256", "backward": {"accumulator": "bf16/stochastic:8"}},
    FlashAttention(scores="e8m10", late_scale=False),
]  # fmt: skip


@pytest.mark.parametrize("given", VALUES, ids=str)
def test_policies_keep_attention_through_json_and_pickle(given: Any) -> None:
    policy = Policy(format="bf16", attention=given, modules={"a": {"format": "e4m3"}, "b": {"attention": "keep"}})
    assert Policy.from_json(policy.to_json()) == policy == pickle.loads(pickle.dumps(policy))
    assert hash(Policy.from_json(policy.to_json())) == hash(policy)
    assert policy.at("a").attention == policy.attention and policy.at("b").attention == "keep"
    other = Policy(format="bf16", modules={"c": Policy(format="e4m3", attention=given)})
    assert Policy.from_json(other.to_json()) == other
    if not isinstance(given, str):
        steps = policy.attention
        assert isinstance(steps, FlashAttention) and parsed(str(steps)) == steps


def test_flash_is_the_kernel_in_bf16_and_equal_policies_have_equal_keys() -> None:
    named = Policy(attention="flash")
    assert (
        named == Policy(attention=FlashAttention(**PRESETS["flash2_bf16"])) == Policy(attention=preset("flash2_bf16"))
    )
    assert json.loads(named.to_json())["attention"] == "flash2_bf16"
    spelled = Policy(attention={"preset": "flash2_bf16", "output": "e8m7"})
    assert spelled == named and spelled.canonical() == named.canonical()
    assert Policy(attention={"block_k": 64}).canonical() != Policy(attention={"block_k": 32}).canonical()
    Policy(attention="flash").check_names_format()
    assert not named.is_stochastic and Policy(attention={"output": "bf16/stochastic"}).is_stochastic
    assert Policy(
        modules={"a": {"format": "none", "attention": {"backward": {"delta": "bf16/stochastic"}}}}
    ).is_stochastic


def test_fields_are_replaced_one_by_one() -> None:
    steps = replace(preset("flash2_bf16"), block_k=64)
    assert steps == parse_flash({"preset": "flash2_bf16", "block_k": 64}) != preset("flash2_bf16")
    assert FlashAttention(exponentials="bf16").cast("probabilities") == FlashAttention(output="bf16").cast("output")


WRONG: list[tuple[str, Any]] = [
    ("unknown attention 'flsh2_bf16' (did you mean 'flash2_bf16'?): use one of round, keep, flash,", "flsh2_bf16"),
    ("unknown attention 'flash3' ", {"preset": "flash3"}),
    ("unknown field 'block_n' of attention (did you mean 'block_q'?)", {"block_n": 4}),
    ("unknown format 'bf17'", {"scores": "bf17"}),
    ("block_q=0 is out of range: use 1 to 1048576", {"block_q": 0}),
    ("block_k is an int, got 1.5", {"block_k": 1.5}),
    ("offset=-1 is out of range: use 0 to 127", {"offset": -1}),
    ("late_scale is True or False, got 1", {"late_scale": 1}),
    ("cure is a factor, such as 2.0, or None, got '2'", {"cure": "2"}),
    ("cure=1 would leave the largest score as it is, or below: use a factor from 2 to 8", {"cure": 1}),
    ("arithmetic='e4m3fn/nearest_even/sat_finite' has no infinity, and a masked score", {"arithmetic": "e4m3fn"}),
    ("arithmetic='bf16/nearest_even/sat_finite' has no infinity", {"arithmetic": "bf16/sat_finite"}),
    (
        "scores='fp32/nearest_even/ovf_inf' would change nothing, because arithmetic='bf16/nearest_even/ovf_inf' has "
        "rounded these numbers before: leave scores out, or make arithmetic wider",
        {"arithmetic": "bf16", "scores": "fp32"},
    ),
    (
        "would change nothing, because exponentials='bf16",
        {"exponentials": "bf16", "probabilities": "e8m9"},
    ),
    (
        "offset=9 makes exponentials as large as 512, and probabilities='e4m3fn/nearest_even/sat_finite' ends at 448",
        {"probabilities": "e4m3fn", "offset": 9},
    ),
    (
        "inputs has a scale for every 128 rows, and block_k=96 would cut these: use a multiple or a divisor",
        {"preset": "flash3_fp8", "block_k": 96},
    ),
    ("has a transform or a timing, which tiles do not take", {"inputs": "e4m3fn/tensor/history:16"}),
    ("output of attention cannot be scaled: leave", {"output": "e4m3fn/row"}),
    ("accumulator='int8/unscaled' is no floating-point format", {"accumulator": "int8/unscaled"}),
    ("delta='e8m0fnu' has no sign, and holds numbers below zero", {"delta": "e8m0fnu"}),
    ("draws random numbers or takes scales into its sums", {"products": "fp16/stochastic"}),
    ("backward has a backward of its own", {"backward": "flash3_fp8"}),
    ("cure has no meaning in backward, which takes the maxima of forward", {"backward": {"cure": 2.0}}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "given"), WRONG, ids=[message[:40] for message, _ in WRONG])
def test_contradictions_are_errors_in_words(message: str, given: Any) -> None:
    with pytest.raises((ValueError, TypeError)) as error:
        Policy(attention=given)
    assert message in str(error.value)
