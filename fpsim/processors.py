"""The processors that this process may use: cores, and devices of torch."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """The number of logical cores on which the operating system lets this process run; at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_device(device: str) -> None:
    """Check that torch can use ``device`` here.

    Raises:
        ValueError: torch knows no such device, or sees none on this machine.
    """
    import torch

    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:N") from None
    if chosen.type == "meta":
        raise ValueError("device 'meta' holds no values: use cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device {device!r}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here: use "
            "device='cpu' (on the command line --device cpu), or a CUDA build of torch on a machine with a GPU"
        )
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0][:100]
        raise ValueError(f"torch cannot use the device {device!r} here: use cpu, cuda or cuda:N ({reason})") from None
