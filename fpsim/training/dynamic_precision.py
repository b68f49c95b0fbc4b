"""Precisions that a small network chooses for each sample: dynamic fractional quantization (DFQ).

A gated block holds one copy of a block for each choice. The copies share their parameters and buffers, and a policy
rounds each of them in formats of its own (the glob ``*.precisions.0`` names the first copies). All copies compute all
samples. The result of a sample is that of the copy which the gate chooses for it.

The gate of a block sees the means of the channels of the block's input. Two linear layers of the block embed them. An
LSTM, which all blocks share, goes from block to block and gives one number for each choice. The greatest number is
chosen, and the derivative is that of the softmax (straight through). So the loss of the task trains the gates, and so
does a term for the cost of the choices, whose sign keeps the cost near a target (`CostTarget`).

Source: Fu et al., FracTrain, NeurIPS 2020, section 3.2; GATECH-EIC/FracTrain 1113ec2, ``fractrain_cifar/models.py`` and
``train_dfq.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: The bits of a number that costs are relative to.
FULL_BITS = 32


def choose(logits: Tensor) -> Tensor:
    """One where the greatest number of a row stands, the first one of equal numbers, and zero elsewhere.

    The derivative is that of the softmax of the row.

    Args:
        logits: shape (samples, choices).

    Returns:
        Numbers 0 and 1 of the same shape and dtype. A row with a NaN becomes NaN.

    >>> choose(torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, -1.0]]))
    tensor([[0., 1., 0.],
            [1., 0., 0.]])
    """
    probability = logits.softmax(-1)
    hard = nn.functional.one_hot(probability.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return hard + (probability - probability.detach())


def mix(choice: Tensor, results: Sequence[Tensor]) -> Tensor:
    """For each sample the result that it chooses, as the sum of all results times 0 or 1.

    Args:
        choice: shape (samples, choices), as `choose` returns it. Its derivative is the product of the derivative of the
            sum with each result.
        results: one tensor of shape (samples, ...) for each choice.

    Raises:
        TypeError: a result is no tensor.
    """
    for result in results:
        if not isinstance(result, Tensor):
            raise TypeError(
                f"a gated block returns one tensor, got {type(result).__name__}: gate modules inside it that return a "
                "tensor, or set the model's options so that its blocks do (use_cache=False)"
            )
    shape = (-1, *[1] * (results[0].dim() - 1))
    return sum(  # type: ignore[return-value]
        choice[:, k].to(result.dtype).reshape(shape) * result for k, result in enumerate(results)
    )


class Gate(nn.Module):
    """The network that all gated blocks share: an LSTM cell and a linear layer.

    Args:
        embedding: the number of inputs.
        hidden: the number of hidden units.
        choices: the number of outputs.
    """

    def __init__(self, embedding: int, hidden: int, choices: int, **where: Any) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(embedding, hidden, **where)
        self.projection = nn.Linear(hidden, choices, **where)
        nn.init.normal_(self.projection.weight, std=(2 / (hidden * choices)) ** 0.5)
        #: The state between two blocks of a forward pass.
        self.state: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Logits of shape (samples, choices), and the next state, for ``x`` of shape (samples, embedding)."""
        hidden, cell = self.cell(x, state)
        return self.projection(hidden), (hidden, cell)


