"""Rounding written out by hand in NumPy, for tests of what is built on rounding. It shares no code with fpsim."""

from __future__ import annotations

import numpy as np

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def integers(x: np.ndarray, bits: int, axis: int = -1) -> np.ndarray:
    """float32 numbers rounded to symmetric integers times amax / max, along one axis."""
    x, top = np.asarray(x), 2 ** (bits - 1) - 1
    return to_integers(x, ratio_of(x, top, axis), top)


def ratio_of(x: np.ndarray, top: float, axis: int = -1) -> np.ndarray:
    """amax / max in float32, 1 for zeros."""
    amax = np.abs(x).max(axis, keepdims=True).astype(np.float32)
    return np.where(amax == 0, np.float32(1), amax / np.float32(top))


def to_integers(x: np.ndarray, ratio: np.ndarray, top: int) -> np.ndarray:
    """Numbers rounded to the integers up to ``top`` times ``ratio``, in their own dtype."""
    ratio = ratio.astype(x.dtype)
    return np.clip(np.rint(x / ratio), -top, top) * ratio


def to_e2m1(y: np.ndarray) -> np.ndarray:
    """Numbers rounded to e2m1fn: nearest, ties to the even code, saturated."""
    middle = (E2M1[1:] + E2M1[:-1]) / 2
    code = np.searchsorted(middle, np.abs(y), side="right")
    is_tie = np.isin(np.abs(y), middle)
    code = np.where(is_tie & (code % 2 == 1), code - 1, code)
    return np.sign(y) * E2M1[code]


def blocks(x: np.ndarray, size: int, bits: int, axis: int = -1) -> np.ndarray:
    """`integers` in blocks of ``size`` along an axis whose length it divides."""
    moved = np.moveaxis(x, axis, -1)
    split = moved.reshape(*moved.shape[:-1], -1, size)
    return np.moveaxis(integers(split, bits).reshape(moved.shape), -1, axis)
