"""The command line. Each command calls one public function. Results go to stdout, progress and messages to stderr.

This module does not import torch or transformers. The modules of the commands do (see `lazy`).
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
    """The options before a command."""


_INTERRUPTED = 130
_OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|[Cc]annot allocate memory|out of memory")  # messages of torch


def _fail(text: str, status: int) -> None:
    print(f"gyroquant: {text}", file=sys.stderr)
    raise SystemExit(status)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Shows each RenamedWarning as one line on stderr, `warning: ...`. Python shows all other warnings as usual."""
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
    """Runs the command line. The exit status is 0 only on success. Errors go to stderr, with a traceback if --debug."""
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
    except SystemExit as exit_:
        if exit_.code == _INTERRUPTED:  # typer turns Ctrl-C into this status
            print(f"gyroquant: interrupted; {_what_remains(exit_)}", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        if stopped:  # compiled code may raise an error of its own instead of KeyboardInterrupt
            _fail(f"interrupted; {_what_remains(error)}", _INTERRUPTED)
        _fail(_message(error), 1)


def _what_remains(error: BaseException | None) -> str:
    """States what is on the disk after an error: `left` of the error, or the journal `kept` by a run, or no files."""
    while error is not None:
        left = getattr(error, "left", None)
        if left is not None:
            return str(left)
        kept = getattr(error, "kept", None)
        if kept is not None:
            return f"run the same command again to continue (finished work is in {kept})"
        error = error.__cause__ or error.__context__
    return "no files were left"


def _message(error: Exception) -> str:
    """The message about an error, for the user."""
    if isinstance(error, GyroquantError):
        return f"{error}; {_what_remains(error)}" if hasattr(error, "left") else str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        remedy = "use fewer or shorter samples (--nsamples, --seqlen) or --offload DIR"
        return f"out of memory; {remedy}; {_what_remains(error)}"
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{place}; {_what_remains(error)}"
    return (
        f"unexpected {type(error).__name__}: {error}\n"
        f"This is a bug; run again with --debug to see where; {_what_remains(error)}"
    )


__all__ = ["app", "main", "shown_warnings"]
