"""Links of all pages lead somewhere, every page of the site is reachable, and the reference holds every public name."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest

import fpsim
from tests.documents.pages import ROOT

DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "paper/README.md")),
    *sorted(DOCS.rglob("*.md")),
    *sorted((ROOT / "tests").rglob("*.md")),
]
_LINK = re.compile(r"\]\(([^()\s]+)\)")


def prose(text: str) -> str:
    """A page without its fenced blocks and code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub and MyST name them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in _LINK.findall(prose(page.read_text())):
        if re.match(r"\w+:", link):
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_the_site_is_in_a_table_of_contents() -> None:
    listed = re.findall(r"^```\{toctree\}\n(?::[^\n]*\n)*\n(.*?)^```$", (DOCS / "index.md").read_text(), re.M | re.S)
    found = {path for entry in "".join(listed).split() for path in DOCS.glob(f"{entry}.md")}
    assert found | {DOCS / "index.md"} == set(DOCS.rglob("*.md"))


def test_the_reference_has_every_public_name() -> None:
    modules = {"reference": "exact"}
    page = (DOCS / "reference/fpsim.md").read_text()
    for name in dir(fpsim):
        if isinstance(getattr(fpsim, name), types.ModuleType):
            own = (DOCS / "reference" / f"{modules.get(name, name)}.md").read_text()
            assert f".. automodule:: fpsim.{name}\n   :members:" in own
        else:
            assert re.search(rf"^\.\. auto(class|function):: fpsim\.{name}$", page, re.MULTILINE), name


def test_the_readme_is_short_and_names_the_distribution() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "fpsim-torch" in text
    hints = [
        line
        for folder in ("fpsim", "compile_backend", "paper", "docs", "tests")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".md")
        for line in file.read_text().splitlines()
        if re.search(r"pip install '?fpsim\b(?!-torch)", line)
    ]
    assert hints == []
