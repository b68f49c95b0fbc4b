"""``fpsim recipes``: the published recipes, or one in detail."""

from __future__ import annotations

from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from fpsim.cli.errors import plain_errors
from fpsim.cli.output import print_table


@plain_errors
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Such as te_current.", show_default="all recipes")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the recipe as JSON (Recipe.from_json reads it).")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all recipes as Markdown.")] = False,
) -> None:
    """List the published ways to train or run a model in low precision.

    For one recipe, show which tensor has which format and scale, what stays high, and where the source's paper and code
    differ.
    """
    from fpsim.recipes import RECIPES
    from fpsim.recipes.pages import markdown as as_markdown
    from fpsim.recipes.pages import options, summary
    from fpsim.suggestions import did_you_mean

    if name is None and json:
        raise ValueError("--json prints one recipe: name it, such as fpsim recipes te_current --json")
    if name is None and markdown:
        typer.echo(as_markdown(RECIPES), nl=False)
        return
    if name is None:
        table = Table(box=box.SIMPLE_HEAD)
        for heading in ("recipe", "what it is", "source"):
            table.add_column(heading, overflow="fold")
        for each, function in RECIPES.items():
            table.add_row(*map(Text, (each, summary(function), function().source)))
        print_table(table)
        return
    if markdown:
        raise ValueError(f"--markdown prints all recipes: leave out {name}")
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}{did_you_mean(name, RECIPES)}: fpsim recipes lists them")
    recipe = RECIPES[name]()
    typer.echo(recipe.to_json() if json else f"{recipe}\n\nfpsim.recipes.{name}({options(RECIPES[name])})")
