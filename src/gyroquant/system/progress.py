"""Progress of long work: named stages with a number of steps. Nothing is shown unless a front end does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[], None]


class Progress:
    """Receives stages and messages. This base class shows nothing; front ends subclass it."""

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Advance]:
        """A stage of `steps` steps. It yields a function to call after each step."""
        yield lambda: None

    def warn(self, text: str) -> None:
        """Takes a message for the user. The work continues."""
