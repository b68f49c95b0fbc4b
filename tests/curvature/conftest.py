"""Lets the tests of this folder import their shared module (``from models import ...``)."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if (here := str(Path(__file__).parent)) not in sys.path:
    sys.path.append(here)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """torch in one thread: the matrices are small, and on a busy machine threads wait longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
