"""The command line. Each command is one call of a public function; results on stdout, bars and messages on stderr.

This module imports neither torch nor transformers; the modules of the commands do (see `lazy`).
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from gyroquant.cli.lazy import LazyGroup
from gyroquant.errors import GyroquantError, RenamedWarning
from gyroquant.system.version import gyroquant_version

app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Rotate, prove, round and save language models: post-training quantization on a CPU.",
)


def _version(show: bool) -> None:
    if show:
        print(gyroquant_version())
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What comes before a command."""


_INTERRUPTED = 130
_WANT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|[Cc]annot allocate memory|out of memory")  # as torch tells of it


def _fail(text: str, status: int) -> None:
    print(f"gyroquant: {text}", file=sys.stderr)
    raise SystemExit(status)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Shows each RenamedWarning as one line on stderr, `warning: ...`; other warnings as Python does."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            if issubclass(category, RenamedWarning):
                print(f"warning: {message}", file=sys.stderr)
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def main() -> None:
    """Runs the command line; exit status 0 only on success, errors on stderr without a traceback unless --debug."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = "--debug" in sys.argv
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, stop)
    try:
        with shown_warnings():
            app(prog_name="gyroquant")
    except SystemExit as done:
        if done.code == _INTERRUPTED:  # typer turns Ctrl-C into this status
            print(f"gyroquant: interrupted; {_left(done)}", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        if stopped:  # compiled code may put an error of its own in place of the interruption
            _fail(f"interrupted; {_left(error)}", _INTERRUPTED)
        _fail(_message(error), 1)


def _left(error: BaseException | None) -> str:
    """What an error has left on the disk: what it says itself, the journal of a run that can go on, or nothing."""
    while error is not None:
        left = getattr(error, "left", None)
        if left is not None:
            return str(left)
        kept = getattr(error, "kept", None)
        if kept is not None:
            return f"the same command goes on from there (what is done is kept in {kept})"
        error = error.__cause__ or error.__context__
    return "nothing was left behind"


def _message(error: Exception) -> str:
    """What to tell the user about an error, in a line."""
    if isinstance(error, GyroquantError):
        return f"{error}; {_left(error)}" if hasattr(error, "left") else str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _WANT_OF_MEMORY.search(str(error))):
        return f"out of memory; use fewer or shorter samples (--nsamples, --seqlen) or --offload DIR; {_left(error)}"
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{place}; {_left(error)}"
    return (
        f"unexpected {type(error).__name__}: {error}\n"
        f"This is a bug; run again with --debug to see where; {_left(error)}"
    )


__all__ = ["app", "main", "shown_warnings"]
