"""Where work runs: processes on this machine, as many as memory has room for, or the workers of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gyroquant.environment import available_memory
from gyroquant.errors import InputError
from gyroquant.processes import Processes

Task = Callable[..., dict[str, Any]]
"""Does what a spec asks for in a process of its own: (spec, log, and on this machine Processes) -> answer."""

SLACK = 1.25  # how much more memory than the largest so far a task is given room for
_RETRIES = 3


class LocalPool:
    """Processes on this machine, at most `workers`, each with `threads` threads.

    The first task runs alone: what memory it takes tells how many there is room for.
    """

    def __init__(self, task: Task, workers: int, threads: int):
        self.task, self.workers, self.threads = task, workers, threads
        self._waiters, self._processes = ThreadPoolExecutor(workers), Processes()
        self._room = available_memory()  # while none runs: later, what they hold is missing from it

    def slots(self, peak: int) -> int:
        """How many may run at once, when the largest so far took `peak` bytes (0: none has run)."""
        if not peak:
            return 1
        return max(1, min(self.workers, int(self._room // (peak * SLACK))))

    def submit(self, spec: Mapping[str, Any], log: Path) -> Future[dict[str, Any]]:
        """Starts the task for a spec."""
        return self._waiters.submit(self.task, spec, log, self._processes)

    def close(self) -> None:
        """Ends what still runs, after an interruption."""
        self._processes.end()
        self._waiters.shutdown(cancel_futures=True)  # they have been killed: nothing is written any more


class RayPool:
    """The workers of a Ray cluster, at most `workers` of them; `address` as Ray takes it, None for one on this machine.

    A worker that dies is started again elsewhere. The folders of model and results must be reachable under the same
    names from all of its machines. Raises InputError where Ray is not installed, and when no machine has `threads`
    processors: a task for which there is none would wait for ever.
    """

    def __init__(self, task: Task, address: str | None, threads: int, workers: int | None = None):
        try:
            import ray
        except ImportError as error:
            raise InputError("--ray needs the package ray: pip install 'gyroquant[ray]'") from error
        self._ray, self.threads = ray, threads
        local = {"num_cpus": threads * workers} if address is None and workers else {}
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False, **local)
        self._task = ray.remote(task).options(num_cpus=threads, max_retries=_RETRIES)
        machines = [int(one["Resources"].get("CPU", 0)) for one in ray.nodes() if one["Alive"]]
        self._slots = sum(processors // threads for processors in machines)
        if not self._slots:
            ray.shutdown()
            largest = max(machines, default=0)
            raise InputError(f"no machine of the cluster has {threads} processors, but {largest}: give --threads")
        self._slots = min(self._slots, workers or self._slots)

    def slots(self, peak: int) -> int:
        """How many the machines have processors for."""
        return self._slots

    def submit(self, spec: Mapping[str, Any], log: Path) -> Future[dict[str, Any]]:
        """Gives the task for a spec to the cluster."""
        found: Future[dict[str, Any]] = self._task.remote(dict(spec), log).future()
        return found

    def close(self) -> None:
        """Lets go of the cluster."""
        self._ray.shutdown()


Pool = LocalPool | RayPool


@dataclass(frozen=True)
class Workers:
    """How many tasks run at once, `count` (1), with how many `threads` each (None: what there is for each), and where:
    here, or on the Ray cluster at an address (``local``: one of this machine's own).
    """

    count: int | None = None
    threads: int | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("workers", self.count), ("threads", self.threads)):
            if value is not None and value < 1:
                raise InputError(f"--{name} is {value}, and has to be at least 1")

    @property
    def each(self) -> int:
        """The threads of each."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, cores // (self.count or 1))


def make_pool(task: Task, workers: Workers) -> Pool:
    """The pool that is asked for, for a task."""
    if workers.ray is not None:
        return RayPool(task, None if workers.ray == "local" else workers.ray, workers.each, workers.count)
    return LocalPool(task, workers.count or 1, workers.each)
