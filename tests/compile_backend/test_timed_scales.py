"""Delayed, renewed and calibrated scales in compiled models: bits, steps, state, and every way to go wrong.

Operands are multiplied by a unit matrix, so that results and gradients are the rounded operands. The factors come from
`fpsim.reference.delayed_scales`, and ml_dtypes rounds.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fpsim
from fpsim.compile_backend import UnroundedError
from tests.compile_backend.two_ranks_with_history import SHARES, Unit, numbers, work
from tests.shared.models import BACKENDS_OF_A_GRAPH
from tests.shared.ranks import results_of_two_ranks

BACKENDS = ("fpsim", "fpsim_eager")
TE = {"activation": "e4m3fn/tensor/history:3", "gradient": "e5m2/tensor/history:2:most_recent"}
MS_AMP = {"activation": "e4m3fn/power_of_two/history:2:ms_amp", "gradient": "e5m2/power_of_two/history:2:ms_amp"}
DTYPES = {"e4m3fn": (ml_dtypes.float8_e4m3fn, 448.0), "e5m2": (ml_dtypes.float8_e5m2, 57344.0)}


def rounded(x: Tensor, factor: float, format: str) -> Tensor:
    """``x`` scaled, rounded to nearest, saturated and scaled back, in float32."""
    dtype, largest = DTYPES[format]
    scaled = np.clip(x.numpy() * np.float32(factor), -largest, largest).astype(dtype).astype(np.float32)
    return torch.from_numpy(scaled * (np.float32(1) / np.float32(factor)))


def delayed(tensors: Sequence[Tensor], format: str, length: int, order: str, rule: str) -> list[float]:
    amaxes = [x.abs().max().item() for x in tensors]
    return [float(s) for s in fpsim.reference.delayed_scales(amaxes, int(DTYPES[format][1]), length, order, rule)]


def step(model: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(dy)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def inputs(amaxes: Sequence[float], seed: int) -> list[Tensor]:
    return [numbers(amax, seed + i) for i, amax in enumerate(amaxes)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_transformer_engine_uses_the_factors_of_earlier_steps(backend: str) -> None:
    """A tensor that jumps by 64 in step 3 saturates exactly there, and stays coarse while the jump is remembered."""
    xs, dys = inputs([1, 1, 64, 1, 1, 1, 1], 10), inputs([1e-3, 2e-3, 1e-3, 0.5, 1e-3, 1e-3, 1e-3], 30)
    model = torch.compile(Unit(), backend=backend, options=TE)
    forward, backward = delayed(xs, "e4m3fn", 3, "max", "fp32"), delayed(dys, "e5m2", 2, "most_recent", "fp32")
    for i, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        y, dx = step(model, x, dy)
        assert torch.equal(y, rounded(x, forward[i], "e4m3fn")), i
        assert torch.equal(dx, rounded(dy, backward[i], "e5m2")), i
        assert (y.abs().max() < x.abs().max() / 2) == (i == 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inverse_factors_multiply_the_result_of_the_product(backend: str) -> None:
    """Elements are multiplied, exactly here. Then come both inverse factors, as one number, and then the bias."""
    layer = nn.Linear(8, 8)
    layer.weight.data = torch.arange(-32.0, 32.0).view(8, 8) / 5
    x = torch.arange(-16.0, 16.0).view(4, 8) / 3
    model = torch.compile(layer, backend=backend, options={"format": "e4m3fn/tensor/history:2"})
    step(model, x, torch.ones(4, 8))
    factors = [np.float32(448) / np.float32(t.abs().max().item()) for t in (x, layer.weight.detach())]
    elements = [
        torch.from_numpy(np.clip(t.numpy() * s, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
        for t, s in zip((x, layer.weight.detach()), factors, strict=True)
    ]
    product = (elements[0] @ elements[1].T).float()
    want = product * float(np.float32(1) / factors[0] * (np.float32(1) / factors[1])) + layer.bias
    assert torch.equal(step(model, x, torch.ones(4, 8))[0], want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_to_once(dtype: torch.dtype, backend: str) -> None:
    model = torch.compile(Unit().to(dtype), backend=backend, options={"activation": "e4m3fn/tensor/history:2"})
    xs = [numbers(amax, i).to(dtype) for i, amax in enumerate((3.0, 5.0, 2.0))]
    factors = delayed(xs, "e4m3fn", 2, "max", "fp32")
    for x, factor in zip(xs, factors, strict=True):
        exact = x.double() * factor if dtype == torch.float64 else (x.float() * np.float32(factor)).double()
        elements = torch.from_numpy(exact.clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
        inverse = float(np.float32(1) / np.float32(factor))
        want = elements * inverse if dtype == torch.float64 else (elements.float() * np.float32(inverse)).to(dtype)
        assert torch.equal(step(model, x, x)[0], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_without_elements_has_no_magnitude(backend: str) -> None:
    model = torch.compile(Unit(), backend=backend, options=TE, dynamic=False)
    step(model, numbers(7.0, 1), numbers(1.0, 2))
    before = fpsim.scale_state(model)
    y, dx = step(model, torch.empty(0, 8), torch.empty(0, 8))
    assert y.shape == dx.shape == (0, 8)
    assert_same_state(fpsim.scale_state(model), before)


def test_a_step_that_the_scaler_skips_ends_no_step_of_ms_amp() -> None:
    module = Unit()
    model = torch.compile(module, backend="fpsim_eager", options=MS_AMP)
    optimizer, scaler = torch.optim.SGD(module.parameters()), torch.amp.GradScaler("cpu", init_scale=1.0)
    name = "layer activation forward [e4m3fn/power_of_two/history:2:ms_amp]"
    for overflows, updates in ((False, 1), (True, 1), (False, 2)):
        scaler.scale(model(numbers(1.0, 1)).sum()).backward()
        if overflows:
            module.layer.weight.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert fpsim.scale_state(model)[name]["updates"] == updates


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_ms_amp_ends_a_step_when_the_optimizer_has_stepped(backend: str, accumulated: int) -> None:
    """In the first two steps, and after an infinity, the factor is that of the tensor itself."""
    xs, dys = inputs([10, 7, 1, 1, 5, 1, 1, 2], 10), inputs([1, 2, 3, 4, 1, 1, 1, 1], 30)
    dys[3][0, 0] = torch.inf
    module = Unit()
    model, optimizer = torch.compile(module, backend=backend, options=MS_AMP), torch.optim.SGD(module.parameters(), 0.0)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    forward, backward = (delayed(t, f, 2, "ms_amp", "power_of_two") for t, f in ((xs, "e4m3fn"), (dys, "e5m2")))
    for i, (x, dy) in enumerate(zip(xs, dys, strict=True)):
        for half in range(accumulated):  # the first half has smaller numbers, so that the second decides
            y, dx = step(model, x, dy) if half == accumulated - 1 else step(model, x / 16, dy / 16)
        assert torch.equal(y, rounded(x, forward[i], "e4m3fn")), i
        assert torch.equal(dx[1:], rounded(dy, backward[i], "e5m2")[1:]), i  # infinity times 0 is NaN
        other.step()  # of another model
        optimizer.zero_grad()
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_other_step_renews_the_scale(backend: str) -> None:
    xs = inputs([1, 64, 64, 1, 1], 10)
    model = torch.compile(Unit(), backend=backend, options={"activation": "e4m3fn/power_of_two/every:2"})
    for x, factor in zip(xs, [256, 256, 4, 4, 256], strict=True):
        assert torch.equal(step(model, x, x)[0], rounded(x, factor, "e4m3fn"))


@pytest.mark.parametrize("backend", BACKENDS_OF_A_GRAPH)
def test_inference_uses_the_factors_and_changes_none(backend: str) -> None:
    model = torch.compile(Unit(), backend=backend, options=TE)
    step(model, numbers(7.0, 1), numbers(1.0, 2))
    before = fpsim.scale_state(model)
    x = numbers(1000.0, 3, rows=5)  # and another shape, for which the model is compiled again
    with torch.no_grad():
        assert torch.equal(model(x), rounded(x, 64.0, "e4m3fn"))
    assert_same_state(fpsim.scale_state(model), before)


def assert_same_state(got: fpsim.compile_backend.timed_scales.ScaleState, want: Any) -> None:
    assert got.keys() == want.keys()
    for name, state in want.items():
        for key, value in state.items():
            mine = got[name][key]
            assert mine is value is None or torch.equal(mine, value), (name, key)


def weights_train(model: Any, module: nn.Module, steps: range) -> list[Tensor]:
    """Steps in which everything is rounded with delayed scales, and the results."""
    optimizer, results = torch.optim.SGD(module.parameters(), 2.0**-7), []
    for i in steps:
        y, dx = step(model, numbers(2.0 ** (i % 3), i), numbers(2.0 ** (i % 2), 50 + i))
        optimizer.step()
        optimizer.zero_grad()
        results += [y, dx, module.layer.weight.detach().clone()]
    return results


MIXED = {"format": "e4m3fn/tensor/history:4", "gradient": "e5m2/power_of_two/history:3:ms_amp"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(backend: str) -> None:
    whole = Unit()
    want = weights_train(torch.compile(whole, backend=backend, options=MIXED), whole, range(7))
    first = Unit()
    compiled = torch.compile(first, backend=backend, options=MIXED)
    got = weights_train(compiled, first, range(4))
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "scales": fpsim.scale_state(compiled)}, file)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    second = Unit()
    second.load_state_dict(saved["model"])
    resumed = torch.compile(second, backend=backend, options=MIXED)
    fpsim.load_scale_state(resumed, saved["scales"])
    assert_same_state(fpsim.scale_state(resumed), saved["scales"])
    got += weights_train(resumed, second, range(4, 7))
    assert all(map(torch.equal, got, want)) and len(got) == len(want)


def test_backends_agree_in_results_and_state() -> None:
    modules = [Unit(), Unit()]
    models = [torch.compile(m, backend=b, options=MIXED) for m, b in zip(modules, BACKENDS, strict=True)]
    results = [weights_train(model, module, range(4)) for model, module in zip(models, modules, strict=True)]
    assert all(map(torch.equal, *results))
    assert_same_state(*map(fpsim.scale_state, models))
    assert sorted(fpsim.scale_state(models[0])) == [
        "layer activation forward [e4m3fn/tensor:fp32/history:4]",
        "layer gradient backward [e5m2/power_of_two/history:3:ms_amp]",
        "layer weight forward [e4m3fn/tensor:fp32/history:4]",
    ]


@pytest.mark.parametrize("backend", BACKENDS_OF_A_GRAPH)
def test_a_checkpoint_inside_counts_a_magnitude_once(backend: str) -> None:
    modules = [Unit(), Unit(checkpointed=True)]
    models = [torch.compile(module, backend=backend, options=MIXED) for module in modules]
    results = [weights_train(model, module, range(4)) for model, module in zip(models, modules, strict=True)]
    assert all(map(torch.equal, *results))
    assert_same_state(*map(fpsim.scale_state, models))


def test_a_checkpoint_around_is_refused() -> None:
    model = torch.compile(Unit(), backend="fpsim_eager", options=TE)
    y = checkpoint(model, numbers(1.0, 1).requires_grad_(), use_reentrant=False)
    with pytest.raises(UnroundedError, match=r"put torch.utils.checkpoint inside the compiled model"):
        y.sum().backward()


def test_two_models_and_a_copy_of_the_options_have_states_of_their_own() -> None:
    first, second = (torch.compile(Unit(), backend="fpsim_eager", options=TE) for _ in range(2))
    step(first, numbers(7.0, 1), numbers(1.0, 2))
    x = numbers(1.0, 3)
    assert torch.equal(step(second, x, x)[0], rounded(x, 1.0, "e4m3fn"))
    assert torch.equal(step(first, x, x)[0], rounded(x, 64.0, "e4m3fn"))


def test_reports_leave_the_state_alone() -> None:
    module = Unit()
    model = torch.compile(module, backend="fpsim_eager", options=TE)
    x = numbers(7.0, 1)
    step(model, x, x)
    before = fpsim.scale_state(model)
    sites = fpsim.explain(module, x, policy=TE).sites
    assert [site.scales for site in sites] == ["1, in the epilogue" if site.cast else "" for site in sites]
    fpsim.audit(module, x, policy=TE)
    profile = fpsim.profile(module, x, policy=TE)
    site = next(site for site in profile.sites if site.role == "activation")
    assert site.statistics.saturations == 0 and site.statistics.amax == 7.0
    large = numbers(1000.0, 2)  # the first factor is 1, so that what exceeds 448 saturates
    site = next(s for s in fpsim.profile(module, large, policy=TE).sites if s.role == "activation")
    assert site.statistics.saturations == int((large.abs() > 448).sum()) > 0
    assert_same_state(fpsim.scale_state(model), before)


@pytest.mark.parametrize("backend", BACKENDS_OF_A_GRAPH)
def test_graphs_of_one_call_have_sites_of_their_own(backend: str) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        torch._dynamo.graph_break()
        return (y * 64) @ w

    model = torch.compile(function, backend=backend, options={"activation": "e4m3fn/power_of_two/history:2"})
    x = numbers(1.0, 1)
    model(x, torch.eye(8))
    assert {name: state["factors"].item() for name, state in fpsim.scale_state(model).items()} == {
        "(root) activation forward [e4m3fn/power_of_two/history:2]": 256.0,
        "(root) activation 2 forward [e4m3fn/power_of_two/history:2]": 256.0,
        "graph 1: (root) activation forward [e4m3fn/power_of_two/history:2]": 4.0,
        "graph 1: (root) activation 2 forward [e4m3fn/power_of_two/history:2]": 256.0,
    }


@pytest.mark.parametrize("backend", BACKENDS_OF_A_GRAPH)
def test_calibrated_scales_are_fixed(backend: str) -> None:
    policy = fpsim.Policy(activation="e4m3fn/power_of_two/calibrated")
    module = Unit().eval()
    state = fpsim.calibrate(module, [numbers(3.0, 1), (numbers(7.0, 2),), {"x": numbers(5.0, 3)}], policy)
    model = torch.compile(module, backend=backend, options={"policy": policy})
    x = numbers(100.0, 4)
    with pytest.raises(RuntimeError, match=r"has no calibrated scale: call fpsim.calibrate with batches that reach it"):
        model(x)
    fpsim.load_scale_state(model, state)
    for _ in range(2):
        assert torch.equal(step(model, x, x)[0], rounded(x, 64.0, "e4m3fn"))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="no scale of the policy is calibrated: use a format such as"):
        fpsim.calibrate(Unit(), [torch.ones(2, 8)], "fp8_hybrid")
    with pytest.raises(ValueError, match="there is no batch to calibrate with"):
        fpsim.calibrate(Unit(), [], {"format": "int8/tensor/calibrated"})
    with pytest.raises(TypeError, match="Unit is not compiled by fpsim"):
        fpsim.scale_state(Unit())
    model = torch.compile(Unit(), backend="fpsim_eager", options=TE)
    with pytest.raises(ValueError, match="'a' is no state of a scale"):
        fpsim.load_scale_state(model, {"a": {"factors": torch.ones(())}})
    step(model, numbers(1.0, 1), numbers(1.0, 2))
    state = fpsim.scale_state(model)
    for each in state.values():
        each["amaxes"] = torch.zeros(7)
    fpsim.load_scale_state(model, state)
    with pytest.raises(ValueError, match=r"has amaxes of shape \(1, 7\), and its scale .* needs"):
        model(numbers(1.0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output": "e4m3fn/tensor/history:4"}, "leave 'history:4' out|leave out 'history:4'"),
        ({"elementwise": "e4m3fn/power_of_two/every:4"}, "leave 'every:4' out|leave out 'every:4'"),
        ({"activation": "e4m3fn/tensor/history:4/hadamard:16"}, "name a transform of products in the policy"),
    ],
)
def test_policies_that_are_refused(options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fpsim.Policy.from_options(options)


def test_a_machine_refuses_a_delayed_power_of_two() -> None:
    options = {"format": "e4m3fn/power_of_two/history:4", "accumulator": "hopper_fp8"}
    with pytest.raises(Exception, match=r"multiplies elements, and .* gives elements times scales that are"):
        torch.compile(Unit(), backend="fpsim_eager", options=options)(numbers(1.0, 1))


def test_magnitudes_are_those_of_all_ranks(tmp_path: Path) -> None:
    """Both ranks use the factors of the larger of their magnitudes, in both directions, under DDP and FSDP2."""
    ranks = results_of_two_ranks(work, tmp_path)
    amaxes = [max(pair) for pair in zip(*SHARES, strict=True)]
    want = [float(s) for s in fpsim.reference.delayed_scales(amaxes, 448, 2)]
    for case in ("ddp", "fsdp"):
        for rank, result in enumerate(ranks):
            for i, factor in enumerate(want):
                x = numbers(SHARES[rank][i], i)
                assert torch.equal(result[case]["outputs"][i], rounded(x, factor, "e4m3fn")), (case, rank, i)
                assert torch.equal(result[case]["gradients"][i], rounded(x, factor, "e4m3fn")), (case, rank, i)
