"""Code that another process has compiled is found in the cache; nobody waits for a run that it could not compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from fpsim.paper.compile_ahead import compile_ahead
from fpsim.paper.training import records


def test_nothing_is_started_for_no_runs():
    with compile_ahead({}) as ahead:
        ahead.wait("fp32")


def test_a_run_that_fails_there_is_not_waited_for(config):
    wrong = replace(config, options={"format": "e9m3"})
    with compile_ahead({"wrong": wrong, "never": config}) as ahead:
        ahead.wait("another")
        ahead.wait("wrong")
        ahead.wait("never")


@pytest.mark.exhaustive
def test_the_code_is_in_the_cache(config, data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    simulated = replace(config, options={"format": "e8m3"})
    with compile_ahead({"e8m3": simulated}) as ahead:
        ahead.wait("e8m3")
    counters.clear()
    next(records(simulated, data))
    caches = counters["inductor"] + counters["aot_autograd"]
    assert caches["autograd_cache_hit"] == 1
    assert caches["autograd_cache_miss"] == caches["fxgraph_cache_miss"] == 0
