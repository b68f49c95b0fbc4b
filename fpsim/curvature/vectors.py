"""Parameters as vectors: which leaves of a pytree vary, and where each of them lies in one flat tensor.

The algorithms of this package work on flat vectors, and a user's loss works on pytrees. A `Layout` converts between
the two. The dtype and the device of vectors may differ from those of the parameters. Sums over vectors are accumulated
in float64.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fpsim.suggestions import near_names

#: A pytree of parameters, usually ``dict(model.named_parameters())``.
Params = Any
#: How to gather parameters that are sharded over several processes; messages end with it.
HOW_TO_GATHER = (
    "load them into a plain module on every process, plain.load_state_dict(torch.distributed.checkpoint.state_dict."
    "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))), and average the operators of the "
    "ranks' own data with fpsim.curvature.averaged"
)
#: The leaves that vary: a glob on names, several globs (``!glob`` removes names), or a predicate; None selects all.
Select = str | Sequence[str] | Callable[[str], bool] | None


@dataclass(frozen=True, eq=False)
class Layout:
    """The leaves of a pytree that vary, in the order of the tree, as pieces of one vector.

    The function `layout` makes it. A tensor that occurs several times in the tree (a tied weight) is one piece.

    Attributes:
        names: the name of each piece: keys joined by dots (``layers.0.weight``). A tied weight has the name of its
            first occurrence.
        values: the pieces, detached; they share memory with the parameters.
        offsets: the start of each piece, and the total as one more entry.
        dtype: the dtype of vectors, float32 or float64.
        device: the device of vectors.
        leaves: all leaves of the tree, detached.
        places: for each piece, its positions among ``leaves``.
        spec: the structure of the tree.
    """

    names: tuple[str, ...]
    values: tuple[Tensor, ...]
    offsets: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    leaves: tuple[Any, ...]
    places: tuple[tuple[int, ...], ...]
    spec: Any

    @property
    def size(self) -> int:
        """The number of elements of a vector."""
        return self.offsets[-1]

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        """The pieces of ``vector`` (shape ``(size,)``), with the shapes, dtypes and devices of the parameters."""
        self._check(vector)
        return tuple(
            vector[start : start + value.numel()].view(value.shape).to(dtype=value.dtype, device=value.device)
            for start, value in zip(self.offsets, self.values, strict=False)
        )

    def join(self, pieces: Iterable[Tensor]) -> Tensor:
        """Tensors of the pieces' shapes as one vector of shape ``(size,)``, in the layout's dtype and device."""
        flat = [piece.detach().reshape(-1).to(dtype=self.dtype, device=self.device) for piece in pieces]
        return torch.cat(flat)

    def substitute(self, pieces: Iterable[Tensor]) -> Params:
        """The tree with ``pieces`` as the leaves that vary; the other leaves are the layout's constants."""
        leaves = list(self.leaves)
        for places, piece in zip(self.places, pieces, strict=True):
            for place in places:
                leaves[place] = piece
        return pytree.tree_unflatten(leaves, self.spec)

    def flatten(self, tree: Params) -> Tensor:
        """The leaves of ``tree`` that vary, as a vector of shape ``(size,)``.

        Raises:
            ValueError: ``tree`` has another structure than the parameters.
        """
        leaves, spec = pytree.tree_flatten(tree)
        if spec != self.spec:
            raise ValueError(f"the tree has another structure than the parameters: {spec} instead of {self.spec}")
        return self.join(leaves[places[0]] for places in self.places)

    def unflatten(self, vector: Tensor) -> Params:
        """``vector`` as a direction: a tree with the parameters' structure, and zeros as the constant leaves."""
        leaves = [torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        for places, piece in zip(self.places, self.split(vector), strict=True):
            for place in places:
                leaves[place] = piece
        return pytree.tree_unflatten(leaves, self.spec)

    def point(self, vector: Tensor) -> Params:
        """``vector`` as parameters: the tree with the pieces of ``vector`` as the leaves that vary."""
        return self.substitute(self.split(vector))

    def mask(self, select: Select) -> Tensor:
        """A boolean vector, shape ``(size,)``: true at the elements of the pieces that ``select`` names."""
        chosen = choose(self.names, select)
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.device)
        for name, start, end in zip(self.names, self.offsets, self.offsets[1:], strict=False):
            mask[start:end] = name in chosen
        return mask

    def block(self, select: Select) -> Layout:
        """A layout of only the pieces that ``select`` names; the others become constants.

        Raises:
            ValueError: ``select`` names no piece.
        """
        chosen = choose(self.names, select)
        kept = [index for index, name in enumerate(self.names) if name in chosen]
        if not kept:
            raise ValueError(f"select names no parameter: there are {', '.join(self.names[:5])}, ...")
        values = tuple(self.values[index] for index in kept)
        return replace(
            self,
            names=tuple(self.names[index] for index in kept),
            values=values,
            offsets=_offsets(values),
            places=tuple(self.places[index] for index in kept),
        )

    def _check(self, vector: Tensor) -> None:
        if not isinstance(vector, Tensor) or vector.shape != (self.size,):
            got = f"shape {tuple(vector.shape)}" if isinstance(vector, Tensor) else type(vector).__name__
            raise ValueError(
                f"a vector of this layout is a tensor of shape ({self.size},), got {got}: "
                "use Layout.flatten to make one of a pytree"
            )


