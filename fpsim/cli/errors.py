"""Wrong input ends a command with one line on standard error and exit code 2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import typer

_Command = TypeVar("_Command", bound=Callable[..., None])

#: The errors that wrong input and the system (a full disk, a folder that is not readable) cause. Their messages name
#: the remedy. Every other error is a bug and shows its traceback.
_WRONG_INPUT = (ValueError, TypeError, OSError, ModuleNotFoundError)

#: The exit code of a program that Ctrl-C ends.
_INTERRUPTED = 130


def plain_errors(command: _Command) -> _Command:
    """Print the message of an error that wrong input causes as one line, and end the program with exit code 2.

    Ctrl-C ends it with one line, too: the message of the `KeyboardInterrupt`, if it has one.
    """

    @functools.wraps(command)
    def wrapped(*args: object, **kwargs: object) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:
            raise  # the reader of the output has ended, as in `fpsim formats | head`
        except _WRONG_INPUT as error:
            typer.echo(f"error: {_one_line(error)}", err=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt as interrupt:
            typer.echo(f"\n{str(interrupt) or 'interrupted'}", err=True)
            raise typer.Exit(_INTERRUPTED) from None

    return wrapped  # type: ignore[return-value]


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = getattr(error, "filename", None)
        return error.strerror if name is None else f"{name}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
