"""Two processes that share a run compute what one does, data-parallel and sharded, and resume with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from fpsim.paper.config import to_dict
from fpsim.paper.data import DataConfig
from fpsim.paper.parallel import Parallel
from fpsim.paper.record import Record
from fpsim.paper.training import run

_CHILD = """
import json, sys
from itertools import islice
from pathlib import Path
from fpsim.paper.config import from_dict
from fpsim.paper.parallel import from_environment
from fpsim.paper.checkpoint import Checkpoint
from fpsim.paper.training import records

config, folder = from_dict(json.loads(sys.argv[1])), Path(sys.argv[2])
for kind in ("ddp", "fsdp2"):
    group = from_environment(kind, "cpu")
    whole = list(records(config, parallel=group))
    state = Checkpoint(folder / f"{kind}.pt", seconds=0)
    stream = records(config, parallel=group, checkpoint=state)
    part = list(islice(stream, 4))
    stream.close()
    resumed = list(records(config, parallel=group, checkpoint=state))
    if group.is_first:
        assert part == whole[:4] and resumed == whole, (part, whole, resumed)
        (folder / f"{kind}.json").write_text(json.dumps([[getattr(r, name) for name in sys.argv[3:]] for r in whole]))
"""


FACTS = ["loss", "gradient_norm", "validation_loss", "sharpness_5e4", "max_abs_logit", "hessian_eigenvalue"]
FACTS += ["saturated_activation", "underflowed_gradient"]


def facts(history: list[Record]) -> list[list[float | None]]:
    return [[getattr(record, name) for name in FACTS] for record in history]


@pytest.mark.parametrize("stages", [(), ((2, None), (3, {"format": "e8m1"}))])
def test_two_processes_compute_what_one_does(config, text, tmp_path, stages):
    source = tmp_path / "times.txt"
    source.write_bytes(text)
    config = replace(
        config,
        data=DataConfig(str(source)),
        options={"format": "e8m3", "modules": {"*lm_head": "bf16"}},
        backend="interpreted",
        measure_every=2,
        hessian_every=3,
        ranges_every=2,
        accumulate=2,
        stages=stages,
    )
    (tmp_path / "child.py").write_text(_CHILD)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [str(tmp_path / "child.py"), json.dumps(to_dict(config)), str(tmp_path), *FACTS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    expected = facts(run(config))
    for kind in ("ddp", "fsdp2"):
        found = json.loads((tmp_path / f"{kind}.json").read_text())
        for row, wanted in zip(found, expected, strict=True):
            assert [value is None for value in row] == [value is None for value in wanted]
            measured = [(a, b) for a, b in zip(row, wanted, strict=True) if b is not None]
            # Rounding moves with the last bits of the sums, so the two part slowly.
            assert [a for a, _ in measured] == pytest.approx([b for _, b in measured], rel=5e-3), kind
        assert found[0][:2] == pytest.approx(expected[0][:2], rel=1e-4)


def test_each_process_takes_its_part_of_a_batch():
    inputs, targets = torch.arange(12).view(4, 3), torch.arange(12, 24).view(4, 3)
    parts = [Parallel("ddp", rank, 2).share((inputs, targets)) for rank in range(2)]
    assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
    assert torch.equal(torch.cat([part[1] for part in parts]), targets)


def test_what_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of the 3 processes, got 4"):
        Parallel("ddp", 0, 3).share((torch.zeros(4, 2), torch.zeros(4, 2)))
    with pytest.raises(ValueError, match="unknown kind of parallel training 'pipeline': use one of ddp, fsdp2"):
        Parallel("pipeline")
