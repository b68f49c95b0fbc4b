"""Wrong input ends a command with one line on standard error and exit code 2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import typer

_Command = TypeVar("_Command", bound=Callable[..., None])

#: The errors that wrong input causes. Their messages name the remedy. Every other error is a bug and shows its
#: traceback.
_WRONG_INPUT = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, ModuleNotFoundError, ConnectionError)


def plain_errors(command: _Command) -> _Command:
    """Print the message of an error that wrong input causes as one line, and end the program with exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except _WRONG_INPUT as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]
