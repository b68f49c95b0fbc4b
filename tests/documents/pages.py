"""The code in the pages of ``docs/`` and in README files: what it is, how it runs, and whether its output is true.

A page is Markdown. Its fenced blocks mean:

    python   runs, in the namespace of the page. A first line such as ``# train.py`` makes the block a file instead.
    sh       runs, command by command, in the folder of the page's files.
    text     behind one of these: what it prints, with warnings of fpsim's and the last line of an error.
    py, bash do not run: they need minutes, a GPU, a network, or files of the reader's. They are checked for syntax.

In an output ``...`` stands for any text, runs of blanks count as one, and a number with a point may be off by two
percent or by one in its last digit, because sums differ between processors.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import shlex
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$\n?", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w./-]+\.\w+)\n")
_NUMBER = r"[-+]?\d*\.\d+(?:e[-+]?\d+)?"
#: Programs that a block of commands may run; `python` and `torchrun` are those of this environment.
PROGRAMS = ("fpsim", "python", "torchrun")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        kind: the word after the fence.
        text: what stands between the fences.
        line: the number of its first line in the page.
        start, end: where ``text`` begins and ends in the page.
    """

    kind: str
    text: str
    line: int
    start: int
    end: int

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, if it is one."""
        named = _FILE.match(self.text)
        return named[1] if named and self.kind == "python" else None


def pages() -> list[Path]:
    """All pages, relative to the root of the repository."""
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "paper/README.md")]
    return [page.relative_to(ROOT) for page in (*documents, *sorted((ROOT / "docs").rglob("*.md")))]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [
        Block(found[1], found[2], text.count("\n", 0, found.start()) + 2, found.start(2), found.end(2))
        for found in _FENCE.finditer(text)
    ]


def outputs(text: str) -> dict[Block, Block]:
    """The blocks with output, and the output that stands directly behind each."""
    return {
        code: shown
        for code, shown in itertools.pairwise(blocks(text))
        if shown.kind == "text" and not text[code.end : shown.start].strip("`tex\n")
    }


def run(page: Path, text: str, folder: Path) -> Iterator[tuple[Block, str]]:
    """Run the blocks of a page one after the other. The working directory is ``folder``.

    Yields:
        Each block that ran, and what it printed.
    """
    torch._dynamo.reset()  # shapes of other pages would make this page's symbolic
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(text):
        if block.file is not None:
            (folder / block.file).write_text(block.text)
        elif block.kind == "python":
            # Lines keep their numbers, so that errors name the place in the page.
            yield block, printed(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
        elif block.kind == "sh":
            yield block, "".join(command_output(line, folder) for line in commands(block.text))


def printed(code: Any, names: dict[str, Any]) -> str:
    """What ``code`` prints, then warnings of fpsim's, then the last line of an error."""
    out = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(out):
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=_unrounded_warning())
        try:
            exec(code, names)
        except Exception as error:
            print("".join(traceback.format_exception_only(error)).strip())
    told = [f"{each.category.__name__}: {each.message}\n" for each in caught]
    return out.getvalue() + "".join(dict.fromkeys(told))


def _unrounded_warning() -> type[Warning]:
    from fpsim.compile_backend.errors import UnroundedWarning

    return UnroundedWarning


def commands(text: str) -> list[str]:
    """The commands of a block: one a line, or more lines with backslashes, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [line.partition(" # ")[0].strip() for line in lines]
    return [line for line in found if line and not line.startswith("#")]


def command_output(command: str, folder: Path) -> str:
    """What a command prints on standard output, or on standard error if it fails."""
    program, *arguments = shlex.split(command)
    if program not in PROGRAMS:
        raise ValueError(f"{command!r} is not a command that the tests run ({', '.join(PROGRAMS)}): use a block `bash`")
    if program == "fpsim":
        from typer.testing import CliRunner

        from fpsim.cli.main import app

        result = CliRunner().invoke(app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout if result.exit_code == 0 else result.stderr
    module = ["-m", "torch.distributed.run"] if program == "torchrun" else []
    done = subprocess.run([sys.executable, *module, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with status {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def agree(shown: str, got: str) -> bool:
    """Whether the output that a page shows is the one that its block has printed."""
    pattern, numbers = "", []
    for part in re.split(rf"(\.\.\.|(?<![\w.]){_NUMBER}(?![\w.])|\s+)", shown.strip()):
        if part == "...":
            pattern += ".*?"
        elif re.fullmatch(_NUMBER, part):
            pattern += f"({_NUMBER})"
            numbers.append(part)
        elif part.isspace():
            pattern += r"\s+"
        else:
            pattern += re.escape(part)
    found = re.fullmatch(pattern, got.strip(), re.DOTALL)
    return found is not None and all(map(_close, numbers, found.groups()))


def _close(shown: str, got: str) -> bool:
    mantissa, _, exponent = shown.partition("e")
    last_digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return abs(float(shown) - float(got)) <= max(0.02 * abs(float(shown)), 1.001 * last_digit)


def written(text: str, results: dict[Block, str]) -> str:
    """The page with the outputs that its blocks have printed now, where they disagree with those that it shows."""
    changes = [
        (shown, results[code])
        for code, shown in outputs(text).items()
        if code in results and not agree(shown.text, results[code])
    ]
    for shown, got in reversed(changes):
        tidy = "\n".join(line.rstrip() for line in got.strip("\n").splitlines())
        text = f"{text[: shown.start]}{tidy}\n{text[shown.end :]}"
    return text
