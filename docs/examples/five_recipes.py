"""Five published recipes on one model, from the same first weights and on the same batches.

    python docs/examples/five_recipes.py [--steps N] [--seeds N] [--backend fpsim]

Put your own model, optimizer and batches into `Model` and `batch`. A recipe returns the compiled model and the
optimizer to use; the loop stays as it is. The table has the loss on new data, under the recipe, and its difference from
unrounded training. Both are means over seeds; the difference is paired by seed, with its standard error.
"""

import argparse
import time

import torch
from torch import Tensor, nn

import fpsim

RECIPES = ("amp_bf16", "te_current", "deepseek_v3", "mxfp8", "nvfp4")


class Model(nn.Module):
    """Recipes find the blocks, a list of modules of one class, and the output layer by its name ``head``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(32, 128), nn.Linear(128, 10)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Points, and the nearest of ten centres."""
    points = torch.randn(256, 32, generator=torch.Generator().manual_seed(seed))
    centres = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    return points, torch.cdist(points, centres).argmin(-1)


def train(name: str, seed: int, steps: int, backend: str) -> float:
    """The loss on new data after ``steps`` steps."""
    torch.manual_seed(seed)
    model: nn.Module = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if name != "unrounded":
        model, optimizer = getattr(fpsim.recipes, name)().apply(model, optimizer, backend=backend)
    for step in range(steps):
        x, y = batch(1_000_000 * (seed + 1) + step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return sum(nn.functional.cross_entropy(model(x), y).item() for x, y in map(batch, range(1, 5))) / 4


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--backend", default="fpsim_eager")
    given = parser.parse_args(arguments)
    losses: dict[str, list[float]] = {}
    print(f"{'recipe':12}  {'loss':>6}  {'minus unrounded':>17}  seconds")
    for name in ("unrounded", *RECIPES):
        start = time.perf_counter()
        losses[name] = [train(name, seed, given.steps, given.backend) for seed in range(given.seeds)]
        own, apart = torch.tensor(losses[name]), torch.tensor(losses[name]) - torch.tensor(losses["unrounded"])
        error = apart.std() / given.seeds**0.5
        took = time.perf_counter() - start
        print(f"{name:12}  {own.mean():6.4f}  {apart.mean():+7.4f} +- {error:.4f}  {took:7.1f}", flush=True)
    return losses


if __name__ == "__main__":
    main()
