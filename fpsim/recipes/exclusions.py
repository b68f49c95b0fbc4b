"""The modules that a recipe keeps in high precision, described once and found in any model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from fpsim.policy import Policy
from fpsim.policy.globs import matches
from fpsim.recipes.description import short
from fpsim.suggestions import did_you_mean

#: The last part of the path that heads have: of language models, of classifiers.
HEADS = ("lm_head", "output", "head", "embed_out", "output_projection", "proj_out", "classifier", "score", "fc")
#: The last part of the path that routers have, beside a module ``experts``.
ROUTERS = ("gate", "router")
#: The modules whose products have weights.
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Exclusions:
    """Modules that a recipe keeps in high precision, and how `within` finds them.

    Attributes:
        head: True for the output layer (of a language model or a classifier), or the glob of its path.
        first_blocks, last_blocks: how many blocks at both ends, or their share as a float between 0 and 1. A share
            stands for the nearest number of blocks, that of the last ones for at least one.
        blocks: the path of the list of blocks; None finds it.
        router: whether to keep the routers of experts.
        first_layer, last_layer: whether to keep the first or last linear layer or convolution, in the order in which
            the model holds them.
        modules: globs of more modules.
        policy: the policy of these modules; None means that nothing in them is rounded.
    """

    head: bool | str = False
    first_blocks: float = 0
    last_blocks: float = 0
    blocks: str | None = None
    router: bool = False
    first_layer: bool = False
    last_layer: bool = False
    modules: tuple[str, ...] = ()
    policy: Policy | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", (self.modules,) if isinstance(self.modules, str) else tuple(self.modules))
        for name in ("first_blocks", "last_blocks"):
            number = getattr(self, name)
            if number < 0 or (number >= 1 and number != int(number)):
                raise ValueError(f"{name} is a number of blocks or a share between 0 and 1, got {number}")

    def within(self, policy: Policy, model: nn.Module) -> Policy:
        """``policy`` with a rule for each module of ``model`` that is kept in high precision."""
        globs = [glob for glob in self.paths(model) if glob not in policy.skip]
        if self.policy is None:
            return replace(policy, skip=(*globs, *policy.skip))
        return policy.with_modules(dict.fromkeys(globs, self.policy))

    def paths(self, model: nn.Module) -> list[str]:
        """The paths of the modules of ``model`` that are kept in high precision, and the globs in `modules`.

        Raises:
            ValueError: there is no such module, or there are several lists of blocks.
        """
        found = list(self.modules)
        if self.first_layer or self.last_layer:
            layers = [path for path, module in model.named_modules() if _is_layer(module)]
            if not layers:
                raise ValueError(f"{type(model).__name__} has no linear layer or convolution to keep")
            found += layers[:1] * self.first_layer + layers[-1:] * self.last_layer
        if self.head is True:
            found.append(_head(model))
        elif self.head:
            found.append(self.head)
        if self.first_blocks or self.last_blocks:
            found += self._block_paths(model)
        if self.router:
            found += _routers(model)
        return list(dict.fromkeys(found))

    def _block_paths(self, model: nn.Module) -> list[str]:
        path = _block_list(model) if self.blocks is None else self.blocks
        try:
            blocks = model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"blocks={path!r} is no module of {type(model).__name__}") from None
        names = [name for name, _ in blocks.named_children()]
        first, last = _count(self.first_blocks, len(names)), _count(self.last_blocks, len(names), least=1)
        if first + last >= len(names):
            raise ValueError(
                f"{type(model).__name__} has {len(names)} blocks, and {first} first and {last} last ones are to stay "
                "in high precision, which leaves none: give smaller first_blocks and last_blocks"
            )
        return [f"{path}.{name}" for name in names[:first] + names[len(names) - last :]]

    def __str__(self) -> str:
        texts = ["head" if self.head is True else str(self.head)] if self.head else []
        for end, number in (("first", self.first_blocks), ("last", self.last_blocks)):
            if number:
                texts.append(f"{end} {number:.1%} of blocks" if number < 1 else f"{end} {number:.0f} blocks")
        texts += ["routers"] * self.router + ["first layer"] * self.first_layer + ["last layer"] * self.last_layer
        return f"{', '.join([*texts, *self.modules])}: {short(self.policy)}"

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON types."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        changed = {name: value for name, value in given.items() if value != getattr(Exclusions(), name)}
        return {name: value.to_dict() if name == "policy" else value for name, value in changed.items()}

    @staticmethod
    def from_dict(given: Mapping[str, Any]) -> Exclusions:
        """The exclusions that `to_dict` wrote.

        Raises:
            ValueError: a field is unknown.
        """
        valid = [field.name for field in fields(Exclusions)]
        for key in given:
            if key not in valid:
                hint = did_you_mean(key, valid)
                raise ValueError(f"unknown field {key!r} of exclusions{hint}: use {', '.join(valid)}")
        policy = given.get("policy")
        return Exclusions(**{**given, "policy": None if policy is None else Policy.from_options(policy)})


def _count(number: float, total: int, least: int = 0) -> int:
    """How many of ``total`` blocks ``number`` means: a number, or a share."""
    return max(least, round(number * total)) if 0 < number < 1 else int(number)


def _is_layer(module: nn.Module) -> bool:
    # Hugging Face's GPT-2 has linear layers of a class of its own, named after convolutions.
    return isinstance(module, _LAYERS) or type(module).__name__ == "Conv1D"


def _head(model: nn.Module) -> str:
    """The path of the output layer."""
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    paths = [path for path, module in model.named_modules() if module is output and output is not None]
    paths += [
        path for path, module in model.named_modules() if path.rpartition(".")[2] in HEADS and path.count(".") < 2
    ]
    if not paths:
        raise ValueError(
            f"no output layer found in {type(model).__name__}, by get_output_embeddings() or the names "
            f"{', '.join(HEADS)}: give head='its.path', or head=False if it has none"
        )
    return paths[0]


def block_lists(model: nn.Module) -> list[str]:
    """The paths of the lists of blocks: the outermost lists of two or more modules of one class that hold layers."""
    lists = [path for path, module in model.named_modules() if _is_block_list(module)]
    return [path for path in lists if not any(matches(other, path) and other != path for other in lists)]


def _block_list(model: nn.Module) -> str:
    """The path of the only list of blocks."""
    outer = block_lists(model)
    if len(outer) != 1:
        found = f"several lists of blocks ({', '.join(outer)})" if outer else "no list of blocks"
        raise ValueError(
            f"{found} found in {type(model).__name__}: give blocks='path.of.the.list', or first_blocks=0 and "
            "last_blocks=0"
        )
    return outer[0]


def _is_block_list(module: nn.Module) -> bool:
    children = list(module.children()) if isinstance(module, nn.ModuleList | nn.Sequential) else []
    return (
        len(children) > 1
        and len({type(child) for child in children}) == 1
        and all(any(_is_layer(inner) for inner in child.modules()) and not _is_layer(child) for child in children)
    )


def _routers(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if hasattr(module, "experts"):
            yield from (f"{path}.{name}".lstrip(".") for name, _ in module.named_children() if name in ROUTERS)
