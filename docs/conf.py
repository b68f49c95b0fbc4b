"""The site: `make docs` builds it from the pages of this folder and from docstrings, offline, with warnings as errors.

Pages are Markdown that also reads well in the repository, so links go to files. A link to a page of the repository that
stands elsewhere (`ORIGINS`) leads to its page here. A link to any other file becomes plain text, because the site
does not hold that file.
"""

from __future__ import annotations

import re
from importlib import metadata
from os.path import relpath
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive

DOCS = Path(__file__).parent
ROOT = DOCS.parent
#: Pages of the site that stand elsewhere in the repository, by their names here.
ORIGINS = {
    "project/changelog": "CHANGELOG.md",
    "project/contributing": "CONTRIBUTING.md",
    "results/exhaustive": "tests/exhaustive.md",
    "results/failures": "tests/compile_backend/failures.md",
    "results/gpus": "tests/gpu/results.md",
    "results/models": "tests/models/results.md",
    "results/study": "paper/README.md",
}

project = "fpsim"
author = "The fpsim authors"
release = version = metadata.version("fpsim-torch")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"fpsim {version}"
html_show_copyright = False
myst_heading_anchors = 4
default_role = "py:obj"  # single backquotes in docstrings: a link where the name is documented
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
# Examples in docstrings are Python; outputs and other fences without a language are plain.
highlight_language = "none"

_LINK = re.compile(r"(?<!!)\[([^\]\[]*(?:\[[^\]]*\][^\]\[]*)*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")

_IMAGE = re.compile(r"(!\[[^\]]*\])\((?!\w+:)([^)\s]+)\)")


def page_source(docname: str) -> str:
    """The text of a page, with the links that this site can follow, and its images."""
    own = DOCS / f"{docname}.md"
    origin = ROOT / ORIGINS[docname] if docname in ORIGINS else own
    names = {(ROOT / path).resolve(): DOCS / f"{name}.md" for name, path in ORIGINS.items()}

    def link(found: re.Match[str]) -> str:
        text, path, anchor = found[1], found[2], found[3] or ""
        target = (origin.parent / path).resolve()
        target = names.get(target, target)
        if not target.exists():
            return found[0]  # the build warns of it
        if target.is_relative_to(DOCS) and target.suffix == ".md":
            shown = "" if text.endswith(".md") else text  # an empty text becomes the title of the page or section
            return f"[{shown}]({relpath(target, own.parent)}{anchor})"
        return text

    text = origin.read_text()
    if not text.startswith("# "):  # the title stands in the page's own file
        text = f"{own.read_text().partition(chr(10))[0]}\n\n{text}"
    text = _IMAGE.sub(lambda found: f"{found[1]}({relpath(origin.parent / found[2], own.parent)})", text)
    return _LINK.sub(link, text)


def escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let ``|x|`` in a docstring be a magnitude: reStructuredText takes it for a substitution."""
    text = "\n".join(lines)
    escaped = re.sub(r"``.*?``|`.*?`|\|", lambda found: r"\|" if found[0] == "|" else found[0], text)
    lines[:] = escaped.split("\n")


class Commands(Directive):
    """The help of every command of ``fpsim``."""

    def run(self) -> list[nodes.Node]:
        from typer.main import get_command
        from typer.testing import CliRunner

        from fpsim.cli.main import app

        found: list[nodes.Node] = []
        for words in commands(get_command(app)):
            help_text = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "100", "NO_COLOR": "1"}).stdout
            name = " ".join(["fpsim", *words])
            section = nodes.section("", nodes.title("", name), ids=[nodes.make_id(name)])
            section += nodes.literal_block(help_text, re.sub(r" +$", "", help_text.strip(), flags=re.MULTILINE))
            found.append(section)
        return found


def commands(command: Any, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The words of every command below ``command``, groups first."""
    inner = getattr(command, "commands", {})
    return [words, *(each for name in inner for each in commands(inner[name], (*words, name)))]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape_bars, priority=900)  # after napoleon
    app.add_directive("fpsim-commands", Commands)
    app.connect("source-read", lambda app, docname, source: source.__setitem__(0, page_source(docname)))
