"""The layers that do not fit a format, and the remedies, on a model whose operands are chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fpsim.paper.config import run_key, to_dict
from fpsim.paper.data import DataConfig
from fpsim.paper.ranges import Examination, Misfit, Tried, examine, table_rows
from fpsim.paper.storage import read_records
from fpsim.paper.workers import Job, execute
from fpsim.policy import Policy


class TwoLayers(nn.Module):
    """The identity twice; the loss is the sum of the outputs times ``factors``, which are thus the gradients."""

    def __init__(self, first: float, head: float) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(first * torch.eye(2) + first / 2)
            self.head.weight.copy_(head * torch.eye(2) + head / 2)

    def forward(self, inputs, factors):
        return (self.head(self.first(inputs)) * factors).sum()


ONES = torch.ones(4, 2)
E4M3 = Policy(format="e4m3fn")  # e4m3fn: the largest value is 448, and 2^-10 and less become 0


def test_a_model_that_fits_has_no_misfits_and_tries_nothing():
    found = examine(TwoLayers(1.0, 1.0), E4M3, (ONES, ONES))
    assert found == Examination((), ())
    assert table_rows([("e4m3fn", found.to_dict())]) == []


def test_a_loss_scale_is_the_cheapest_fix_for_gradients_that_underflow():
    found = examine(TwoLayers(1.0, 1.0), E4M3, (ONES, ONES * 2.0**-13))
    # The gradient of the head's result is 2^-13, and that of the first layer's result 2^-12: both become 0 or are it.
    assert found.misfits[0] == Misfit("head", "gradient", "underflows", 1.0)
    assert {misfit.role for misfit in found.misfits} == {"gradient"}
    assert [each.name for each in found.tried] == ["loss scale times 2^4"]
    assert found.fix == Tried("loss scale times 2^4", (), 16.0)
    same = examine(TwoLayers(1.0, 1.0), E4M3, (ONES, ONES * 2.0**-13), loss_scale=2.0**4)
    assert same.misfits == ()


def test_power_of_two_scales_fix_weights_that_underflow():
    found = examine(TwoLayers(2.0**-13, 2.0**12), Policy(format="e4m3fn"), (ONES, ONES * 2.0**-10))
    weights = {(m.path, m.count, m.share) for m in found.misfits if m.role == "weight"}
    assert weights == {("first", "underflows", 1.0), ("head", "saturations", 1.0)}
    assert found.fix is not None and found.fix.name == "power-of-two scales"
    assert all(each.left for each in found.tried[:-1])


def test_the_head_is_left_out_where_scales_do_not_help():
    model = TwoLayers(1.0, 1.0)
    with torch.no_grad():  # one scale cannot hold both numbers of the head
        model.head.weight.copy_(torch.tensor([[256.0, 2.0**-14], [2.0**-14, 256.0]]))
    found = examine(model, E4M3, (ONES, ONES * 2.0**-4))
    assert found.misfits == (Misfit("head", "weight", "underflows", 0.5),)
    assert [each.name for each in found.tried] == ["power-of-two scales", "head unrounded"]
    assert found.fix == found.tried[-1]
    ((condition, what, fix, evidence),) = table_rows(
        [("e4m3fn", found.to_dict()), ("fp32", {"misfits": [], "tried": []})]
    )
    assert (condition, what, fix) == ("e4m3fn", "weights of head underflow (50 %)", "head unrounded")
    assert evidence == (
        "power-of-two scales: 1 left, the worst: weights of head underflow (50 %); head unrounded: none left"
    )
    assert Examination.from_dict(found.to_dict()) == found


def test_where_nothing_helps_the_report_says_so():
    model = TwoLayers(1.0, 1.0)
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([[256.0, 2.0**-14], [2.0**-14, 256.0]]))
    found = examine(model, E4M3, (ONES * 2.0**-4, ONES * 2.0**-8))
    assert found.fix is None
    assert found.sentences()[1] == "none of those tried"


def test_a_run_of_a_sweep_is_examined_at_its_end(config, text, tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "times.txt").write_bytes(text)
    own = replace(
        config, data=DataConfig(str(tmp_path / "times.txt")), options={"format": "e4m3fn"}, backend="interpreted",
        steps=2, ranges_every=2,
    )  # fmt: skip
    for each, is_examined in ((own, True), (replace(own, ranges_every=0), False)):
        job = Job(run_key(each), to_dict(each), {}, None, 0.0, 1)
        *_, done = execute(job, 0)
        assert done.kind == "done", done.text
        _, facts = read_records(done.result)
        assert ("ranges" in facts) == is_examined
        if is_examined:  # gradients of a mean over 48 tokens and 256 words underflow in e4m3fn
            found = Examination.from_dict(facts["ranges"])
            assert found.misfits[0].role == "gradient" and found.tried[0].name == "loss scale times 2^4"


@pytest.mark.parametrize("most", [1, 2])
def test_long_lists_are_cut(most):
    misfits = tuple(Misfit(f"layer{i}", "weight", "saturations", 0.5) for i in range(3))
    what = Examination(misfits).sentences(most)[0]
    assert what.endswith(f"; and {3 - most} more") and what.count("saturate") == most
