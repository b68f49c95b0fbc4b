"""`compare` against losses that are computed by hand, with operands rounded by `fpsim.round`."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fpsim
from fpsim.curvature import label_count
from fpsim.evaluate import compare, search, sensitivity
from fpsim.evaluate.policies import parse_policy

POLICIES = {"coarse": "e2m1fn", "rows": {"activation": "int8/row", "weight": "int8/row"}, "bf16": "bf16"}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


@pytest.fixture
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in (4, 7, 4, 5)]


def by_hand(model, x, cast, result=None):
    """The output of ``model``, whose operands and results are rounded."""
    for layer in model:
        if not isinstance(layer, nn.Linear):
            x = layer(x)
            continue
        operands = x, layer.weight
        if cast is not None:
            operands = [fpsim.round(each, cast, axis=-1) for each in operands]
        x = operands[0] @ operands[1].T + layer.bias
        x = x if result is None else fpsim.round(x, result)
    return x


def test_losses_differences_and_errors_are_those_computed_by_hand(model, batches):
    seen = []
    result = compare(model, iter(batches), POLICIES, loss=cross_entropy, progress=seen.append)
    assert seen == [1, 2, 3, 4]
    casts = {"unrounded": (None, None), "coarse": ("e2m1fn", None), "rows": ("int8/row", None), "bf16": ("bf16",) * 2}
    assert [row.name for row in result.rows] == list(casts)
    with torch.no_grad():
        losses = {
            name: torch.stack([cross_entropy(by_hand(model, x, *cast), y) for x, y in batches]).double()
            for name, cast in casts.items()
        }
    for name, want in losses.items():
        row, change = result[name], want - losses["unrounded"]
        assert row.values == pytest.approx(want.tolist(), abs=1e-6)
        assert row.mean.value == pytest.approx(float(want.mean()), abs=1e-6)
        assert row.mean.stderr == pytest.approx(float(want.std() / 2), abs=1e-6)
        assert row.difference.value == pytest.approx(float(change.mean()), abs=1e-6)
        assert row.difference.stderr == pytest.approx(float(change.std() / 2), abs=1e-6)
        assert row.nonfinite == 0 and row.seconds > 0
    assert result["unrounded"].policy is None and result["bf16"].policy == fpsim.Policy.preset("bf16")


def test_weights_make_the_mean_over_batches_that_over_tokens(model, batches):
    result = compare(model, batches, "e2m1fn", loss=cross_entropy, weight=label_count, metric="perplexity")
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        want, exact = (float(cross_entropy(by_hand(model, x, cast), y)) for cast in ("e2m1fn", None))
    row = result["e2m1fn"]
    assert result.weights == (4, 7, 4, 5)
    assert row.mean.value == pytest.approx(want, abs=1e-6)
    assert row.perplexity == pytest.approx(math.exp(want), rel=1e-5)
    assert row.difference.value == pytest.approx(want - exact, abs=1e-6)
    changes = torch.tensor(row.values, dtype=torch.float64) - torch.tensor(result["unrounded"].values)
    parts = torch.tensor([4, 7, 4, 5]) / 20
    variance = (parts**2 * (changes - row.difference.value) ** 2).sum() * 4 / 3
    assert row.difference.stderr == pytest.approx(float(variance**0.5), rel=1e-5)


def test_mappings_other_batches_and_metrics(model, batches):
    class WithLoss(nn.Module):
        def forward(self, x, labels):
            logits = model(x)
            return {"logits": logits}, cross_entropy(logits, labels)

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, labels):
            return cross_entropy(self.inner(x), labels)

    mappings = [{"x": x, "labels": y} for x, y in batches]
    want = compare(model, batches, "e2m1fn", loss=cross_entropy)["e2m1fn"].values
    whole = Output().eval()
    assert compare(whole, mappings, "e2m1fn")["e2m1fn"].values == pytest.approx(want, abs=1e-6)
    assert compare(whole, batches, "e2m1fn")["e2m1fn"].values == pytest.approx(want, abs=1e-6)
    assert compare(model, [x for x, _ in batches], "bf16", loss=lambda out: out.mean())["bf16"].nonfinite == 0

    def accuracy(logits, labels):
        return (logits.argmax(-1) == labels).double().mean()

    result = compare(model, batches, "e2m1fn", metric=accuracy)
    with torch.no_grad():
        hits = [float(accuracy(by_hand(model, x, "e2m1fn"), y)) for x, y in batches]
    assert result.measure == "accuracy" and result["e2m1fn"].values == tuple(hits)
    with pytest.raises(TypeError, match=r"returned tuple instead of a loss"):
        compare(WithLoss().eval(), mappings, "e2m1fn")


def test_an_overflow_is_counted_and_never_averaged_away(model, batches):
    with torch.no_grad():
        model[2].weight.mul_(1e6)
    row = compare(model, batches, {"x": "e5m2/ovf_inf"}, loss=cross_entropy)["x"]
    assert row.nonfinite == 4 and not math.isfinite(row.mean.value) and not math.isfinite(row.difference.value)


def test_results_are_shown_as_text_frames_html_and_plots(model, batches):
    pytest.importorskip("matplotlib")
    result = compare(model, batches, ["bf16", "e2m1fn"], loss=cross_entropy, metric="perplexity")
    frame = result.to_pandas()
    assert list(frame["policy"]) == ["unrounded", "bf16", "e2m1fn"]
    assert list(frame["difference"]) == [row.difference.value for row in result.rows]
    for text in (str(result), result._repr_html_()):
        assert all(word in text for word in ("bf16", "e2m1fn", "perplexity", f"{result.rows[2].perplexity:.6g}"))
    lines = result.plot().get_lines()
    assert lines[0].get_xdata().tolist() == [row.difference.value for row in result.rows[1:]]


def test_policies_are_presets_casts_pairs_values_or_files(tmp_path):
    path = tmp_path / "best.json"
    path.write_text(fpsim.Policy(format="e3m2fn").to_json())
    assert parse_policy(str(path)) == fpsim.Policy(format="e3m2fn")
    assert parse_policy("bf16") == fpsim.Policy.preset("bf16") != fpsim.Policy(format="bf16")
    assert parse_policy("mxfp8") == fpsim.Policy.preset("mxfp8")
    assert parse_policy("e4m3fn+e5m2") == fpsim.Policy(activation="e4m3fn", weight="e4m3fn", gradient="e5m2")
    assert parse_policy("fp32") == fpsim.Policy(format="fp32")
    assert parse_policy(None) is None and parse_policy("unrounded") is None
    with pytest.raises(ValueError, match="cannot read the format 'e4m3fm'"):
        parse_policy("e4m3fm")


def test_wrong_input_is_refused_with_a_remedy(model, batches):
    partly_training = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).eval()
    partly_training[1].train()
    cases = [
        ({"policies": {"x": {"gradient": "e5m2"}}}, ValueError, "policy 'x' rounds nothing in the forward pass"),
        ({"policies": {"x": {"format": "bf16", "skip": "*"}}}, ValueError, "policy 'x' rounds nothing.*left unrounded"),
        ({"policies": {"x": {"format": "bf16", "skip": "7"}}}, ValueError, "cannot be rounded to x.*'7' matches no"),
        ({"policies": ["bf16", " bf16 "]}, ValueError, "the policy 'bf16' is given twice: leave one out"),
        ({"policies": "bf16,mxfp8"}, ValueError, "'bf16,mxfp8' has a comma.*name policies one by one"),
        ({"policies": []}, ValueError, "there is no policy"),
        ({"batches": []}, ValueError, "there is no batch"),
        ({"batches": batches[0][0]}, ValueError, "one batch"),
        ({"batches": [{"x": 1}][0]}, ValueError, "one batch"),
        ({"batches": [()]}, ValueError, r"a batch is \(\): a tuple or a list holds the inputs"),
        ({"batches": batches[0]}, TypeError, r"cross_entropy does not fit.* a Tensor here.*'target'.* pass \[batch\]"),
        ({"loss": lambda out: out.sum()}, TypeError, r"a tuple of 2 here, and is used as function\(model\(batch\[0\]"),
        ({"metric": "perplexitty"}, ValueError, "unknown metric 'perplexitty'"),
        ({"loss": lambda out, y: out}, ValueError, "one number, got a tensor of shape"),
        ({"loss": lambda out, y: out.sum() / 0}, FloatingPointError, "unrounded model is .* on batch 0"),
        ({"weight": lambda batch: 0}, ValueError, "batch 0 has the weight 0"),
        ({"model": nn.Linear(2, 2)}, ValueError, r"training mode.*model\.eval\(\)"),
        ({"model": torch.compile(model)}, ValueError, "compiled"),
        ({"model": torch.relu}, TypeError, r"torch\.nn\.Module"),
        ({"model": partly_training}, ValueError, "1 is in training mode"),
        ({"backend": "inductor"}, ValueError, "unknown backend 'inductor'"),
        ({"policies": {"format": "bf16"}}, ValueError, "is one policy.*give it in a list"),
        ({"policies": {"unrounded": "bf16"}}, ValueError, "'unrounded' is that of the model without rounding"),
        ({"metric": lambda out, y: None}, TypeError, "the metric must be one number, got None"),
        ({"metric": lambda out, y: math.nan}, FloatingPointError, "the .*lambda.* of the unrounded model is nan"),
    ]  # fmt: skip
    for changes, error, message in cases:
        with pytest.raises(error, match=message):
            compare(**{"model": model, "batches": batches, "policies": "bf16", "loss": cross_entropy, **changes})

    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            out = self.inner(x)
            x.mul_(2)
            return out

    with pytest.raises(ValueError, match="batch 0 has changed while it was in use"):
        compare(Writes().eval(), [(x.clone(), y) for x, y in batches], "bf16", loss=cross_entropy)


class Counting(nn.Module):
    """A model that keeps a state: each run has a greater scale."""

    def __init__(self, *, in_buffer):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        if in_buffer:
            self.register_buffer("runs", torch.zeros(()))
        else:
            self.runs = 0

    def forward(self, x):
        self.runs += 1
        return self.linear(x) * self.runs


@pytest.mark.parametrize("measure", [compare, sensitivity, search])
def test_a_model_that_keeps_a_state_is_refused(measure):
    options = {
        compare: {"policies": ["bf16"]},
        sensitivity: {"policy": "bf16", "estimates": False},
        search: {"formats": ["bf16", "e4m3fn"], "tolerance": 1},
    }
    batch = (torch.randn(2, 5), torch.tensor([0, 2]))
    for in_buffer, message in ((True, "changes its buffers when it runs"), (False, r"on batch 0 is .* in one run and")):
        with pytest.raises(ValueError, match=message):
            measure(Counting(in_buffer=in_buffer).eval(), [batch], loss=cross_entropy, **options[measure])
