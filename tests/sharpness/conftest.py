"""What the tests of this folder share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """torch in one thread: on a busy machine the others wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
