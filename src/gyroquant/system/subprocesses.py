"""Runs work in separate processes, so that its memory and crashes stay separate. No process is left running."""

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

from gyroquant.system.files import put_json

_ATTEMPTS = 2  # a process that was killed is started once more
# This code runs before another program and is replaced by it: the setting of prctl stays valid after exec. It is not a
# preexec_fn, because that may hang if other threads run.
_BOUND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):  # otherwise the parent has already ended
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class DiedError(Exception):
    """A process failed. The message is the reason."""


class KilledError(DiedError):
    """A process was killed from outside by signal `number`. It may be started again."""

    def __init__(self, reason: str, number: int):
        super().__init__(reason)
        self.number = number


def bound(command: Sequence[str]) -> list[str]:
    """The command, changed on Linux so that the system kills it when the thread that started it ends for any reason.

    The thread must wait for the process; otherwise the process is killed even if the thread ends normally.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command]


class Processes:
    """A set of running processes that can all be ended, together with the processes that they started."""

    def __init__(self) -> None:
        self._alive: set[subprocess.Popen[bytes]] = set()
        self._ended, self._lock = False, threading.Lock()

    def run(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        """Runs a command with its output in a log; returns its status. After `end` it starts nothing and returns the
        status of a killed process.

        On Linux, the command gets its own process group. The whole group is killed before this method returns or
        raises, and the command is killed if this process is. On other systems only the command itself is ended.
        """
        with log.open("w") as sink:
            with self._lock:
                if self._ended:
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
        """Kills all running processes. `run` starts no more."""
        with self._lock:
            self._ended = True
        for process in list(self._alive):
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process, if it still runs, and on Linux its whole group."""
    if sys.platform != "linux":
        process.kill()
        return
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_in_subprocess(
    module: str, spec: Mapping[str, Any], scratch: Path, log: Path, processes: Processes | None = None
) -> dict[str, Any]:
    """Runs a module that ends in `serve` in a separate process; returns its answer to `spec`.

    `spec` is plain data and holds the number of `threads`. `scratch` is a folder for this process alone. A process that
    is killed is started once more, with `scratch` emptied. Raises DiedError, with the reason, if there is no answer.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    request, answer = scratch / "asked.json", scratch / "answer.json"
    quiet = ["-W", "ignore::RuntimeWarning:runpy"]  # the package has imported the module already, which is harmless
    command = [sys.executable, *quiet, "-m", module, str(request), str(answer)]
    environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    for _ in range(_ATTEMPTS):
        _empty(scratch)
        put_json(request, dict(spec))
        status = (processes or Processes()).run(command, environment, log)
        if status == 0 and answer.exists():
            result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return result
        if status >= 0:
            raise DiedError(_last_line(log) or f"its process ended with status {status}")
    name = signal.Signals(-status).name
    hint = ", most likely because memory ran out" if name == "SIGKILL" else ""
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
    """The main function of a worker: reads the spec from the file in the first argument, does `work`, and writes the
    answer to the file in the second argument.

    If `work` raises KilledError, this process ends by the same signal, so that it is started once more.
    """
    request, answer = map(Path, sys.argv[1:3])
    try:
        result = work(json.loads(request.read_text(encoding="utf-8")))
    except KilledError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        signal.raise_signal(error.number)
        raise
    put_json(answer, result)
