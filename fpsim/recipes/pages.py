"""The recipes as text for people: a list, one recipe in detail, and the sections of the page in the documentation."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import replace

from fpsim.recipes.recipe import Recipe

_ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
_REPOSITORY = re.compile(r"(?<!\S)([\w-]+/[\w.-]+) ([0-9a-f]{7})\b")


def summary(recipe: Callable[..., Recipe]) -> str:
    """What a recipe does, in one sentence: the first line of its docstring."""
    return inspect.getdoc(recipe).partition("\n")[0]  # type: ignore[union-attr]


def options(recipe: Callable[..., Recipe]) -> str:
    """The arguments of a recipe with their defaults: ``level=0, format='fp8'``."""
    given = inspect.signature(recipe).parameters.values()
    return ", ".join(f"{parameter.name}={_short(parameter.default)}" for parameter in given)


def _short(default: object) -> str:
    return f"{default:.3g}" if isinstance(default, float) else repr(default)


def markdown(recipes: Mapping[str, Callable[..., Recipe]]) -> str:
    """The table of the recipes and a section for each, as ``docs/recipes.md`` has them."""
    table = ["| recipe | what it is | source |", "|---|---|---|"]
    sections = []
    for name, function in recipes.items():
        recipe = function()
        source = _linked(recipe.source)
        table.append(f"| [`{name}`](#{name}) | {summary(function)} | {source} |")
        shown = str(replace(recipe, source="", notes=())).splitlines()[2:]
        code = ["```", f"{name}({options(function)})", *shown, "```"]
        notes = [f"- {note}" for note in recipe.notes]
        sections.append("\n".join([f"## {name}", "", _body(function), "", *code, "", *notes]))
    return "\n".join([*table, "", "\n\n".join(sections)]) + "\n"


def _body(recipe: Callable[..., Recipe]) -> str:
    """The docstring of a recipe up to its arguments, as Markdown."""
    text = inspect.getdoc(recipe).partition("\n\nArgs:")[0].partition("\n\nRaises:")[0]  # type: ignore[union-attr]
    paragraphs = text.replace("``", "`").split("\n\n")
    return "\n\n".join(part if part.startswith("-") else textwrap.fill(part, 120) for part in paragraphs)


def _linked(source: str) -> str:
    """A source with links to papers and repositories."""
    source = _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", source)
    return _REPOSITORY.sub(r"[\1](https://github.com/\1/tree/\2)", source)
