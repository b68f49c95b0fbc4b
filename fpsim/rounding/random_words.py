"""Random words for stochastic rounding: a counter-based hash of (seed, salt, element index), without any state.

Like `fpsim.rounding.kernel`, this module is written once for every executor. Torch tensors and generated code on CPU
and GPU give the same words, in whatever order the elements are visited. The seed and the salt give a *key*, once; the
key and an index give a word.

Both functions need integer products that wrap around. They do in every executor used here: in vector instructions,
Triton kernels and torch operators, and in C++ because g++ infers nothing from the product of an unknown number. Only
shifts, masks and exclusive-ors use the products.
"""

from __future__ import annotations

from fpsim.rounding.kernel import Int

#: Weyl increment of the salt: 2**64 divided by the golden ratio, made odd, as a signed integer.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
# The finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
_FACTORS64 = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
# Odd factors of a 32-bit finalizer (C. Wellons, hash-prospector, 2018: "triple32"); fewer steps are used here.
_FACTORS32 = (0xED5AD4BB - (1 << 32), 0xAC4C1B51 - (1 << 32), 0x31848BAB)


def random_key(seed: Int, salt: Int) -> Int:
    """The 64-bit key of one stream of random words.

    Args:
        seed: 64-bit signed integers.
        salt: distinguishes call sites that use the same seed: a number, or 64-bit signed integers.
    """
    return _mix64(_mix64(seed ^ _GOLDEN) ^ (to_signed(salt * _GOLDEN) if isinstance(salt, int) else salt * _GOLDEN))


def random_word(low: Int, high: Int) -> Int:
    """A 32-bit random word, as signed integers.

    For a fixed key the words of 2**32 consecutive indices are all different: they are a permutation, drawn without
    replacement. The key enters twice, at the start and between two products. If it entered once, two keys would give
    the same words in another order.

    Args:
        low, high: the two halves of `random_key`, combined by exclusive-or with those of the element's index, as 32-bit
            signed integers.
    """
    word = _fold(low * _FACTORS32[0], 15, 32)
    return _fold(_fold((word ^ high) * _FACTORS32[1], 14, 32) * _FACTORS32[2], 17, 32)


def _mix64(x: Int) -> Int:
    x = _fold(x, 30, 64) * _FACTORS64[0]
    return _fold(_fold(x, 27, 64) * _FACTORS64[1], 31, 64)


def _fold(x: Int, shift: int, bits: int) -> Int:
    """``x`` exclusive-or its unsigned right shift."""
    return x ^ ((x >> shift) & ((1 << (bits - shift)) - 1))


def to_signed(number: int) -> int:
    """``number`` modulo 2**64, as a signed integer."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
