"""INT16 dynamic fixed point with INT32 sums (Das et al.)."""

from __future__ import annotations

from fpsim.policy import Policy
from fpsim.recipes.parts import LINEAR
from fpsim.recipes.recipe import Recipe


def dfp16(*, bits: int = 16, overflow: str = "spill", chain: int | None = None) -> Recipe:
    """Dynamic fixed point: integers of 16 bits that share one exponent in each tensor, in every product.

    The products of L pairs are added in 32 bits, and then move to a float32 sum. With p = ``bits``, L (2^(p-1)-1)^2 <
    2^31 holds for L = 2 at p = 16, 32 at p = 14 and 128 at p = 13: no chain of this length overflows. Activations and
    their gradients are stored as integers again. Gradients of weights, the update and norms are in float32.

    Args:
        bits: the width of the integers, 2 to 16.
        overflow: ``"spill"`` moves sums to float32 every ``chain`` products. ``"wrap"`` never does, and sums wrap
            around: the failure that spilling is for.
        chain: L; None takes the longest one that cannot overflow.

    Raises:
        ValueError: ``overflow`` is unknown, or a chain of this length may overflow. Otherwise the errors of
            `fpsim.Policy`.
    """
    if overflow not in ("spill", "wrap"):
        raise ValueError(f"overflow={overflow!r}: use 'spill' or 'wrap'")
    cast = f"int{bits}/power_of_two"
    policy = Policy(
        format=cast,
        accumulator="int32/wrap" if overflow == "wrap" else _spilled(bits, chain),
        fprop={"output": cast},
        dgrad={"output": cast},
        **LINEAR,
    )
    return Recipe(
        name="dfp16",
        source="Das et al., Mixed Precision Training of Convolutional Neural Networks using Integer Operations, "
        "arXiv 1802.00930",
        policy=policy,
        notes=(
            "The paper takes the exponent of amax. This takes the least one with which amax fits, which is another one "
            "if amax is just below a power of two.",
            "A sum within a chain is exact; it is rounded to float32 as it moves there. The paper has no code.",
            "Sums are simulated on the CPU only.",
        ),
    )


def _spilled(bits: int, chain: int | None) -> str:
    """The sums of ``chain`` products, exact as in 32 bits, that are added in float32."""
    largest = (1 << (bits - 1)) - 1
    longest = (2**31 - 1) // largest**2
    if chain is not None and not 1 <= chain <= longest:
        raise ValueError(
            f"a chain of {chain} products of int{bits} may overflow: use 1 to {longest}, or overflow='wrap'"
        )
    length = longest if chain is None else chain
    return f"fp32 chunk={length} promote={length}"
