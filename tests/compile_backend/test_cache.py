"""Compiled code in torch's cache on disk: a backend with an incomplete key would get the code of another policy.

New processes share one cache directory and run jobs. Every job must get its own bits, whatever ran before it. A job
that ran before must find its code in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fpsim
from tests.shared.models import dyadic
from tests.shared.processes import in_a_new_process

X, W, DY = dyadic(4, 8, seed=1, top=63), dyadic(8, 8, seed=2, top=63), dyadic(4, 8, seed=3, top=63)
Q, V = dyadic(1, 2, 4, 16, seed=4, top=63), dyadic(1, 2, 4, 16, seed=5, top=63)


# -- what a new process runs -------------------------------------------------------------------------------------------


class Product(nn.Module):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.T


class Unchanged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


class Holder(nn.Module):
    """A product under a name. Two holders differ only in a module path, which the text of the graph does not show."""

    def __init__(self, name: str, other: str) -> None:
        super().__init__()
        self.name, self.other = name, other
        self.add_module(name, Product())
        self.add_module(other, Unchanged())

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return self.get_submodule(self.other)(self.get_submodule(self.name)(x, w))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def run_step(backend: str, options: dict[str, Any] | None) -> dict[str, Tensor]:
    """A training step of a linear layer: its value and its weight gradient."""
    model = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        model.weight.copy_(W)
    y = torch.compile(model, backend=backend, options=options)(X)
    y.backward(DY)
    return {"y": y.detach(), "weight": model.weight.grad}


@torch.no_grad()
def run_left(backend: str, options: dict[str, Any] | None) -> dict[str, Tensor]:
    return {"y": torch.compile(Holder("left", "right"), backend=backend, options=options)(X, W)}


@torch.no_grad()
def run_right(backend: str, options: dict[str, Any] | None) -> dict[str, Tensor]:
    return {"y": torch.compile(Holder("right", "left"), backend=backend, options=options)(X, W)}


@torch.no_grad()
def run_attention(backend: str, options: dict[str, Any] | None) -> dict[str, Tensor]:
    return {"y": torch.compile(attention, backend=backend, options=options)(Q, torch.zeros_like(Q), V)}


RUNS = {"step": run_step, "left": run_left, "right": run_right, "attention": run_attention}


@dataclass(frozen=True)
class Job:
    """A model compiled by a backend; ``source`` stands for the source code of fpsim, None for the real one."""

    model: str
    backend: str
    options: dict[str, Any] | None = None
    source: str | None = None


def run(job: Job) -> dict[str, Any]:
    """The values of a job, and the counters of the caches."""
    from torch._dynamo.utils import counters

    from fpsim.compile_backend.passes import rounding_pass as rewrite

    torch._dynamo.reset()
    counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        if job.source is not None:
            patch.setattr(rewrite, "SOURCE", job.source)
        values = {name: value.tolist() for name, value in RUNS[job.model](job.backend, job.options).items()}
    caches = {**counters["aot_autograd"], **counters["inductor"]}
    return {"values": values, "caches": {name: n for name, n in caches.items() if "cache_" in name}}


def run_all(jobs: list[Job]) -> list[dict[str, Any]]:
    return [run(job) for job in jobs]


# -- what it should give -----------------------------------------------------------------------------------------------

SKIP_LEFT, SKIP_RIGHT = ({"format": "e4m3fn", "skip": [name]} for name in ("left", "right"))
KEEP, OPEN = ({"format": "e4m1", "attention": attention} for attention in ("keep", "round"))

PLAIN = Job("step", "inductor")
A = Job("step", "fpsim", {"format": "e4m3fn"})
B = Job("step", "fpsim", {"format": "e5m2"})

#: One list per process. Equal jobs stand in later processes only.
PROCESSES = [
    [PLAIN, Job("left", "inductor"), Job("attention", "inductor")],
    [A, Job("left", "fpsim", SKIP_LEFT), Job("attention", "fpsim", KEEP)],
    [B, Job("right", "fpsim", SKIP_LEFT), Job("left", "fpsim", SKIP_RIGHT), Job("attention", "fpsim", OPEN)],
]
AGAIN = [job for process in PROCESSES for job in process]
CHANGED = Job("step", "fpsim", A.options, source="another version of fpsim")


def expected(job: Job) -> dict[str, list]:
    """The values of a job, from arithmetic by hand."""
    name = (job.options or {}).get("format")

    def q(x: Tensor, rounded: bool = True) -> Tensor:
        return fpsim.round(x, name) if name and rounded else x

    if job.model == "step":
        return {"y": (q(X) @ q(W).T).tolist(), "weight": (q(DY).T @ q(X)).tolist()}
    if job.model == "attention":  # with k = 0 all weights are exactly 1/4
        rounded = bool(job.options) and job.options["attention"] == "round"
        return {"y": q(V, rounded).mean(-2, keepdim=True).expand_as(V).tolist()}
    rounded = bool(job.options) and job.options["skip"] != [job.model]
    return {"y": (q(X, rounded) @ q(W, rounded).T).tolist()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Job, dict[str, Any], bool]]:
    """Every job in order, its result, and whether an equal job ran before."""
    cache = str(tmp_path_factory.mktemp("cache"))
    settings = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    found: list[tuple[Job, dict[str, Any], bool]] = []
    for jobs in [*PROCESSES, [*AGAIN, CHANGED, CHANGED]]:
        for job, result in zip(jobs, in_a_new_process(run_all, jobs, **settings), strict=True):
            found.append((job, result, any(job == earlier for earlier, _, _ in found)))
    return found


def test_every_policy_gets_its_own_bits_whatever_is_in_the_cache(results: list) -> None:
    wrong = [job for job, result, _ in results if result["values"] != expected(job)]
    assert not wrong


def test_the_bits_tell_the_policies_apart() -> None:
    """Jobs that could be confused have different values, so that the tests above can fail."""
    for group in ([PLAIN, A, B], [job for job in AGAIN if job.model == "attention" and job.backend == "fpsim"]):
        values = [str(expected(job)) for job in group]
        assert len(group) > 1 and len(set(values)) == len(values)
    holders = [job for job in AGAIN if job.model in ("left", "right")]
    assert [expected(job) == expected(holders[0]) for job in holders] == [True, True, False, False]


def test_a_policy_that_was_compiled_before_is_found_in_the_cache(results: list) -> None:
    for job, result, seen in results:
        caches = result["caches"]
        hits = caches.get("autograd_cache_hit", 0)
        misses = caches.get("autograd_cache_miss", 0)
        bypasses = [name for name in caches if "bypass" in name]
        assert (hits, misses, bypasses) == ((1, 0, []) if seen else (0, 1, [])), (job, caches)


def test_code_of_another_version_of_fpsim_is_not_used(results: list) -> None:
    (first, again) = (result["caches"] for job, result, _ in results if job == CHANGED)
    assert first.get("autograd_cache_miss") == 1 and first.get("fxgraph_cache_miss", 0) > 0
    assert again.get("autograd_cache_hit") == 1


def test_every_job_ran_more_than_once_and_the_repeats_in_another_process(results: list) -> None:
    assert sum(seen for _, _, seen in results) == len(AGAIN) + 1
    assert [job for job, _, seen in results if seen] == [*AGAIN, CHANGED]


# -- the key itself ----------------------------------------------------------------------------------------------------


def key(
    policy: fpsim.Policy | None = None,
    sources: tuple[str, ...] = ("PARAMETER",),
    identity: tuple[str, ...] = ("a",),
    seed_input: int | None = None,
) -> str:
    from fpsim.compile_backend.graph.sources import Source
    from fpsim.compile_backend.passes.rounding_pass import RoundingPass

    input_sources = [Source[name] for name in sources]
    return RoundingPass(policy or fpsim.Policy(), input_sources, identity, seed_input=seed_input).uuid()


def test_equal_facts_give_an_equal_key() -> None:
    assert key() == key(fpsim.Policy(**{role: cast for role, cast in fpsim.Policy().to_dict().items()}))


def test_every_fact_that_the_pass_reads_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpsim.compile_backend.passes import rounding_pass as rewrite

    keys = [
        key(),
        key(fpsim.Policy(format="bf16")),
        key(fpsim.Policy(skip="a")),
        key(fpsim.Policy(attention="keep")),
        key(sources=("BUFFER",)),
        key(sources=("PARAMETER", "INPUT")),
        key(identity=("b",)),
        key(identity=("a", "b")),
        key(seed_input=0),
        key(seed_input=1),
    ]
    monkeypatch.setattr(rewrite, "SOURCE", "another version of fpsim")
    keys.append(key())
    assert len(set(keys)) == len(keys)
