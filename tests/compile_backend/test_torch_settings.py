"""Settings of torch change when a model is first compiled, not before; each change has a line in the docs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._inductor import config as inductor_config
from torch._inductor.codegen.cpp import CppKernel
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler
from torch._inductor.utils import op_dtype_propagation_rules

from fpsim.compile_backend import torch_settings
from fpsim.compile_backend.torch_settings import SETTINGS

DOCS = Path(__file__).parents[2] / "docs" / "torch_settings.md"

#: Prints, for each statement, the state of everything that fpsim changes: whether it stays, and numbers afterwards.
#: Each statement has a process of its own, forked from one that has imported torch alone, which takes seconds.
PROGRAM = """
import os, sys
import torch
from torch import nn
from torch._dynamo import config as dynamo_config
from torch._inductor.codegen.cpp import CppKernel
from torch._inductor.dtype_propagation import DtypePropagationOpsHandler

def state():
    settings = dynamo_config.fail_on_recompile_limit_hit, dynamo_config.recompile_limit, dynamo_config.allow_rnn
    return (*settings, CppKernel.cache_dtype_convert, DtypePropagationOpsHandler.__init__)

for statement in sys.argv[1:]:
    if os.fork() == 0:
        before = state()
        exec(statement)
        after = state()
        print([a == b for a, b in zip(before, after)], after[:3])
        sys.exit()
    os.wait()
"""

UNCHANGING = [
    "import fpsim",
    "import fpsim.compile_backend",
    "from fpsim.compile_backend import Plan, UnroundedError, Profiler, explain, audit, profile",
    "import fpsim; fpsim.round(torch.ones(3), 'e4m3fn'); fpsim.Policy()",
    "import fpsim.tensor_functions; torch.compile(nn.Linear(2, 2), backend='eager')",
]
CHANGING = [
    "torch.compile(nn.Linear(2, 2), backend='fpsim')",
    "torch.compile(nn.Linear(2, 2), backend='fpsim_eager')",
    "from fpsim.compile_backend import fpsim",
    "import fpsim; fpsim.explain(nn.Linear(2, 2), torch.ones(2, 2))",
    "import fpsim; fpsim.Profiler(nn.Linear(2, 2))",
]


@pytest.fixture(scope="module")
def states() -> dict[str, str]:
    """For each statement which of the settings stayed as they were, and their values then."""
    statements = UNCHANGING + CHANGING
    run = subprocess.run([sys.executable, "-c", PROGRAM, *statements], capture_output=True, text=True)
    printed = run.stdout.splitlines()
    assert len(printed) == len(statements), run.stderr
    return dict(zip(statements, printed, strict=True))


UNCHANGED = "[True, True, True, True, True] (False, 8, False)"
CPP_STAYS = torch_settings.TORCH >= (2, 13)
CHANGED = f"[False, False, False, {CPP_STAYS}, False] (True, 128, True)"


@pytest.mark.parametrize("statement", UNCHANGING)
def test_importing_fpsim_changes_nothing(states: dict[str, str], statement: str) -> None:
    assert states[statement] == UNCHANGED


@pytest.mark.parametrize("statement", CHANGING)
def test_settings_change_before_a_model_is_traced(states: dict[str, str], statement: str) -> None:
    assert states[statement] == CHANGED


def test_each_change_has_a_line_in_the_docs() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), re.MULTILINE)
    assert rows == [change.__name__ for change in SETTINGS]


# -- one test for each change ------------------------------------------------------------------------------------------


def test_fail_at_recompile_limit_raises_the_limit_and_never_lowers_it() -> None:
    with dynamo_config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        torch_settings.fail_at_recompile_limit()
        assert (dynamo_config.recompile_limit, dynamo_config.fail_on_recompile_limit_hit) == (128, True)
    with dynamo_config.patch(recompile_limit=1000):
        torch_settings.fail_at_recompile_limit()
        assert dynamo_config.recompile_limit == 1000


def test_trace_recurrent_layers_lets_a_recurrent_layer_be_rounded() -> None:
    layer, x = nn.RNN(4, 4), torch.randn(3, 2, 4)
    rounded, _ = torch.compile(layer, backend="fpsim_eager", options={"format": "e8m1"})(x)
    assert not torch.equal(rounded, layer(x)[0])
    graphs = []
    torch._dynamo.reset()
    torch.compile(layer, backend=lambda gm, inputs: graphs.append(gm) or gm, fullgraph=True)(x)
    assert len(graphs) == 1


def test_keep_precision_casts_in_cpp_forgets_conversions_under_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    remembered: list[object] = []
    monkeypatch.setattr(CppKernel, "cache_dtype_convert", lambda kernel, *conversion: remembered.append(conversion))
    monkeypatch.setattr(torch_settings, "TORCH", (2, 11))
    torch_settings.keep_precision_casts_in_cpp.__wrapped__()
    with inductor_config.patch(emulate_precision_casts=True):
        CppKernel.cache_dtype_convert(None, "x", torch.float32, "y", torch.bfloat16)
    assert remembered == []
    with inductor_config.patch(emulate_precision_casts=False):
        CppKernel.cache_dtype_convert(None, "x", torch.float32, "y", torch.bfloat16)
    assert remembered == [("x", torch.float32, "y", torch.bfloat16)]


def test_keep_dtype_rules_keeps_the_table_until_there_is_another_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compile(nn.Linear(2, 2), backend="fpsim")(torch.randn(2, 2))  # loads the backend
    rule = DtypePropagationOpsHandler().add
    assert DtypePropagationOpsHandler().add is rule
    monkeypatch.setitem(op_dtype_propagation_rules, "of_a_users_own", op_dtype_propagation_rules["add"])
    handler = DtypePropagationOpsHandler()
    assert handler.of_a_users_own is not None and handler.add is not rule
