"""``fpsim recipes`` lists recipes and prints them; the page in the documentation holds what it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fpsim import recipes
from fpsim.recipes import RECIPES, Recipe
from tests.shared.command_line import run

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_recipes_lists_every_recipe_with_its_source() -> None:
    shown = run("recipes")
    assert re.findall(r"^ {1,2}([a-z]\w*) ", shown, re.MULTILINE)[1:] == list(RECIPES)
    words = re.sub(r"\s+", " ", shown)
    assert all(function().source for function in RECIPES.values())
    assert "2509.25149" in words and "pytorch/ao 36027d8" in words


def test_a_recipe_is_printed_as_text_or_as_json() -> None:
    assert run("recipes", "halo") == (
        f"{recipes.halo()}\n\nfpsim.recipes.halo(level=0, format='fp8', block=None, head=True, high='bf16')\n"
    )
    assert Recipe.from_json(run("recipes", "deepseek_v3", "--json")) == recipes.deepseek_v3()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("hallo",), "unknown recipe 'hallo' (did you mean 'halo'?): fpsim recipes lists them"),
        (("--json",), "--json prints one recipe: name it, such as fpsim recipes te_current --json"),
        (("halo", "--markdown"), "--markdown prints all recipes: leave out halo"),
    ],
)
def test_wrong_arguments_are_errors_of_one_line(arguments: tuple[str, ...], message: str) -> None:
    assert run("recipes", *arguments, code=2) == f"error: {message}\n"


def test_the_page_has_the_table_and_the_sections_of_today() -> None:
    """If this fails: replace the end of docs/recipes.md, from its table on, by ``fpsim recipes --markdown``."""
    assert PAGE.read_text().endswith(run("recipes", "--markdown"))
