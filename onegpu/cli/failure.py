"""What a user sees when a command fails: one line for what they can mend, a traceback only for what we must.

Exit codes: 0 done, 1 an error, 2 wrong usage (typer's own), 130 interrupted with Ctrl-C.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from onegpu.errors import OneGPUError

REPORT = "This is a bug in onegpu. Please report it with the text above and the output of `onegpu env`."

_P = ParamSpec("_P")
_R = TypeVar("_R")


def guarded(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wraps a command: its errors become output and an exit code, as the module's docstring says.

    A command whose argument `json_output` is true also gets an object `{"error": {"type", "message"}}` on stdout.
    """

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        as_json = bool(kwargs.get("json_output"))
        try:
            return command(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except KeyboardInterrupt:
            typer.echo("", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # The reader (`| head`) has what it wanted. Python's own flush at exit would complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            if is_users(error):
                say_error(error, as_json)
            else:
                traceback.print_exc()
                say_error(error, as_json, note=REPORT)
            raise typer.Exit(1) from None

    return run


def is_users(error: BaseException) -> bool:
    """Whether the message alone tells the user what to mend: our own errors, the system's, and a full memory."""
    # torch.OutOfMemoryError, by name: the command line must not import torch to find out that there was no need to.
    return isinstance(error, OneGPUError | OSError | MemoryError) or type(error).__name__ == "OutOfMemoryError"


def say_error(error: BaseException, as_json: bool = False, note: str | None = None) -> None:
    """Writes `error: …` in one red line to stderr, and with `as_json` the error object to stdout."""
    message = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        message = f"the GPU's memory is full: {message} Try --load-in-4bit, fewer tokens, or --device-map auto."
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    if note:
        typer.echo(note, err=True)
    if as_json:
        typer.echo(json.dumps({"error": {"type": type(error).__name__, "message": message}}))
