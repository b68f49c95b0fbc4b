"""Accumulators as values: their text, the policies that name them, and the table of machines."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from fpsim import FloatFormat, Policy, parse_format
from fpsim.accumulators.accumulator import parse_accumulator
from fpsim.accumulators.machines import MACHINES

#: Arguments and the text of the accumulator.
TEXTS: list[tuple[dict[str, Any], str]] = [
    ({"accumulator": "fp16"}, "e5m10/nearest_even/ovf_inf"),
    ({"accumulator": FloatFormat(5, 10)}, "e5m10/nearest_even/ovf_inf"),
    ({"accumulator": "e4m3fn/toward_zero"}, "e4m3fn/toward_zero/sat_finite"),
    ({"accumulator": "e8m13/stochastic:4", "chunk": 8}, "e8m13/stochastic:4/ovf_inf chunk=8"),
    ({"accumulator": "fp16", "chunk": 1}, "e5m10/nearest_even/ovf_inf"),
    ({"accumulator": "fp16", "order": ("chunked", 4)}, "e5m10/nearest_even/ovf_inf chunk=4"),
    ({"accumulator": "fp16", "order": "multiply_add", "promote": 7},
     "e5m10/nearest_even/ovf_inf order=multiply_add promote=7"),
    ({"accumulator": "fp16", "order": ["aligned", 32, 13], "promote": 64},
     "e5m10/nearest_even/ovf_inf order=aligned:32:13 promote=64"),
    ({"accumulator": "hopper_fp8", "promote": 128}, "hopper_fp8 promote=128"),
    ({"accumulator": "ampere/fp16"}, "ampere/fp16"),
    ({"accumulator": "ampere/fp32"}, "ampere"),
    ({"accumulator": "int32"}, "int32/wrap"),
    ({"accumulator": "int16/sat_finite"}, "int16/sat_finite"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "text"), TEXTS)
def test_the_text_of_an_accumulator_reads_as_the_accumulator(arguments: dict[str, Any], text: str) -> None:
    accumulator = parse_accumulator(**arguments)
    assert str(accumulator) == text
    assert parse_accumulator(text) == accumulator == parse_accumulator(accumulator)


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_has_a_text_and_formats(name: str) -> None:
    machine = MACHINES[name]
    assert str(parse_accumulator(name)) == name and parse_accumulator(name).machine is machine
    for names, length in machine.operands:
        assert machine.length(*map(parse_format, names)) == length


def test_a_policy_stores_accumulators_and_writes_them_as_json() -> None:
    kinds = {"fprop": "hopper_fp8", "wgrad": "e8m13/toward_zero"}
    policy = Policy(format="e4m3fn", accumulator=kinds, chunk={"wgrad": 32}, promote={"fprop": 128, "wgrad": 128})
    assert policy.to_dict()["accumulator"] == {
        "fprop": "hopper_fp8 promote=128", "wgrad": "e8m13/toward_zero/ovf_inf chunk=32 promote=128",
    }  # fmt: skip
    assert policy.accumulator_of("dgrad") is None
    for each in (policy, Policy(accumulator="fp16", order=("aligned", 4, 9)), Policy(accumulator="fp16", chunk=4)):
        assert Policy.from_json(each.to_json()) == each == pickle.loads(pickle.dumps(each))
        assert dataclasses.replace(each, attention="keep").accumulator == each.accumulator
        assert len({each.canonical(), Policy.from_json(each.to_json()).canonical(), Policy().canonical()}) == 2
    assert Policy(accumulator="fp16").to_dict() == {"accumulator": "e5m10/nearest_even/ovf_inf"}
    assert Policy(accumulator="fp16") == Policy(accumulator="e5m10") == Policy(accumulator=parse_accumulator("fp16"))
    assert Policy(format="bf16", accumulator={"fprop": "none"}) == Policy(format="bf16")
    assert Policy(format="bf16", accumulator="fp16/stochastic").is_stochastic
    assert Policy(format="bf16", modules={"a": {"format": "bf16", "accumulator": "fp16/stochastic"}}).is_stochastic


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 4}, "chunk is that of an accumulator, and fprop has none: name accumulator too"),
        (
            {"accumulator": {"fprop": "fp16"}, "chunk": {"dgrad": 4}},
            "chunk is that of an accumulator, and dgrad has none",
        ),
        ({"accumulator": {"forward": "fp16"}}, "unknown kind 'forward' in accumulator: use fprop, dgrad, wgrad"),
        ({"accumulator": "hopper", "chunk": 4}, "hopper has its own order: leave out chunk=4"),
        ({"accumulator": "hoppr"}, "unknown accumulator 'hoppr' .did you mean 'hopper'"),
        ({"accumulator": "fp16 chunk=x"}, "cannot read 'chunk=x' in accumulator 'fp16 chunk=x'"),
        ({"accumulator": "fp16 chunk=4", "promote": 8}, "'fp16 chunk=4' has its own order: leave out"),
    ],
)
def test_bad_accumulators_of_policies_name_the_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy(**fields)
