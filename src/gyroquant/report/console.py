"""Output for a terminal: progress bars with the time left on stderr, tables on stdout."""

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

_EVERY = 30.0  # seconds between progress lines when stderr is not a terminal


class ConsoleProgress(Progress):
    """Progress bars on stderr. If stderr is not a terminal, one line at most every `_EVERY` seconds."""

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
    """A table of texts. `right` has the indices of the columns that are aligned to the right."""
    result = Table(title=title or None, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        result.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        result.add_row(*(str(cell) for cell in row))
    return result


def show(*parts: Any) -> None:
    """Prints tables and texts to stdout."""
    console = Console()
    for part in parts:
        console.print(part, highlight=False)


def duration(seconds: float) -> str:
    """A time as text, in seconds below two minutes and in minutes from there on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
