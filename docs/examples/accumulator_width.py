"""How wide must the accumulator of each product be?

    python docs/examples/accumulator_width.py [--tokens N]

The operands of a product are FP8. Its sums are rounded to e8mM after every addition, and M grows until the error
of the sums is below a tenth of the error that the rounding of the operands makes. A wider accumulator would be wasted.
The gradient of a weight sums over all tokens: its width depends on the batch. `promote=128` adds partial sums of 128
products in float32, as kernels do; the second column of widths has that.
"""

import argparse

import torch
from torch import nn

import fpsim

WIDTHS = range(6, 24)
SHARE = 0.1


def widths_of(model: nn.Module, tokens: int, promote: int | None) -> dict[tuple[str, str], int]:
    """The least M for every product, by module and kind."""
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1))
    found: dict[tuple[str, str], int] = {}
    for width in WIDTHS:
        policy = {"activation": "e4m3fn", "weight": "e4m3fn", "gradient": "e5m2", "scale": "power_of_two"}
        policy |= {"accumulator": f"e8m{width}", "promote": promote}
        profile = fpsim.profile(model, x, policy=policy, loss=lambda outputs: outputs.square().mean())
        for product in profile.products:
            assert product.sum is not None, "the policy names an accumulator"
            if product.sum.relative_error < SHARE * product.relative_error:
                found.setdefault((product.path, product.kind), width)
        if len(found) == len(profile.products):
            return found
    return found


def main(model: nn.Module, tokens: int) -> dict[tuple[str, str], tuple[int, int]]:
    """The least M for every product, without promotion and with it."""
    plain, promoted = (widths_of(model, tokens, promote) for promote in (None, 128))
    print("layer  product   M  M, promoted every 128")
    for (path, kind), width in plain.items():
        print(f"{path:5}  {kind:7}  {width:2}  {promoted[path, kind]:2}")
    return {key: (width, promoted[key]) for key, width in plain.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    torch.manual_seed(0)
    main(nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), parser.parse_args().tokens)
