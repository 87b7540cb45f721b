"""Which processes are there, and waiting for what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from gyroquant.system.files import locked


def running(pid: int) -> bool:
    """Whether a process is there and no zombie, which is what an orphan becomes where nobody collects them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def comes(what: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether something becomes true in that time."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def hold(out: Path, ready: object, over: object) -> None:
    """Holds a lock until it is killed. It is here because a process that is started anew imports it by name."""
    with locked(out):
        ready.set()  # type: ignore[attr-defined]
        over.wait()  # type: ignore[attr-defined]
