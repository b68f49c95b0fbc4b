"""Sixteen values of your own for the weights of each layer, and their error beside that of NF4 and INT4.

    python docs/examples/own_codebook.py

All three formats divide each group of 64 weights by its largest magnitude. NF4 has the quantiles of a normal
distribution, INT4 has evenly spaced values. The codebooks are learned from the weights that they will round: Lloyd's
algorithm moves each value to the mean of the numbers that are nearest to it. The first and the last value stay at -1
and 1, because the largest magnitude of a group becomes the largest of the codebook. A rule for each module gives it its
own codebook. The table has the signal-to-noise ratio of each rounded weight, in dB, and the relative error of its
layer's product.
"""

from typing import Any

import torch
from torch import Tensor, nn

import fpsim

GROUP = 64


def lloyd(numbers: Tensor, count: int = 16, rounds: int = 50) -> fpsim.CodebookFormat:
    """``count`` values from -1 to 1 with a small mean squared error for ``numbers``."""
    values = numbers.quantile(torch.linspace(0, 1, count))
    for _ in range(rounds):
        nearest = torch.bucketize(numbers, (values[1:] + values[:-1]) / 2)
        sums = torch.zeros(count).index_add_(0, nearest, numbers)
        counts = nearest.bincount(minlength=count)
        values = torch.where(counts > 0, sums / counts.clamp(min=1), values)
        values[0], values[-1] = -1, 1
    return fpsim.CodebookFormat(tuple(values.tolist()))


def codebook_of(weight: Tensor) -> fpsim.CodebookFormat:
    groups = weight.detach().reshape(-1, GROUP)
    return lloyd((groups / groups.abs().amax(1, keepdim=True)).flatten())


def policies_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Weights in 4 bits by three formats; the other operands stay as they are."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    own = {name: {"weight": f"{codebook_of(layer.weight).name}/group:{GROUP}"} for name, layer in linear.items()}
    return {
        "int4": {"weight": f"int4/group:{GROUP}"},
        "nf4": {"weight": f"nf4/group:{GROUP}"},
        "own": {"weight": f"nf4/group:{GROUP}", "modules": own},
    }


def main(model: nn.Module, x: Tensor) -> dict[tuple[str, str], tuple[float, float]]:
    """The ratio and the error, by format and layer."""
    found = {}
    for name, policy in policies_of(model).items():
        profile = fpsim.profile(model, x, policy=policy, loss=None)
        for site in profile.sites:
            if (site.kind, site.role) == ("fprop", "weight"):
                error = profile.relative_error(site)
                assert error is not None, "a weight is an operand"
                found[name, site.path] = (site.statistics.sqnr, error)
                print(f"layer {site.path}  {name:4}  {site.statistics.sqnr:5.2f} dB  product off by {error:.2%}")
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256))
    nn.init.trunc_normal_(network[0].weight)  # the other layer keeps torch's uniform weights
    main(network, torch.randn(128, 256))
