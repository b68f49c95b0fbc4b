"""Factors of delayed scaling, by step: against hand computation, and against the reference for random magnitudes."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fpsim
from fpsim.formats import parse_element
from fpsim.scaling.history import History, advanced, in_use, start
from fpsim.scaling.scale import Scale, parse_scale

CPU = torch.device("cpu")


def factors(amaxes: list[float], element: str, scale: Scale) -> list[float]:
    """The factor in use in each step."""
    fmt, history, used = parse_element(element), start(1, scale, CPU), []
    for amax in amaxes:
        latest = torch.tensor([amax], dtype=torch.float32)
        used.append(in_use(history, latest, fmt, scale).item())
        history = advanced(history, latest, torch.tensor([True]), fmt, scale)
    return used


BY_HAND = {
    # a jump by 64 in step 3: the old factor in that step, the new one for as long as the jump is in the history
    ("history:3", "tensor:fp32"): ([1, 1, 64, 1, 1, 1, 1], [1, 448, 448, 7, 7, 7, 448]),
    ("history:3:most_recent", "tensor:fp32"): ([1, 1, 64, 1, 1], [1, 448, 448, 7, 448]),
    ("history:1", "tensor:fp32"): ([2, 4, 8], [1, 224, 112]),
    # 448 / 10 is 44.8: the power of two below it
    ("history:2", "power_of_two"): ([10, 7, 7, 7], [1, 32, 32, 64]),
    # in steps 1 and 2, and again after an infinity, the factor of the step itself
    ("history:2:ms_amp", "power_of_two"): ([10, 7, 1, 1, math.inf, 1, 1, 2], [32, 64, 32, 64, 256, 256, 256, 256]),
    ("every:3", "power_of_two"): ([1, 100, 100, 7, 1, 1, 1], [256, 256, 256, 64, 64, 64, 256]),
    # Transformer Engine: a zero or an infinity changes nothing; an infinity stays in the history
    ("history:2", "tensor:fp32"): ([1, 0, math.inf, 2, 2, 2], [1, 448, 448, 448, 448, 224]),
    ("history:2:most_recent", "tensor:fp32"): ([1, math.nan, 2, 2], [1, 448, 448, 224]),
}


@pytest.mark.parametrize(("timing", "rule"), BY_HAND, ids=str)
def test_factors_by_hand(timing: str, rule: str) -> None:
    amaxes, want = BY_HAND[timing, rule]
    assert factors(amaxes, "e4m3fn", parse_scale(f"{rule}/{timing}")) == want


magnitudes = st.one_of(
    st.sampled_from([0.0, 2.0**-149, 2.0**-126, 2.0**-127, 3.4028234663852886e38, math.inf, math.nan, 1.0]),
    st.floats(0, 3.4028234663852886e38, width=32),
)


@given(
    st.lists(magnitudes, max_size=12),
    st.sampled_from(["e4m3fn", "e5m2", "e2m1fn", "int8"]),
    st.integers(1, 4),
    st.sampled_from(["max", "most_recent", "ms_amp"]),
    st.sampled_from(["fp32", "power_of_two"]),
)
def test_factors_are_those_of_the_reference(
    amaxes: list[float], element: str, length: int, order: str, rule: str
) -> None:
    exact = [fpsim.reference.NAN if math.isnan(x) else fpsim.reference.values.as_value(x) for x in amaxes]
    largest = Fraction(parse_element(element).max)
    want = fpsim.reference.delayed_scales(exact, largest, length, order, rule)
    name = "power_of_two" if rule == "power_of_two" else "tensor"
    assert factors(amaxes, element, parse_scale(f"{name}/history:{length}:{order}")) == [float(x) for x in want]


def test_rows_are_independent_and_rest_when_they_do_not_run() -> None:
    scale, fmt = parse_scale("tensor/history:2"), parse_element("e4m3fn")
    history = History(torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 3.0], [5.0, 6.0]]), torch.tensor([1, 2]))
    after = advanced(history, torch.tensor([9.0, 7.0]), torch.tensor([False, True]), fmt, scale)
    assert after.factors.tolist() == [1.0, 64.0] and after.updates.tolist() == [1, 3]
    assert after.amaxes.tolist() == [[0.0, 3.0], [6.0, 7.0]]


def test_every_step_of_a_ratio_is_current_scaling() -> None:
    amaxes = np.float32([3.7, 1e-30, 0.0, 2.0**-140, 1e38]).tolist()
    scale = parse_scale("tensor/every:1")
    want = [float(np.float32(a) / np.float32(448)) if a >= 2.0**-126 else 1.0 for a in amaxes]
    assert factors(amaxes, "e4m3fn", scale) == [max(w, 2.0**-100) for w in want]
    assert (
        factors([math.nan, 1.0, 2.0], "e4m3fn", parse_scale("tensor/every:2"))[1:]
        == [np.float32(1) / np.float32(448)] * 2
    )  # a step that is not finite is not counted


REFUSED = {
    "mx/history:16": "for scales of whole tensors, got 'block:32'",
    "row/calibrated": "for scales of whole tensors, got 'row'",
    "tensor/history:0": "counts steps: use 1 or more",
    "tensor/every:0": "counts steps: use 1 or more",
    "tensor/history": "unknown timing 'history' of a scale: use one of current, history:N",
    "tensor/history:16:mean": "unknown timing 'history:16:mean'",
    "tensor/later": "unknown scale 'tensor/later': use one of",
    "tensor:bf16/history:4": "takes the rules power_of_two and fp32, got 'bf16'",
    "tensor:asymmetric/every:4": "takes the rules power_of_two and fp32 and bf16, got 'asymmetric'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_timings_that_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"scale|timing") as error:
        parse_scale(name)
    assert REFUSED[name] in str(error.value)


@pytest.mark.parametrize("name", ["tensor:fp32/history:16", "power_of_two/history:8:ms_amp", "tensor:bf16/every:4"])
def test_names_are_read_back(name: str) -> None:
    assert str(parse_scale(name)) == name
    assert parse_scale(name.replace("history:8:", "history:08:")) == parse_scale(name)


def test_functions_without_state_refuse_timed_scales() -> None:
    x, layer = torch.ones(4), torch.nn.Linear(2, 2)
    for call in (
        lambda: fpsim.round(x, "e4m3fn/tensor/history:16"),
        lambda: fpsim.round(x, "e4m3fn", scale="power_of_two/every:4"),
        lambda: fpsim.round_parameters(layer, "e4m3fn/tensor/calibrated"),
        lambda: fpsim.round_optimizer(torch.optim.SGD(layer.parameters(), momentum=0.9), "e4m3fn/tensor/history:4"),
        lambda: fpsim.encode_blocks(x, "e4m3fn/tensor/history:4"),
    ):
        with pytest.raises(ValueError, match=r"keeps no state, and scale .* depends on other steps: leave out"):
            call()
    with pytest.raises(ValueError, match="belongs to a scale: write tensor/history:4 or power_of_two/history:4"):
        fpsim.Policy(format="e4m3fn/history:4")
