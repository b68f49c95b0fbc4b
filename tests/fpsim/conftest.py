"""Lets the tests of this folder import their shared module (``from judge import ...``), and sets up what they share."""

import sys
from pathlib import Path

import pytest
import torch

if (here := str(Path(__file__).parent)) not in sys.path:
    sys.path.append(here)


@pytest.fixture
def one_thread():
    """torch in one thread: on a busy machine the others wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
