"""Parts of recipes: blocks whose precision a gate chooses, by calls of `fpsim.training.dynamic_precision`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from fpsim.policy.globs import matches
from fpsim.posttraining.layers import watch_inputs
from fpsim.recipes.exclusions import block_lists
from fpsim.training.dynamic_precision import gate_blocks, gate_parameters, relative_costs


@dataclass(frozen=True)
class GatedBlocks:
    """Blocks that exist once for each pair of widths, with a gate that chooses one for each sample.

    Attributes:
        widths: pairs of the bits of activations and of gradients.
        weight: the bits of weights.
        blocks: globs of the paths of the blocks; none finds the members of the outermost lists of two or more modules
            of one class.
        channel_axis: the axis of the channels in the inputs of blocks.
    """

    widths: tuple[tuple[int, int], ...]
    weight: int
    blocks: tuple[str, ...] = ()
    channel_axis: int = 1

    def apply(self, model: torch.nn.Module, batches: Iterable[Any] | None) -> torch.nn.Module:
        """Change ``model`` in place. The first of ``batches`` shows the order of the blocks, and their channels.

        Raises:
            ValueError: there is no batch, no block is found, a glob matches none, or the model calls a block twice.
                Otherwise the errors of `gate_blocks`.
        """
        if batches is None:
            raise ValueError("the order of blocks and the sizes of gates are found in a batch: give batches=...")
        paths = self._paths(model)
        channels: dict[str, int] = {}

        def see(path: str, x: Tensor) -> None:
            if path in channels:
                raise ValueError(
                    f"the model calls block {path!r} twice, and a gate chooses once: leave it out of blocks"
                )
            channels[path] = x.shape[self.channel_axis]

        watch_inputs(model, {path: model.get_submodule(path) for path in paths}, islice(batches, 1), see)
        if missing := [path for path in paths if path not in channels]:
            raise ValueError(f"the first batch does not reach block {missing[0]!r}: leave it out of blocks")
        return gate_blocks(model, channels, relative_costs(self.widths, self.weight), channel_axis=self.channel_axis)

    def _paths(self, model: torch.nn.Module) -> list[str]:
        if not self.blocks:
            lists = block_lists(model)
            if not lists:
                raise ValueError(f"no list of blocks found in {type(model).__name__}: give blocks=('layers.*',)")
            return [f"{path}.{name}" for path in lists for name, _ in model.get_submodule(path).named_children()]
        paths = [path for path, _ in model.named_modules() if path]
        found = {glob: [path for path in paths if matches(glob, path)] for glob in self.blocks}
        for glob, matched in found.items():
            if not matched:
                raise ValueError(f"blocks={glob!r} matches no module of {type(model).__name__}")
        named = {path for matched in found.values() for path in matched}
        return [path for path in paths if path in named and not any(path.startswith(f"{other}.") for other in named)]

    def __str__(self) -> str:
        where = f"blocks {', '.join(self.blocks)}" if self.blocks else "each block"
        pairs = ", ".join(f"{a}/{g}" for a, g in self.widths)
        return f"{where} in one of {pairs} bits, as a gate chooses for each sample; weights in {self.weight}"


@dataclass(frozen=True)
class TrainedGates:
    """The optimizer trains the gates as it trains the parameters of its first group."""

    def apply(self, optimizer: Any, model: torch.nn.Module) -> Any:
        """Add the parameters of the gates of ``model`` to ``optimizer``, unless it has them.

        Raises:
            ValueError: the model has no gates.
        """
        gates = gate_parameters(model)
        if not gates:
            raise ValueError("the model has no gates: apply GatedBlocks first")
        known = {p for group in optimizer.param_groups for p in group["params"]}
        if new := [p for p in gates if p not in known]:
            settings = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
            optimizer.add_param_group({**settings, "params": new})
        return optimizer

    def __str__(self) -> str:
        return "also trains the gates, as the parameters of its first group"