class GatedBlock(nn.Module):
    """A block in several precisions, one of which is chosen for each sample.

    Attributes:
        precisions: the copies of the block, which share its parameters and buffers.
        gate: the network that all gated blocks of the model share.
        costs: the cost of each choice (`relative_costs`).
        choice: that of the last forward pass, shape (samples, choices), or None. It carries derivatives.
    """

    choice: Tensor | None

    def __init__(
        self, block: nn.Module, gate: Gate, embed: nn.Module, costs: Sequence[float], ends: tuple[bool, bool], axis: int
    ) -> None:
        super().__init__()
        shared = {id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}
        self.precisions = nn.ModuleList(copy.deepcopy(block, dict(shared)) for _ in costs)
        self.gate, self.embed = gate.train(block.training), embed.train(block.training)
        self.training = self.precisions.training = block.training  # modules in the block have their own
        self.costs, self.channel_axis = tuple(costs), axis
        self.is_first, self.is_last = ends
        self.choice = None
        for name, value in vars(block).items():  # models read attributes of their blocks
            if not name.startswith("_") and name not in vars(self):
                setattr(self, name, value)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's result for ``x`` of shape (samples, ...), in the precision that each sample chooses.

        Raises:
            TypeError: the block returns something else than a tensor.
        """
        axes = [axis for axis in range(1, x.dim()) if axis != self.channel_axis % x.dim()]
        means = x.mean(axes) if axes else x
        logits, state = self.gate(self.embed(means), None if self.is_first else self.gate.state)
        self.gate.state = None if self.is_last else state
        self.choice = choose(logits)
        return mix(self.choice, [block(x, *args, **kwargs) for block in self.precisions])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "choice": None}  # tensors with a history can be neither copied nor pickled


def gate_blocks(
    model: nn.Module,
    channels: Mapping[str, int],
    costs: Sequence[float],
    *,
    channel_axis: int = 1,
    features: int = 32,
    embedding: int = 16,
    hidden: int = 16,
) -> nn.Module:
    """Put a `GatedBlock` in the place of each block of ``model``.

    Parameters of the blocks stay the same objects. Those of the gates are new, and drawn by torch's global generator:
    `gate_parameters` names them, for the optimizer. The state dict names the parameters of a block once for each copy.

    Args:
        model: an uncompiled module, changed in place.
        channels: for the path of each block, in the order in which the model calls them, the number of channels of its
            input.
        costs: the cost of each choice, two or more (`relative_costs`).
        channel_axis: the axis of the channels in the inputs: 1 for images, -1 for (batch, tokens, channels). The gates
            see the means over all other axes but the first.
        features, embedding, hidden: the sizes of the gates. The defaults are those of the code.

    Returns:
        ``model``.

    Raises:
        ValueError: there is no block, there are fewer than two choices, a path names no module or one inside another,
            or the model has gated blocks already.
    """
    if not channels or len(costs) < 2:
        raise ValueError(f"gates choose for one block or more among two or more, got {len(channels)} and {len(costs)}")
    if _gated(model):
        raise ValueError(f"{type(model).__name__} has gated blocks already: make the model anew")
    paths = list(channels)
    for path in paths:
        if not path or any(path.startswith(f"{other}.") for other in paths):
            raise ValueError(f"block {path!r} is the model itself, or lies in another block: name separate modules")
    try:
        blocks = {path: model.get_submodule(path) for path in paths}
    except AttributeError as error:
        raise ValueError(f"a block is no module of {type(model).__name__}: {error}") from None
    like = next(model.parameters())
    where = {"device": like.device, "dtype": like.dtype}
    gate = Gate(embedding, hidden, len(costs), **where)
    for path, block in blocks.items():
        embed = nn.Sequential(
            nn.Linear(channels[path], features, **where), nn.ReLU(), nn.Linear(features, embedding, **where)
        )
        for layer in (embed[0], embed[2]):
            nn.init.normal_(layer.weight, std=(2 / layer.out_features) ** 0.5)  # type: ignore[arg-type, operator]
        ends = (path == paths[0], path == paths[-1])
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, GatedBlock(block, gate, embed, costs, ends, channel_axis))
    return model


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the gates of ``model``, each once."""
    blocks = _gated(model).values()
    return list(dict.fromkeys(p for block in blocks for part in (block.gate, block.embed) for p in part.parameters()))


def choices(model: nn.Module) -> dict[str, Tensor]:
    """The choices of the last forward pass by the paths of the blocks: 0 and 1, shape (samples, choices).

    Raises:
        ValueError: ``model`` has no gated block, or was not called.
    """
    blocks = _gated(model)
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no gated block: call gate_blocks, or apply the recipe")
    found = {path: block.choice for path, block in blocks.items()}
    if missing := [path for path, choice in found.items() if choice is None]:
        raise ValueError(f"block {missing[0]!r} has chosen nothing yet: call the model first")
    return found  # type: ignore[return-value]


