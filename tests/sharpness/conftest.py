"""Fixtures of the tests of sharpness."""

import pytest
import torch


@pytest.fixture(autouse=True)
def always_one_thread(one_thread: None) -> None:
    """Every test of this folder runs torch in one thread."""


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
