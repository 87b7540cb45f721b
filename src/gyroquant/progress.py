"""How long work tells where it stands: named stages with a number of steps. Silent unless a front end shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[], None]


class Stages:
    """Receives stages and messages; this one shows nothing."""

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Advance]:
        """A stage of `steps` steps; call what it yields after each of them."""
        yield lambda: None

    def warn(self, text: str) -> None:
        """Something the user should know and need not stop for."""
