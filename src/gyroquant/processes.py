"""Work in processes of its own: what it takes is its own, its death is its own, and none is left behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gyroquant.files import put_json

_PR_SET_PDEATHSIG = 1
_ATTEMPTS = 2  # a process that was killed is started once more


class DiedError(Exception):
    """A process that did not come to an end, with the reason."""


class Processes:
    """Processes that are waited for, so that all can be ended."""

    def __init__(self) -> None:
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._over, self._lock = False, threading.Lock()

    def run(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        """Runs a command, its output in a log; returns its status. After `end`, none is begun: as if it was killed."""
        with log.open("w") as sink:
            with self._lock:
                if self._over:
                    return -signal.SIGTERM
                process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
                self._alive.add(process)
            try:
                return process.wait()
            finally:
                self._alive.discard(process)

    def end(self) -> None:
        """Kills what runs and lets nothing else begin."""
        with self._lock:
            self._over = True
        for process in list(self._alive):
            process.kill()


def run_apart(
    module: str, spec: Mapping[str, Any], scratch: Path, log: Path, processes: Processes | None = None
) -> dict[str, Any]:
    """What a module that ends in `serve` answers to `spec`, plain data with the number of `threads`, in a process of
    its own. One that is killed is started once more; raises DiedError with the reason when it gives no answer.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    asked, answer = scratch / "asked.json", scratch / "answer.json"
    put_json(asked, dict(spec))
    command = [sys.executable, "-m", module, str(asked), str(answer)]
    environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    for _ in range(_ATTEMPTS):
        status = (processes or Processes()).run(command, environment, log)
        if status == 0 and answer.exists():
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found
        if status >= 0:
            raise DiedError(_last_line(log) or f"its process ended with status {status}")
    name = signal.Signals(-status).name
    hint = ", most likely for want of memory" if name == "SIGKILL" else ""
    raise DiedError(f"its process was killed by {name}{hint}, {_ATTEMPTS} times")


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Does the work that the file of the first argument asks for, and writes the answer to that of the second.

    On Linux the process is killed when the one that waits for it is gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    asked, answer = map(Path, sys.argv[1:3])
    put_json(answer, work(json.loads(asked.read_text(encoding="utf-8"))))
