"""The model of matrix units against recorded results of eight GPUs.

    python -m tests.accumulators.recordings PATH

PATH is the folder ``model_validation`` of the repository north-numerical-computing/MATLAB-tensor-core (BSD-2-Clause).
The command prints one line for each set of 5,000 recorded results: the machine that models it and the number of results
that differ in a bit. It fails if a set that is known to agree does not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fpsim.formats import parse_format
from tests.accumulators.numpy_model import UNITS

#: The machine of each GPU, and of each GPU with fp8 operands.
MACHINES = {
    "V100": ("volta", None), "A100": ("ampere", None), "A2": ("ampere", None), "Ada": ("ada", "ada_fp8"),
    "L40S": ("ada", "ada_fp8"), "H100": ("hopper", "hopper_fp8"), "H200": ("hopper", "hopper_fp8"),
    "B200": ("blackwell", "blackwell"),
}  # fmt: skip
FORMATS = {"E4M3": "e4m3fn", "E5M2": "e5m2"}
#: The sets that no known model reproduces.
UNEXPLAINED = {
    **{(gpu, fmt, "fp16"): "no model is known" for gpu in ("H100", "H200", "B200") for fmt in FORMATS},
    **{("B200", fmt, "fp32"): "mma.sync, not tcgen05: the exact sum, to nearest" for fmt in FORMATS},
}


@dataclass(frozen=True)
class RecordedSet:
    """Operands of shape (5000, K), accumulators and results of shape (5000,), as float64."""

    gpu: str
    operands: str
    result: str
    a: np.ndarray
    b: np.ndarray
    c: np.ndarray
    d: np.ndarray


def find_sets(path: Path) -> list[RecordedSet]:
    """All recorded sets under ``path``."""
    sets = []
    for folder in sorted(path.glob("*/*/")):
        gpu, fmt = folder.parent.name, folder.name
        for file in sorted(folder.glob(f"d_{gpu}_fp*.txt")):
            a, b = (_hexadecimal(folder / f"{name}_{gpu}_{fmt}.txt") for name in "ab")
            c, d = _binary(folder / f"c_{gpu}_fp32.txt"), _binary(file)
            width = a.size // len(d)
            sets.append(RecordedSet(gpu, fmt, file.stem[-4:], a.reshape(-1, width), b.reshape(-1, width), c, d))
    return sets


def mismatches(recorded: RecordedSet) -> int:
    """How many of the results differ from those of the model."""
    usual, fp8 = MACHINES[recorded.gpu]
    fmt = FORMATS.get(recorded.operands, recorded.operands)
    unit = UNITS[(fp8 if recorded.operands in FORMATS else usual) or "", fmt]
    c = recorded.c
    if recorded.result == "fp16":
        unit = replace(unit, precision=11, emin=-14, nearest=True, floor=unit.floor + 112)
        c = c.astype(np.float16).astype(np.float64)
    if recorded.gpu in ("H100", "H200") and recorded.operands in FORMATS and recorded.result == "fp32":
        c = np.zeros_like(c)  # wgmma began with zero
    got = unit.dot(recorded.a, recorded.b, parse_format(fmt).emin, c)
    return int((got.astype(np.float32).view(np.int32) != recorded.d.astype(np.float32).view(np.int32)).sum())


def _hexadecimal(file: Path) -> np.ndarray:
    words = np.array([int(word, 16) for word in file.read_text().split()], dtype=np.uint32)
    return words.view(np.float32).astype(np.float64)


def _binary(file: Path) -> np.ndarray:
    words = np.array([int(word, 2) for word in file.read_text().split()], dtype=np.uint32)
    return words.view(np.float32).astype(np.float64)


def main(path: str) -> int:
    """Print the table. The result is 0 if all sets that have a model agree with it."""
    sets = find_sets(Path(path))
    if not sets:
        print(f"no recordings in {path}: give the folder model_validation of MATLAB-tensor-core")
        return 2
    failed = 0
    for recorded in sets:
        wrong = mismatches(recorded)
        known = UNEXPLAINED.get((recorded.gpu, recorded.operands, recorded.result), "")
        failed += wrong > 0 and not known
        print(f"{recorded.gpu:5} {recorded.operands:5} -> {recorded.result}  {wrong:5} of {len(recorded.d)}  {known}")
    print(f"{len(sets)} sets, {failed} disagree with their model")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
