"""``python -m fpsim`` is the command ``fpsim``."""

from __future__ import annotations

from fpsim.cli.main import app

if __name__ == "__main__":
    app(prog_name="fpsim")
