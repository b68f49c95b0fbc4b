"""The command line ``fpsim``: each command stands in a file of this folder, and this file assembles them.

Results go to standard output, progress bars and errors to standard error. A command imports torch only when it runs, so
that help is quick.
"""

from __future__ import annotations

import typer

from fpsim.cli.accuracy import accuracy
from fpsim.cli.demo import demo
from fpsim.cli.evaluate import evaluate, sensitivity
from fpsim.cli.formats import formats
from fpsim.cli.recipes import recipes
from fpsim.cli.round import round
from fpsim.cli.sharpness import sharpness
from fpsim.cli.study import app as study
from fpsim.cli.verify import VerifyCommand, verify

app = typer.Typer(
    help="Simulate any reduced-precision floating-point format in any PyTorch model, exactly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(formats)
app.command(context_settings={"ignore_unknown_options": True})(round)  # else -1 would be an unknown option
app.command(cls=VerifyCommand)(verify)
app.command()(demo)
app.command()(recipes)
app.command()(evaluate)
app.command()(sensitivity)
app.command()(accuracy)
app.command()(sharpness)
app.add_typer(study, name="study")
