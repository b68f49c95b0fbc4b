"""No file of fpsim imports a private name, one that opens with an underscore, from another file of fpsim."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("fpsim", "reference", "compile_backend", "paper")


def private_imports(source: str) -> list[str]:
    """The private names that a file imports from fpsim, at its top or inside functions."""
    return [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fpsim"
        for alias in node.names
        if alias.name.startswith("_") or any(part.startswith("_") for part in (node.module or "").split("."))
    ]


def test_private_imports_are_found() -> None:
    source = "def f():\n    from fpsim.formats.float import _parse, parse_format\nfrom torch import _C\n"
    assert private_imports(source) == ["fpsim.formats.float._parse"]


def test_no_private_name_is_imported_across_files() -> None:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    found = {str(path.relative_to(ROOT)): private_imports(path.read_text()) for path in files}
    assert {path: names for path, names in found.items() if names} == {}
