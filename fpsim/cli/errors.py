"""Wrong input ends a command with one line on standard error and exit code 2."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

_Command = TypeVar("_Command", bound=Callable[..., None])

#: The errors that wrong input and the system (a full disk, a folder that is not readable) cause. Their messages name
#: the remedy. Every other error is a bug and shows its traceback.
_WRONG_INPUT = (ValueError, TypeError, OSError, ModuleNotFoundError)

#: The name of the backend's error. Importing it would import torch.
_UNROUNDED = "UnroundedError"

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
        except KeyboardInterrupt as interrupt:
            typer.echo(f"\n{str(interrupt) or 'interrupted'}", err=True)
            raise typer.Exit(_INTERRUPTED) from None
        except Exception as error:
            cause = getattr(error, "inner_exception", error)  # that of an error of torch.compile
            if not isinstance(cause, _WRONG_INPUT) and type(cause).__name__ != _UNROUNDED:
                raise
            typer.echo(f"error: {_one_line(cause)}", err=True)
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]


class OneLineErrors(TyperGroup):
    """The commands of a program. Arguments that they do not take end it with one line, like all other wrong input."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except Exception as error:
            if not standalone_mode or not hasattr(error, "format_message"):
                raise
            # A command that is called without arguments has printed its help.
            if type(error).__name__ != "NoArgsIsHelpError":
                message, context = _one_line(error.format_message()), getattr(error, "ctx", None)
                path = "fpsim" if context is None else context.command_path
                typer.echo(f"error: {message[0].lower()}{message[1:].rstrip('.')}; see {path} --help", err=True)
            sys.exit(error.exit_code)  # type: ignore[attr-defined]
        if not standalone_mode:
            return code
        sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: BaseException | str) -> str:
    if isinstance(error, OSError) and error.strerror:
        name = getattr(error, "filename", None)
        return error.strerror if name is None else f"{name}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
