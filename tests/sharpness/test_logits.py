"""Logit sharpness: the closed form is the maximum over the box, and exactly the right tokens count.

The judge is mpmath with 120 digits, over every corner of the box: a convex function has its maximum at one of them.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import fpsim
from fpsim.sharpness import LogitMetrics, logit, logit_metrics, logits
from fpsim.sharpness.logits import last_of


def cross_entropy(z: list[mpmath.mpf], target: int) -> mpmath.mpf:
    return mpmath.log(mpmath.fsum(mpmath.exp(x) for x in z)) - z[target]


def brute_force(z: list[float], target: int, epsilon: float) -> float:
    """Keskar's sharpness by all corners of the box."""
    with mpmath.workdps(120):
        exact = [mpmath.mpf(x) for x in z]
        bounds = [mpmath.mpf(epsilon) * (abs(x) + 1) for x in exact]
        corners = itertools.product(*((x - b, x + b) for x, b in zip(exact, bounds, strict=True)))
        loss = cross_entropy(exact, target)
        return float(100 * (max(cross_entropy(list(corner), target) for corner in corners) - loss) / (1 + loss))


def random_batch(generator: torch.Generator, *shape: int, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    z = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
    return z, torch.randint(0, shape[-1], shape[:-1], generator=generator)


def assert_close(got: Tensor, want: Tensor, rtol: float = 1e-14) -> None:
    """Equal up to rounding errors: the last bit of a vectorised exponential depends on the position of the element."""
    torch.testing.assert_close(got, want, rtol=rtol, atol=1e-16, equal_nan=True)


def assert_same(got: LogitMetrics, want: LogitMetrics, rtol: float = 1e-14) -> None:
    for name, value in vars(want).items():
        assert_close(getattr(got, name), value, rtol)


logit_values = st.lists(st.floats(-60, 60), min_size=1, max_size=6)


@settings(deadline=None, max_examples=80)
@given(logit_values, st.integers(0, 5), st.sampled_from([1e-8, 5e-4, 1e-3, 0.1, 2.0]))
def test_closed_form_is_the_maximum_over_all_corners(z, target, epsilon):
    target %= len(z)
    found = logit(torch.tensor(z, dtype=torch.float64), torch.tensor(target), epsilon=epsilon).item()
    assert found == pytest.approx(brute_force(z, target, epsilon), rel=1e-12, abs=1e-110)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 2**32), st.sampled_from([2, 5, 100]), st.sampled_from([5e-4, 1e-2, 1.0]), st.sampled_from([1, 30])
)
def test_lbfgsb_never_exceeds_the_closed_form(seed, vocabulary, epsilon, scale):
    z, target = random_batch(torch.Generator().manual_seed(seed), 3, vocabulary, scale=scale)
    exact, searched = (logit(z, target, epsilon=epsilon, method=method) for method in ("exact", "lbfgsb"))
    assert (searched >= 0).all()
    assert (searched <= exact * (1 + 1e-12)).all()


def test_lbfgsb_reaches_the_closed_form_in_many_iterations(generator):
    z, target = random_batch(generator, 20, 8)
    exact = logit(z, target, epsilon=1e-2)
    torch.testing.assert_close(
        logit(z, target, epsilon=1e-2, method="lbfgsb", iterations=300), exact, rtol=1e-9, atol=0
    )
    ten = logit(z, target, epsilon=1e-2, method="lbfgsb")
    assert (ten > 0.5 * exact).all()


def test_random_points_of_the_box_lie_below(generator):
    z, target = random_batch(generator, 7)
    bound = 0.3 * (z.abs() + 1)
    points = z + bound * (2 * torch.rand(10_000, 7, generator=generator, dtype=torch.float64) - 1)
    loss = functional.cross_entropy(z, target)
    rises = functional.cross_entropy(points, target.expand(10_000), reduction="none") - loss
    assert 100 * rises.max() / (1 + loss) <= logit(z, target, epsilon=0.3)


def test_small_boxes_measure_the_weighted_gradient(generator):
    z, target = random_batch(generator, 5, 30)
    z.requires_grad_()
    loss = functional.cross_entropy(z, target, reduction="none")
    gradient = torch.autograd.grad(loss.sum(), z)[0]
    first_order = 100 * (gradient.abs() * (z.abs() + 1)).sum(-1) / (1 + loss)
    torch.testing.assert_close(logit(z, target, epsilon=1e-9) / 1e-9, first_order.detach(), rtol=1e-6, atol=0)


def test_confident_tokens_keep_their_digits():
    z = [60.0, -60.0, 20.0]
    found = logit(torch.tensor(z, dtype=torch.float64), torch.tensor(0))
    assert 0 < found < 1e-15
    assert found.item() == pytest.approx(brute_force(z, 0, 5e-4), rel=1e-12)


