"""Fixtures of all tests of the backend: each test starts with nothing compiled."""

from collections.abc import Iterator

import pytest
import torch
from torch import fx
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import clear_caches

from fpsim.compile_backend.passes.rounding_pass import RoundingPass


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Forget compiled code before and after, so that no test uses another's."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def kernels_left_out(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Inductor generate its code but not compile the kernels in it, which takes minutes for a transformer.

    The generated code then still calls every operator, on meaningless numbers.
    """
    clear_caches()
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: None)
    yield
    clear_caches()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.Graph]:
    """The graphs of a step after rewriting."""
    found: list[fx.Graph] = []
    original = RoundingPass.__call__

    def keeping(self: RoundingPass, graph: fx.Graph) -> None:
        original(self, graph)
        found.append(graph)

    monkeypatch.setattr(RoundingPass, "__call__", keeping)
    return found