def relative_costs(widths: Sequence[tuple[int, int]], weight: int) -> tuple[float, ...]:
    """The bit operations of the three products of a layer, relative to those of 32-bit numbers.

    With w bits of weights, a of activations and g of gradients: (w a + w g + a g) / (3 * 32^2).

    Args:
        widths: pairs of the bits of activations and of gradients, one for each choice.
        weight: the bits of weights.

    >>> [round(100 * cost, 2) for cost in relative_costs([(3, 6), (6, 12), (32, 32)], weight=4)]
    [1.76, 4.69, 41.67]
    """
    return tuple((weight * a + weight * g + a * g) / (3 * FULL_BITS**2) for a, g in widths)


def mean_cost(model: nn.Module, block_costs: Mapping[str, float] | None = None) -> Tensor:
    """The mean cost of the choices of the last forward pass, over samples and blocks; a number with derivatives.

    Args:
        block_costs: the multiply-adds of each block by its path, in any unit, as weights of the mean; None means equal
            ones.

    Raises:
        ValueError: as `choices`, or ``block_costs`` names other blocks.
    """
    chosen, blocks = choices(model), _gated(model)
    weights = dict.fromkeys(chosen, 1.0) if block_costs is None else block_costs
    if weights.keys() != chosen.keys():
        raise ValueError(f"block_costs names {', '.join(weights)}, and the gated blocks are {', '.join(chosen)}")
    total = torch.stack(
        [weights[path] * (choice @ choice.new_tensor(blocks[path].costs)).mean() for path, choice in chosen.items()]
    )
    return total.sum() / sum(weights.values())


@dataclass(frozen=True)
class CostTarget:
    """A term of the loss that keeps the cost of the choices near a target.

    It is the sum of the costs over samples, blocks and the three products, times ``weight``. Its sign is + where
    `mean_cost` is at the target or above it, and - below. Within ``margin`` of the target it is a tenth of that.

    Attributes:
        target: the cost relative to 32-bit numbers, a share: 0.03 for the 3 % of the README's example.
        weight: a factor, beta in the code.
        margin: relax in the code, as a share.

    FracTrain, which joins PFQ and DFQ, begins with a low target and raises it by 0.005 whenever the trigger of
    `fpsim.training.schedules.Progressive` switches: ``CostTarget(0.015 + 0.005 * state.stage)``.
    """

    target: float = 0.03
    weight: float = 1e-3
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not (self.target > 0 and self.weight >= 0 and self.margin >= 0):
            raise ValueError(f"a target is positive, and weight and margin are not negative, got {self}")

    def sign(self, cost: float) -> float:
        """The sign for a mean cost: 1 or -1, and 0.1 or -0.1 within the margin.

        >>> [CostTarget(0.03, margin=0.01).sign(cost) for cost in (0.019, 0.021, 0.03, 0.05)]
        [-1.0, -0.1, 0.1, 1.0]
        """
        if cost < self.target - self.margin:
            return -1.0
        if cost >= self.target + self.margin:
            return 1.0
        return 0.1 if cost >= self.target else -0.1

    def term(self, model: nn.Module, block_costs: Mapping[str, float] | None = None) -> Tensor:
        """The term for the last forward pass of ``model``, compiled or not. Add it to the loss of the task.

        Raises: the errors of `mean_cost`.
        """
        cost, chosen = mean_cost(model, block_costs), choices(model)
        samples = len(next(iter(chosen.values())))
        return cost * (self.sign(float(cost.detach())) * self.weight * 3 * samples * len(chosen))


def _gated(model: nn.Module) -> dict[str, GatedBlock]:
    """The gated blocks of ``model`` by path; paths of a compiled model are those of the model."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, GatedBlock)}
    return {path.removeprefix("_orig_mod."): module for path, module in found.items()}
