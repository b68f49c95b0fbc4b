"""The code of all pages runs and prints what the pages show; what does not run is at least well-formed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from fpsim.cli.main import app
from tests.documents.pages import PROGRAMS, ROOT, agree, blocks, commands, outputs, pages, run, written

TEXTS = {page: (ROOT / page).read_text() for page in pages()}
WITH_CODE = [page for page, text in TEXTS.items() if any(block.kind in ("python", "sh") for block in blocks(text))]


@pytest.mark.parametrize("page", WITH_CODE, ids=str)
def test_the_code_of_a_page_prints_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If only the output has changed, and rightly: ``python -m tests.documents PAGE`` writes it into the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    shown = outputs(TEXTS[page])
    for block, got in run(page, TEXTS[page], tmp_path):
        want = shown[block].text if block in shown else ""
        assert agree(want, got), f"{page}, line {block.line}: shown\n{want}\nprinted\n{got}"


def test_every_output_stands_behind_code_that_runs() -> None:
    for page, text in TEXTS.items():
        behind = outputs(text)
        assert all(code.kind in ("python", "sh") and code.file is None for code in behind), page
        assert sum(block.kind == "text" for block in blocks(text)) == len(behind), page


def test_code_that_does_not_run_is_well_formed() -> None:
    """Python compiles, and options of ``fpsim`` exist."""
    for page, text in TEXTS.items():
        for block in blocks(text):
            if block.kind == "py":
                compile(block.text, f"{page}, line {block.line}", "exec")
            for line in commands(block.text) if block.kind == "bash" else ():
                words = shlex.split(line)
                if words[0] in ("fpsim", ".venv/bin/fpsim"):
                    assert unknown_options(words[1:]) == [], f"{page}: {line}"
                assert words[0] in (*PROGRAMS, "python3", "accelerate", "ray", "pip", "make", "git", "cd") or re.match(
                    r"[A-Z_]+=", words[0]
                ), line


def unknown_options(words: list[str]) -> list[str]:
    """The options among ``words`` that the command lacks."""
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert not getattr(command, "commands", {}), f"{' '.join(words)} is no command"
    return [word for word in words if word.startswith("--") and word not in {*known, "--help"}]


@pytest.mark.parametrize(
    "shown, got, right",
    [
        ("loss 1.00\n", "loss 1.01", True),
        ("loss 1.00", "loss 1.03", False),
        ("0.0 1e-3", "0.1 1e-3", True),  # one in the last digit
        ("count 3", "count 4", False),
        ("a ... z", "a b\nc z", True),
        ("a  b", "a\nb", True),
        ("torch 2.13.0", "torch 2.13.1", False),
        ("-0.50", "0.50", False),
        ("", "anything", False),
    ],
)
def test_outputs_agree_up_to_the_last_digits(shown: str, got: str, right: bool) -> None:
    assert agree(shown, got) == right


def test_a_page_is_written_with_the_outputs_of_its_blocks(tmp_path: Path) -> None:
    page = (
        "# Page\n\n```python\n# two.py\nTWO = 2\n```\n\n```python\nprint('a', 1 + 1)\nraise ValueError('no')\n```\n\n"
        "```text\nold\n```\n\nwords\n\n```python\nx = 1\n```\n"
    )
    results = dict(run(Path("page.md"), page, tmp_path))
    assert list(results.values()) == ["a 2\nValueError: no\n", ""]
    assert (tmp_path / "two.py").read_text() == "# two.py\nTWO = 2\n"
    assert written(page, results) == page.replace("old", "a 2\nValueError: no")


def test_unknown_options_are_found() -> None:
    assert unknown_options(["study", "run", "--seeds", "2", "--sedes", "3"]) == ["--sedes"]
