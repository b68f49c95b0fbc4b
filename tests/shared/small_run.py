"""A run small enough for a test, and a compiler that does not compile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
from torch import nn

from fpsim.paper.compiled_loss import Loss
from fpsim.paper.config import RunConfig
from fpsim.paper.data import Data, split, tokenize
from fpsim.paper.models import ModelConfig

TEXT = b"".join(b"It was the best of times, it was the worst of times, line %d.\n" % line for line in range(60))


@pytest.fixture(scope="session")
def config() -> RunConfig:
    model = ModelConfig(layers=1, hidden=16, heads=2, mlp=24, context=12)
    return replace(RunConfig(), model=model, steps=6, batch=4, warmup=2, validate_every=4, validation_batches=2)


@pytest.fixture(scope="session")
def data(config: RunConfig) -> Data:
    return split(tokenize(TEXT), context=config.model.context)


@pytest.fixture(scope="session")
def text() -> bytes:
    return TEXT


@pytest.fixture
def eager():
    """In place of `fpsim.paper.compiled_loss.compile_loss`: the module itself, whatever the options."""

    def leave(module: nn.Module, options: Mapping[str, object] | None) -> Loss:
        return module

    return leave
