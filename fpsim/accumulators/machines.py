"""The matrix units of known machines: which products they add at once, and what they keep of a sum.

A unit takes the products of one step, aligns them and the sum of the steps before to the largest exponent, cuts what
is below, adds the rest exactly and rounds once (`fpsim.reference.Aligned` defines it in fractions). Software above the
instruction, which splits a long sum among several units, is not simulated.

Sources: M. Fasi, N. J. Higham, M. Mikaitis, S. Pranesh, PeerJ Computer Science 7 (2021), for Volta and Ampere; MMA-Sim
(package ``mmasim`` 2.1.1) for all units of NVIDIA and AMD; recorded results of eight NVIDIA GPUs, which these numbers
reproduce bit for bit (``python -m tests.accumulators.recordings``); Intel's Software Developer's Manual, TDPBF16PS;
Arm's Architecture Reference Manual, BFDOT without extended behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fpsim.formats import FloatFormat, parse_format
from fpsim.suggestions import did_you_mean


@dataclass(frozen=True)
class Machine:
    """A matrix unit.

    Attributes:
        name: the name by which an accumulator calls it.
        operands: the formats that it multiplies, in groups, each with the number of products in a step. The operands
            of a product may have different formats of one group.
        order: how the products of a step are added to the sum: ``aligned``; ``late``, if they are aligned and added
            among each other first; ``chunked``, exactly; ``pairwise`` or ``interleaved`` (two lanes), where every
            addition rounds and the sum of a step is then added to the sum of the steps before.
        format, rounding: of the sum after every step.
        fraction_bits: the bits that alignment keeps below the largest exponent.
        floor: the least exponent of alignment, below that of the smallest normal number of `format`.
        late_bits: the bits that are kept when the sum of the steps before joins late.
        lanes: how many sums of products a step has.
        rounds_products: whether each product is rounded before it is added.
        flushes: whether subnormal operands count as zero.
        has_half: whether the unit can also accumulate in fp16, rounded to nearest even.
        nan_bits: the float32 bits of the NaN that it delivers.
        blocks: how many elements may share a scale; empty for a machine that takes elements without scales. The
            exponents of scales join those of the elements.
        group: how many products are added exactly before they are aligned, with the exponent of their scales.
    """

    name: str
    operands: tuple[tuple[tuple[str, ...], int], ...]
    order: Literal["aligned", "late", "chunked", "pairwise", "interleaved"]
    format: str = "fp32"
    rounding: str = "nearest_even"
    fraction_bits: int = 0
    floor: int = 0
    late_bits: int = 0
    lanes: int = 1
    rounds_products: bool = False
    flushes: bool = False
    has_half: bool = False
    nan_bits: int = 0x7FC00000
    blocks: tuple[int, ...] = ()
    group: int = 1

    def length(self, *formats: FloatFormat) -> int:
        """The number of products in a step of operands in these formats.

        Raises:
            ValueError: the machine does not multiply these formats with each other.
        """
        for names, length in self.operands:
            if all(fmt in map(parse_format, names) for fmt in formats):
                return length
        given = " and ".join(dict.fromkeys(fmt.name for fmt in formats))
        groups = ", or ".join(" and ".join(names) for names, _ in self.operands)
        others = [m.name for m in MACHINES.values() if bool(m.blocks) == bool(self.blocks) and m._takes(formats)]
        remedy = f" accumulator={others[0]!r} multiplies these;" if others else ""
        raise ValueError(
            f"{self.name} multiplies {groups}, and not {given}:{remedy} format={self.operands[0][0][0]!r} rounds "
            "operands to a format of this machine"
        )

    @property
    def formats(self) -> tuple[str, ...]:
        """The names of all formats that the machine multiplies."""
        return tuple(name for names, _ in self.operands for name in names)

    @property
    def longest(self) -> int:
        """The largest number of products in a step."""
        return max(length for _, length in self.operands)

    def _takes(self, formats: tuple[FloatFormat, ...]) -> bool:
        return any(all(fmt in map(parse_format, names) for fmt in formats) for names, _ in self.operands)


def _nvidia(
    name: str, bits: int, floor: int, *operands: tuple[tuple[str, ...], int], format: str = "fp32", half: bool = True
) -> Machine:
    return Machine(
        name, operands, "aligned", format, "toward_zero", fraction_bits=bits, floor=floor, has_half=half,
        nan_bits=0x7FFFFFFF,
    )  # fmt: skip


_FP8 = ("e4m3fn", "e5m2")
_TF32 = ("tf32",)
_FLUSHED = "fp32:nosubnormals"
_NARROW = (*_FP8, "e3m2fn", "e2m3fn", "e2m1fn")

#: The machines by name.
MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        _nvidia("volta", 23, 5, (("fp16",), 4)),
        _nvidia("ampere", 24, 6, (("fp16",), 8), (("bf16",), 8), (_TF32, 4)),
        _nvidia("ada", 24, 6, (("fp16",), 8), (("bf16",), 8), (_TF32, 4)),
        _nvidia("ada_fp8", 13, 6, (_FP8, 16), format="e8m13"),
        _nvidia("hopper", 25, 7, (("fp16",), 16), (("bf16",), 16), (_TF32, 8)),
        _nvidia("hopper_fp8", 13, 7, (_FP8, 32), format="e8m13", half=False),
        _nvidia("blackwell", 25, 7, (("fp16",), 16), (("bf16",), 16), (_TF32, 8), (_NARROW, 32)),
        Machine(
            "blackwell_mxfp8", ((_NARROW, 32),), "aligned", "fp32", "toward_zero", fraction_bits=25, floor=7,
            nan_bits=0x7FFFFFFF, blocks=(32,),
        ),
        Machine(
            "blackwell_nvfp4", ((("e2m1fn",), 64),), "aligned", "fp32", "toward_zero", fraction_bits=35, floor=13,
            nan_bits=0x7FFFFFFF, blocks=(16, 32), group=16,
        ),
        Machine("mi100", ((("fp16",), 4), (("bf16",), 2)), "chunked"),
        Machine(
            "mi250", ((("fp16",), 4), (("bf16",), 4)), "pairwise", _FLUSHED, rounds_products=True, flushes=True
        ),
        Machine("mi300", ((("fp16",), 8), (("bf16",), 8), (_TF32, 4)), "late", fraction_bits=24, late_bits=31),
        Machine("mi300_fp8", ((("e4m3fnuz", "e5m2fnuz"), 16),), "late", fraction_bits=24, late_bits=31, lanes=2),
        Machine("amx_bf16", ((("bf16",), 32),), "interleaved", _FLUSHED, lanes=2, flushes=True),
        Machine(
            "arm_bfdot", ((("bf16",), 2),), "pairwise", _FLUSHED, "to_odd", rounds_products=True, flushes=True
        ),
    )
}  # fmt: skip


def unknown_machine(name: str) -> str:
    """A phrase that suggests the machines whose names resemble ``name``, and lists all."""
    return f"{did_you_mean(name, MACHINES)}. Machines are {', '.join(MACHINES)}"
