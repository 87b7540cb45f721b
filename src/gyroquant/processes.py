"""Work in processes of its own: what it takes is its own, its death is its own, and none is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gyroquant.files import put_json

_ATTEMPTS = 2  # a process that was killed is started once more
# In front of another program, which takes its place: what it asks the system for outlives exec. Not a preexec_fn, which
# may hang where other threads run.
_BOUND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):  # else it was gone before that
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class DiedError(Exception):
    """A process that did not come to an end, with the reason."""


class KilledError(DiedError):
    """A process that something else has killed, by the signal of that number: it may be tried once more."""

    def __init__(self, reason: str, number: int):
        super().__init__(reason)
        self.number = number


def bound(command: Sequence[str]) -> list[str]:
    """The command, on Linux such that the system kills it when the thread that begins it is gone, however that ends.

    The thread has to wait for it, or the process would die with a thread that ended well.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command]


class Processes:
    """Processes that are waited for, so that all can be ended, with what they have started themselves."""

    def __init__(self) -> None:
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._over, self._lock = False, threading.Lock()

    def run(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        """Runs a command, its output in a log; returns its status. After `end`, none is begun: as if it was killed.

        On Linux it has a group of its own, of which nothing is left when this returns or raises, and it is killed when
        this process is; elsewhere only the command itself is ended.
        """
        with log.open("w") as sink:
            with self._lock:
                if self._over:
                    return -signal.SIGTERM
                process = subprocess.Popen(
                    bound(command),
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=sink,
                    env=environment,
                    start_new_session=sys.platform == "linux",
                )
                self._alive.add(process)
            try:
                return process.wait()
            finally:
                _kill(process)
                process.wait()
                self._alive.discard(process)

    def end(self) -> None:
        """Kills what runs and lets nothing else begin."""
        with self._lock:
            self._over = True
        for process in list(self._alive):
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills what is left of a process and, on Linux, of everything in its group."""
    if sys.platform != "linux":
        process.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_apart(
    module: str, spec: Mapping[str, Any], scratch: Path, log: Path, processes: Processes | None = None
) -> dict[str, Any]:
    """What a module that ends in `serve` answers to `spec`, plain data with the number of `threads`, in a process of
    its own. `scratch` is a folder for it alone. One that is killed is started once more, with `scratch` empty again;
    raises DiedError with the reason when it gives no answer.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    asked, answer = scratch / "asked.json", scratch / "answer.json"
    quiet = ["-W", "ignore::RuntimeWarning:runpy"]  # its package has imported the module: no reason for a death
    command = [sys.executable, *quiet, "-m", module, str(asked), str(answer)]
    environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    for _ in range(_ATTEMPTS):
        _empty(scratch)
        put_json(asked, dict(spec))
        status = (processes or Processes()).run(command, environment, log)
        if status == 0 and answer.exists():
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found
        if status >= 0:
            raise DiedError(_last_line(log) or f"its process ended with status {status}")
    name = signal.Signals(-status).name
    hint = ", most likely for want of memory" if name == "SIGKILL" else ""
    last = f"; its last line: {_last_line(log)}" if _last_line(log) else ""
    raise DiedError(f"its process was killed by {name}{hint}, {_ATTEMPTS} times{last}")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def serve(work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Does the work that the file of the first argument asks for, and writes the answer to that of the second.

    Work that raises KilledError ends this process in the same way, so that it is started once more.
    """
    asked, answer = map(Path, sys.argv[1:3])
    try:
        found = work(json.loads(asked.read_text(encoding="utf-8")))
    except KilledError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        signal.raise_signal(error.number)
        raise
    put_json(answer, found)