def layout(
    params: Params,
    *,
    select: Select = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Layout:
    """The layout of the leaves of ``params`` that vary.

    A leaf varies if it is a floating-point tensor, ``select`` names it, and it is not a frozen `torch.nn.Parameter`
    (one with ``requires_grad=False``). Other leaves are constants.

    Args:
        params: any pytree, usually ``dict(model.named_parameters())``; leaves other than tensors are constants.
        select: None for all, a glob on the names (``"*.attn.*"``), several globs (those that begin with ``!`` remove
            names), or a predicate on a name.
        dtype: the dtype of vectors, float32 or float64; None is the widest dtype of the leaves that vary, at least
            float32.
        device: the device of vectors; None is the device of the first leaf that varies. ``"cpu"`` keeps the vectors
            of an algorithm off the accelerator.

    Raises:
        ValueError: no leaf varies, ``select`` is empty or a glob of it matches no name, the dtype is another one, or a
            leaf is sharded (a `DTensor`).

    >>> layout({"a": torch.ones(2), "b": torch.ones(3)}, select="b").size
    3
    """
    flat, spec = pytree.tree_flatten_with_path(params)
    leaves = tuple(leaf.detach() if isinstance(leaf, Tensor) else leaf for _, leaf in flat)
    places: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for index, (path, leaf) in enumerate(flat):
        if is_sharded(leaf):
            raise ValueError(f"{_name(path)} is sharded over processes (a DTensor): {HOW_TO_GATHER}")
        if _varies(leaf):
            places.setdefault(id(leaf), []).append(index)
            names.setdefault(id(leaf), _name(path))
    chosen = choose(tuple(names.values()), select)
    keys = [key for key, name in names.items() if name in chosen]
    if not keys:
        raise ValueError(
            "no parameter varies: params has no floating-point tensor that is selected and not frozen "
            "(requires_grad=False on a torch.nn.Parameter)"
        )
    values = tuple(leaves[places[key][0]] for key in keys)
    if dtype is None:
        dtype = reduce(torch.promote_types, (value.dtype for value in values), torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"vectors must be float32 or float64, got {dtype}: parameters may be of any dtype")
    return Layout(
        names=tuple(names[key] for key in keys),
        values=values,
        offsets=_offsets(values),
        dtype=dtype,
        device=values[0].device if device is None else torch.device(device),
        leaves=leaves,
        places=tuple(tuple(places[key]) for key in keys),
        spec=spec,
    )


def layers(params: Params, *, depth: int | None = None) -> dict[str, tuple[str, ...]]:
    """The names of the parameters grouped by the module they belong to, for curvature per layer.

    Args:
        params: as for `layout`.
        depth: how many leading components of a name make a group; None takes all but the last (one group per
            module).

    Returns:
        Group name -> names, in the order of the tree. The names of a group can be passed as ``select``.

    >>> layers({"in.weight": torch.ones(1), "in.bias": torch.ones(1), "out.weight": torch.ones(1)})
    {'in': ('in.weight', 'in.bias'), 'out': ('out.weight',)}
    """
    groups: dict[str, list[str]] = {}
    for name in layout(params).names:
        parts = name.split(".")
        kept = parts[:-1] if depth is None else parts[:depth]
        groups.setdefault(".".join(kept) or name, []).append(name)
    return {group: tuple(names) for group, names in groups.items()}


def choose(names: Sequence[str], select: Select) -> frozenset[str]:
    """The elements of ``names`` that ``select`` matches.

    Raises:
        ValueError: there is no glob, or one matches no name; the message lists near matches.
    """
    if select is None:
        return frozenset(names)
    if callable(select):
        return frozenset(name for name in names if select(name))
    patterns = [select] if isinstance(select, str) else list(select)
    if not patterns:
        raise ValueError("select is empty, so no parameter would vary: pass None for all, or at least one glob")
    chosen: set[str] = set() if any(not p.startswith("!") for p in patterns) else set(names)
    for pattern in patterns:
        glob = pattern.removeprefix("!")
        fits = {name for name in names if name == glob or fnmatch.fnmatchcase(name, glob)}
        if not fits:
            near = near_names(glob, names, cutoff=0.3) or list(names[:3])
            raise ValueError(f"select {pattern!r} fits no parameter: did you mean {', '.join(near)}?")
        chosen = chosen - fits if pattern.startswith("!") else chosen | fits
    return frozenset(chosen)


def dot(a: Tensor, b: Tensor) -> float:
    """The inner product of two vectors, summed in float64."""
    return float((a * b).sum(dtype=torch.float64))


def norm(a: Tensor) -> float:
    """The Euclidean norm of a vector, summed in float64."""
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """``generator``, or for None a fresh one with seed 0: results repeat, and all ranks draw the same numbers."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def gaussian(size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """A standard normal vector. It is drawn on the generator's device, so every device gets the same numbers."""
    return torch.randn(size, dtype=dtype, device=generator.device, generator=generator).to(device)


def rademacher(size: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """A vector of independent signs, +1 or -1 with equal probability."""
    bits = torch.randint(0, 2, (size,), dtype=torch.int8, device=generator.device, generator=generator)
    return bits.to(device=device, dtype=dtype).mul_(2).sub_(1)


def _offsets(values: Sequence[Tensor]) -> tuple[int, ...]:
    return (0, *accumulate(value.numel() for value in values))


def is_sharded(leaf: object) -> bool:
    """Whether ``leaf`` is a `torch.distributed.tensor.DTensor`, as under FSDP2 and tensor parallelism."""
    return isinstance(leaf, Tensor) and hasattr(leaf, "full_tensor")


def _varies(leaf: object) -> bool:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return False
    return leaf.requires_grad or not isinstance(leaf, nn.Parameter)


def _name(path: tuple[Any, ...]) -> str:
    """Keys joined by dots: ``(MappingKey('a.weight'),)`` is ``a.weight``."""
    parts = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
    return ".".join(str(part) for part in parts) or "params"
