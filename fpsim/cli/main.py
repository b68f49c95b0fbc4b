"""The command line ``fpsim``: each command stands in a file of this folder, and this file assembles them.

Results go to standard output, progress bars and errors to standard error. A command imports torch only when it runs, so
that help is quick.
"""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Annotated

import typer

from fpsim.cli.accuracy import accuracy
from fpsim.cli.demo import demo
from fpsim.cli.errors import OneLineErrors
from fpsim.cli.evaluate import evaluate, sensitivity
from fpsim.cli.examples import written
from fpsim.cli.formats import formats
from fpsim.cli.recipes import recipes
from fpsim.cli.reports import audit, explain, profile
from fpsim.cli.round import round
from fpsim.cli.sharpness import sharpness
from fpsim.cli.study import app as study
from fpsim.cli.verify import VerifyCommand, verify

app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        own, torch = metadata.version("fpsim-torch"), metadata.version("torch")
        typer.echo(f"fpsim {own}, torch {torch}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback(epilog=written(""))
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the versions of fpsim, PyTorch and Python."
        ),
    ] = False,
) -> None:
    """Simulate any reduced-precision floating-point format in any PyTorch model, exactly."""


app.command()(formats)
app.command(context_settings={"ignore_unknown_options": True})(round)  # else -1 would be an unknown option
app.command(cls=VerifyCommand)(verify)
app.command()(demo)
app.command()(recipes)
app.command()(explain)
app.command()(profile)
app.command()(audit)
app.command()(evaluate)
app.command()(sensitivity)
app.command()(accuracy)
app.command()(sharpness)
app.add_typer(study, name="study", epilog=written("study"))
for group, prefix in ((app, ""), (study, "study ")):
    for command in group.registered_commands:
        assert command.callback is not None, "every command has a function"
        command.epilog = written(prefix + (command.name or command.callback.__name__))
