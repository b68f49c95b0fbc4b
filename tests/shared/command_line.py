"""The command line as the tests call it, and the tables that it prints."""

import re

from typer.testing import CliRunner

from fpsim.cli.main import app

PROGRESS = re.compile(r"^.* \(\d+:\d\d:\d\d\)\n", re.MULTILINE)


def run(*arguments: str, code: int = 0) -> str:
    """Standard output of the command, or standard error if ``code`` is 2, without the lines that tell progress."""
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return PROGRESS.sub("", result.stderr) if code == 2 else result.stdout


def cells(output: str) -> list[list[str]]:
    """The rows of tables, without their headings."""
    lines = [line.strip() for line in output.splitlines() if line.startswith("  ") and line.strip()]
    split = [re.split(r" {2,}", line) for line in lines]
    return [row for row in split if row[0] not in ("rounding", "code", "format")]
