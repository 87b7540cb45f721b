"""What people see in a terminal: progress bars with time left on stderr, tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from gyroquant.system.progress import Advance, Progress

_EVERY = 30.0  # seconds between lines where there is no terminal to draw a bar on


class ConsoleProgress(Progress):
    """Bars on stderr; where that is no terminal, a line now and then."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Advance]:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description:>8}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("elapsed"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with Bars(*columns, console=self.console) as progress:
                task = progress.add_task(name, total=steps)
                yield lambda: progress.advance(task)
        else:
            yield self._lines(name, steps)

    def _lines(self, name: str, steps: int) -> Advance:
        started = last = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal last, done
            done += 1
            now = time.monotonic()
            if now - last >= _EVERY or (done == steps and now - started >= _EVERY):
                last = now
                left = (now - started) / done * (steps - done)
                print(f"{name}: {done}/{steps}, {left:.0f} s left", file=sys.stderr, flush=True)

        return advance

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]warning:[/] {text}", highlight=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[int] = ()) -> Table:
    """A table of texts; the columns with the numbers in `right` are set flush right."""
    made = Table(title=title or None, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    return made


def show(*things: Any) -> None:
    """Prints tables and texts on stdout."""
    console = Console()
    for thing in things:
        console.print(thing, highlight=False)


def duration(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
