"""Comparing `hopper_fp8` and `ada_fp8` with mmaemu, which was measured on an H100 and an RTX 4060.

    pip install mmaemu    (0.1.0, Apache-2.0; by Xun Ding), in an environment of its own, and then
    python -m tests.accumulators.judges

mmaemu replays 1,596 recorded calls of `torch._scaled_mm` through cuBLASLt, in every bit. Its fast accumulation is the
machine alone. Without it, partial sums move to float32 after every 128 products: ``promote=128``.
"""

from __future__ import annotations

import torch

import fpsim
from fpsim import matmul

DTYPES = {"e4m3fn": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SHAPES = ((3, 7, 5), (16, 200, 16), (16, 1000, 24))


def cases() -> list[tuple[str, str, str, bool, tuple[int, int, int]]]:
    """The profile of mmaemu, the formats, whether accumulation is fast, and the sizes."""
    return [
        (profile, first, second, fast, shape)
        for profile in ("hopper", "ada")
        for first, second in (("e4m3fn", "e4m3fn"), ("e4m3fn", "e5m2"), ("e5m2", "e4m3fn"))
        for fast in (True, False)
        for shape in SHAPES
    ]


def operands(first: str, second: str, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of 30 binades, (M, K) and (K, N), float8."""
    m, k, n = shape
    draw = torch.Generator().manual_seed(m * k * n)
    sides = []
    for name, size in ((first, (m, k)), (second, (n, k))):
        x = torch.randn(size, generator=draw) * torch.exp2(torch.randint(-15, 9, size, generator=draw).float())
        sides.append(fpsim.round(x, f"{name}/sat_finite").to(DTYPES[name]))
    return sides[0], sides[1].t()


def ours(profile: str, a: torch.Tensor, b: torch.Tensor, fast: bool) -> torch.Tensor:
    return matmul(a, b, accumulator=f"{profile}_fp8", promote=None if fast else 128)


def main() -> int:
    import mmaemu

    differ = 0
    for profile, first, second, fast, shape in cases():
        a, b = operands(first, second, shape)
        wanted = mmaemu.accumulate(a, b.t().contiguous(), use_fast_accum=fast, profile=profile, splitk=1)
        got = ours(profile, a, b, fast)
        count = int((got.view(torch.int32) != wanted.view(torch.int32)).sum())
        differ += count
        name = f"{profile} {first} {second} {'fast' if fast else 'promoted'} {'x'.join(map(str, shape))}"
        print(f"{name:45} {got.numel():6} sums, {count} differ")
    return int(differ > 0)


if __name__ == "__main__":
    raise SystemExit(main())
