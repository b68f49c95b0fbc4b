"""Verdicts: the outcome of comparing the rounding of tensors with the reference, for people and for machines."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any, NamedTuple

import numpy as np
import torch

from fpsim.rounding.carriers import CARRIERS
from fpsim.showing import Shown
from fpsim.source import proven_hash
from fpsim.verify.codes import name_of, tensor_of, unsigned_of

#: How many mismatches a `Verdict` shows.
MAX_EXAMPLES = 10


class Mismatch(NamedTuple):
    """An input whose output is wrong, as hexadecimal codes of the carrier.

    Attributes:
        path: which of `fpsim.verify.PATHS` it was.
        input, got, want: the input, the output, and the reference's result (NaN as the canonical NaN).
        random: for stochastic rounding the random number, in hexadecimal; else empty.
    """

    path: str
    input: str
    got: str
    want: str
    random: str = ""

    def __str__(self) -> str:
        return f"{self.input} became {self.got}, not {self.want} ({self.path})"


@dataclass(frozen=True)
class Verdict(Shown):
    """The outcome of `fpsim.verify.verify`.

    Attributes:
        format, rounding, overflow: the target and the mode; ``overflow`` is the mode in force, never None.
        carrier: the dtype of the inputs, such as ``"float32"``.
        device: the device that rounded them.
        paths: which of `fpsim.verify.PATHS` were compared with the reference.
        exhaustive: whether the inputs were all bit patterns of the carrier.
        inputs: how many inputs were checked, each on every path.
        mismatches: how many outputs were wrong, over all paths.
        examples: the first of them, at most `MAX_EXAMPLES`.
        seconds: wall-clock time, compilation and the reference's results included. Modes that were verified together
            share it equally.
        cpu_seconds: processor time of all threads in the same span.
    """

    format: str
    rounding: str
    overflow: str
    carrier: str
    device: str
    paths: tuple[str, ...]
    exhaustive: bool
    inputs: int
    mismatches: int
    examples: tuple[Mismatch, ...]
    seconds: float
    cpu_seconds: float

    @property
    def ok(self) -> bool:
        """Whether every output was right."""
        return self.mismatches == 0

    def __str__(self) -> str:
        extent = "all" if self.exhaustive else "sampled"
        outcome = "no mismatch" if self.ok else f"{self.mismatches:,} MISMATCHES"
        return (
            f"{self.format} {self.rounding} {self.overflow}: {outcome} in {self.inputs:,} inputs "
            f"({extent} {self.carrier}, {' and '.join(self.paths)}), {self.seconds:.1f} s"
        )

    def describe(self, mismatch: Mismatch) -> str:
        """One of `examples` in one line: the bits and numbers of input, output and right result, and the mode.

        A line reads ``input 0x4200 = 3.0 became 0x4400 = 4.0, not 0x4200 = 3.0: e5m2 nearest_even ovf_inf, float16
        eager``. For stochastic rounding, ``with random number 0x1f`` stands after the input.
        """
        source, got, want = (
            f"{code} = {self._number(code)!r}" for code in (mismatch.input, mismatch.got, mismatch.want)
        )
        drawn = f" with random number {mismatch.random}" if mismatch.random else ""
        mode = f"{self.format} {self.rounding} {self.overflow}, {self.carrier} {mismatch.path}"
        return f"input {source}{drawn} became {got}, not {want}: {mode}"

    def record(self) -> dict[str, Any]:
        """The verdict for machines: JSON values only.

        It holds the attributes by their names. Each example holds its path and, for input, got and want, the ``bits``
        in binary, ``hex`` (of the bits) and ``decimal`` (the number: text, which may be nan or inf), and for
        stochastic rounding ``random``. The record also holds the versions of torch and fpsim, and ``source``:
        `fpsim.source.proven_hash`, a hash of the source that decides the bits.
        """
        examples = [
            {"path": example.path}
            | {side: self._datum(getattr(example, side)) for side in ("input", "got", "want")}
            | ({"random": example.random} if example.random else {})
            for example in self.examples
        ]
        facts = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "examples"}
        versions = {"torch": torch.__version__, "fpsim": metadata.version("fpsim-torch"), "source": proven_hash()}
        return facts | {"paths": list(self.paths), "ok": self.ok, "examples": examples} | versions

    def _datum(self, code: str) -> dict[str, str]:
        digits = 4 * (len(code) - 2)
        return {"bits": f"{int(code, 16):0{digits}b}", "hex": code, "decimal": repr(self._number(code))}

    def _number(self, code: str) -> float:
        dtype = next(dtype for dtype in CARRIERS if name_of(dtype) == self.carrier)
        return tensor_of(np.array([int(code, 16)], unsigned_of(CARRIERS[dtype])), dtype).item()
