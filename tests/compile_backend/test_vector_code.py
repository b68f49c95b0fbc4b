"""Inductor's C++ code for rounding, for vectors of both widths: no detour through arrays, scalars or calls."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
#: Values of ``ATEN_CPU_CAPABILITY``; None stands for the machine's own vectors, which may be those of AVX2.
WIDTHS: list[str | None] = ["avx2"] if torch.backends.cpu.get_cpu_capability() == "AVX2" else ["avx2", None]

# A function that rounds one number begins with the names of its types, and older code casts one number to its bits.
_SCALAR = re.compile(r"\busing U = |bit_cast<(u?int\d+_t|float|double)>")


@functools.cache
def codes(width: str | None) -> dict[str, str]:
    """The code of each case of `tests.shared.generated_code`."""
    environment = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    environment |= {"ATEN_CPU_CAPABILITY": width} if width else {}
    command = [sys.executable, "-m", "tests.shared.generated_code"]
    run = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(run.stdout)


def scalars_in_loops(code: str) -> list[str]:
    """The lines that round one number in a loop that holds no vectors: it goes over elements, or over lanes.

    Outside loops there is only one such number, for example a scale. In a loop over vectors all lanes share it.
    """
    found: list[str] = []
    loops: list[tuple[int, list[str]]] = []  # the depth of each open loop, and its lines outside inner loops
    depth = 0
    for line in code.splitlines():
        if re.search(r"\bfor ?\(", line):
            loops.append((depth, []))
        elif loops:
            loops[-1][1].append(line.strip())
        depth += line.count("{") - line.count("}")
        while loops and "}" in line and depth <= loops[-1][0]:
            _, body = loops.pop()
            if not any("at::vec::" in each for each in body):
                found += [each for each in body if _SCALAR.search(each)]
    return found


def vectors_through_arrays(code: str) -> list[str]:
    """The lines that store a vector in an array, to compute with its elements."""
    return [line.strip() for line in code.splitlines() if re.search(r"\.store\(\s*tmpbuf", line)]


def operators_called(code: str) -> list[str]:
    """The lines that call an operator of fpsim."""
    return [line.strip() for line in code.splitlines() if re.search(r"ops\.fpsim", line) and line.lstrip()[0] != "#"]


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="needs vectors of x86-64")
@pytest.mark.parametrize("width", WIDTHS)
def test_rounding_is_vector_code(width: str | None) -> None:
    for case, code in codes(width).items():
        assert "vector_size(" in code, case
        assert scalars_in_loops(code) == [], case
        assert vectors_through_arrays(code) == [], case
        # One call computes the keys of all stochastic roundings of a graph, 8 bytes for each.
        assert [line for line in operators_called(code) if "random_keys" not in line] == [], case


def test_a_detour_is_found() -> None:
    cast = "using F = float; using I = int32_t; using U = uint32_t;"
    vector = "auto tmp0 = at::vec::Vectorized<float>::loadu(in_ptr0 + x0, 16);"
    elements, vectors = "for(int64_t x0=0; x0<64; x0+=1)\n{{\n{}\n}}", "for(int64_t x0=0; x0<64; x0+=16)\n{{\n{}\n}}"
    assert scalars_in_loops(elements.format(cast)) == [cast]
    assert scalars_in_loops(vectors.format(f"{vector}\nfor (int i = 0; i < 16; i++)\n{{\n{cast}\n}}")) == [cast]
    assert scalars_in_loops(vectors.format(f"{vector}\n{cast}")) == []
    assert scalars_in_loops(elements.format("") + f"\n{cast}") == []
    assert vectors_through_arrays("tmp0.store(tmpbuf0.data(), 16);") != []
    assert operators_called("buf0 = torch.ops.fpsim.round.default(arg0_1)") != []