def test_it_is_invariant_to_the_order_of_words_and_not_to_a_shift(generator):
    z, target = random_batch(generator, 4, 9)
    order = torch.randperm(9, generator=generator)
    sharpness = logit(z, target)
    torch.testing.assert_close(logit(z[:, order], order.argsort()[target]), sharpness, rtol=1e-13, atol=0)
    assert (logit(z.abs() + 10, target) > logit(z.abs(), target)).all()


def test_it_grows_with_the_box(generator):
    z, target = random_batch(generator, 10, 9)
    sizes = torch.stack([logit(z, target, epsilon=epsilon) for epsilon in (1e-4, 5e-4, 1e-3, 1e-2, 1.0)])
    assert (sizes.diff(dim=0) > 0).all()


def test_huge_logits_do_not_overflow():
    z = torch.tensor([1e6, 3.0, -2e6], dtype=torch.float64)
    want = 100 * (5e-4 * (1e6 + 1) + 5e-4 * (3 + 1)) / (1 + 1e6 - 3)
    for method in ("exact", "lbfgsb"):
        assert logit(z, torch.tensor(1), method=method).item() == pytest.approx(want, rel=1e-9)
    assert logit(z / 1e6, torch.tensor(1), epsilon=1e4).isfinite()


@pytest.mark.parametrize("method", ["exact", "lbfgsb"])
def test_excluded_words_are_left_out(generator, method):
    z, target = random_batch(generator, 4, 6)
    padded = functional.pad(z, (0, 3), value=-math.inf)
    torch.testing.assert_close(
        logit(padded, target, method=method), logit(z, target, method=method), rtol=1e-14, atol=0
    )
    metrics, want = logit_metrics(padded, target, method=method), logit_metrics(z, target, method=method)
    for name in ("loss", "max_abs_logit", "mean_logit", "gradient_norm"):
        torch.testing.assert_close(getattr(metrics, name), getattr(want, name), rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", ["exact", "lbfgsb"])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_losses_that_are_not_finite_give_nan(method, wrong):
    z = torch.tensor([[1.0, 2.0, wrong], [1.0, 2.0, 3.0], [-math.inf, 1.0, 1.0]])
    found = logit(z, torch.tensor([0, 0, 0]), method=method)
    assert found.isnan().tolist() == [True, False, True]


def test_a_vocabulary_of_one_word_has_no_sharpness():
    assert logit(torch.tensor([[3.0]]), torch.tensor([0])).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_logits_are_measured_exactly(generator, dtype):
    z, target = random_batch(generator, 5, 50)
    assert torch.equal(logit(z.to(dtype), target), logit(z.to(dtype).double(), target))


def test_rounded_logits_are_measured_without_a_derivative(generator):
    z, target = random_batch(generator, 5, 6)
    rounded = fpsim.round(z.float().requires_grad_(), "e4m3fn")
    found = logit(rounded, target)
    assert not found.requires_grad
    want = [brute_force(row.tolist(), int(t), 5e-4) for row, t in zip(rounded.detach(), target, strict=True)]
    assert found.tolist() == pytest.approx(want, rel=1e-12)


# -- which tokens count ----------------------------------------------------------------------------------------


def test_ignored_and_masked_tokens_are_nan_and_do_not_affect_others(generator):
    z, target = random_batch(generator, 3, 4, 7)
    want = logit(z, target)
    ignored = target.clone()
    ignored[0, 1] = ignored[2] = -100
    mask = torch.rand(3, 4, generator=generator) < 0.7
    found = logit(z, ignored, mask=mask)
    counts = mask & (ignored != -100)
    assert torch.equal(found.isnan(), ~counts)
    assert_close(found[counts], want[counts])
    assert torch.equal(logit_metrics(z, ignored, mask=mask.int()).counted, counts)
    assert torch.equal(logit(z, ignored.where(ignored >= 0, -1), ignore_index=-1).isnan(), ignored < 0)


def test_last_takes_the_last_token_that_counts(generator):
    z, target = random_batch(generator, 4, 5, 7)
    want = logit(z, target)
    target[0, 3:] = -100  # padded on the right
    target[1, :2] = -100  # on the left
    target[2] = -100
    found = logit(z, target, tokens="last")
    assert found.isnan().tolist() == [False, False, True, False]
    assert_close(found[[0, 1, 3]], want[[0, 1, 3], [2, 4, 4]])
    metrics = logit_metrics(z, target, tokens="last")
    assert metrics.counted.tolist() == [True, True, False, True]
    assert torch.equal(metrics.sharpness.isnan(), ~metrics.counted)


def test_all_ignored_is_nan_everywhere():
    target = torch.full((2, 3), -100)
    assert logit(torch.randn(2, 3, 5), target).isnan().all()
    assert logit(torch.randn(2, 3, 5), target, tokens="last").shape == (2,)
    assert logit(torch.randn(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0,)
    assert logit_metrics(torch.randn(5), torch.tensor(-100)).loss.isnan()


def test_last_of_marks_one_or_none():
    rows = torch.tensor(list(itertools.product([False, True], repeat=4)))
    marks = last_of(rows)
    assert torch.equal(marks.sum(-1), rows.any(-1).long())
    assert (marks & ~rows).sum() == 0
    assert all(
        not row[int(mark.int().argmax()) + 1 :].any() for row, mark in zip(rows, marks, strict=True) if row.any()
    )


def test_strides_and_chunks_change_nothing(generator, monkeypatch):
    z, target = random_batch(generator, 3, 8, 11)
    want = logit_metrics(z, target)
    monkeypatch.setitem(logits.CHUNK, "cpu", 25)
    strided = torch.stack([z, z], dim=1)[:, 0].transpose(0, 2).contiguous().transpose(0, 2)
    assert not strided.is_contiguous()
    for got in (logit_metrics(z, target), logit_metrics(strided, target.int())):
        assert_same(got, want)


# -- the other measures ---------------------------------------------------------------------------------------


def test_baselines_match_their_definitions(generator):
    z, target = random_batch(generator, 3, 4, 9)
    z.requires_grad_()
    loss = functional.cross_entropy(z.flatten(0, 1), target.flatten(), reduction="none").view(3, 4)
    gradient = torch.autograd.grad(loss.sum(), z)[0]
    metrics = logit_metrics(z, target)
    torch.testing.assert_close(metrics.loss, loss.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(metrics.gradient_norm, gradient.norm(dim=-1), rtol=1e-12, atol=0)
    assert torch.equal(metrics.max_abs_logit, z.detach().abs().amax(-1))
    torch.testing.assert_close(metrics.mean_logit, z.detach().mean(-1), rtol=1e-12, atol=1e-14)
    assert torch.equal(metrics.sharpness, logit(z, target))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon must be a positive number, got 0.0"),
        ({"epsilon": math.nan}, ValueError, "epsilon"),
        ({"method": "newton"}, ValueError, "unknown method 'newton': use one of exact, lbfgsb"),
        ({"tokens": "first"}, ValueError, "unknown tokens 'first'"),
        ({"method": "lbfgsb", "iterations": 0}, ValueError, "iterations"),
        ({"mask": torch.ones(3)}, ValueError, r"mask must have the shape of targets, got \(3,\) and \(2,\)"),
        ({"targets": torch.tensor([0, 3])}, ValueError, "target 3 is not in the vocabulary: targets are 0 to 2"),
        ({"targets": torch.tensor([-1, 0])}, ValueError, "target -1"),
        ({"targets": torch.tensor([0])}, ValueError, r"got \(2, 3\) and \(1,\)"),
        ({"targets": torch.tensor([0.0, 1.0])}, TypeError, "targets must be an integer tensor"),
        ({"logits": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "logits must be a floating-point tensor"),
        ({"logits": torch.ones(3), "targets": torch.tensor(0), "tokens": "last"}, ValueError, "use 'all'"),
    ],
)
def test_errors_name_the_value_and_the_remedy(arguments, error, message):
    keywords = {"logits": torch.zeros(2, 3), "targets": torch.tensor([0, 1]), **arguments}
    with pytest.raises(error, match=message):
        logit(**keywords)


_MEMORY = """
import torch
from fpsim.sharpness import gradient_norm, logit, logit_metrics

def mebibytes(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

def extra(function):
    function(slice(1))  # loads code
    open("/proc/self/clear_refs", "w").write("5")  # forgets the peak
    before = mebibytes("VmRSS")
    function(slice(None))
    return (mebibytes("VmHWM") - before) / (z.nbytes / 2**20)

torch.set_num_threads(1)
z, t = torch.randn(256, 50257), torch.randint(0, 50257, (256,))
print(extra(lambda rows: logit_metrics(z[rows], t[rows])))
head = torch.nn.Linear(8, 50257).eval()
print(extra(lambda rows: gradient_norm(head, [(torch.randn(256, 8)[rows], t[rows])])))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_stays_below_twice_the_logits_of_a_vocabulary_of_50257():
    done = subprocess.run([sys.executable, "-c", _MEMORY], capture_output=True, text=True, check=True)
    metrics, gradient = map(float, done.stdout.split())
    assert metrics < 1  # in addition to the logits
    assert gradient < 3  # including the model's logits and their gradient
