"""Pools of workers: processes on this machine, as many as fit into memory, or the workers of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError
from gyroquant.system.environment import available_memory
from gyroquant.system.subprocesses import Processes

Task = Callable[..., dict[str, Any]]
"""Does the work of a spec in a separate process: (spec, log, and on this machine Processes) -> answer."""

SLACK = 1.25  # memory reserved for a task, as a multiple of the largest so far
_RETRIES = 3


class LocalPool:
    """Processes on this machine, at most `workers`, each with `threads` threads.

    The first task runs alone. Its peak of memory decides how many tasks run at once.
    """

    def __init__(self, task: Task, workers: int, threads: int):
        self.task, self.workers, self.threads = task, workers, threads
        self._waiters, self._processes = ThreadPoolExecutor(workers), Processes()
        self._room = available_memory()  # measured before any task runs

    def slots(self, peak: int) -> int:
        """How many tasks may run at once if the largest so far took `peak` bytes (0: none has run yet)."""
        if not peak:
            return 1
        return max(1, min(self.workers, int(self._room // (peak * SLACK))))

    def submit(self, spec: Mapping[str, Any], log: Path) -> Future[dict[str, Any]]:
        """Starts the task for a spec."""
        return self._waiters.submit(self.task, spec, log, self._processes)

    def close(self) -> None:
        """Ends all tasks that still run, for example after an interruption."""
        self._processes.end()
        self._waiters.shutdown(cancel_futures=True)  # all tasks are killed: no more writes


class RayPool:
    """The workers of a Ray cluster, at most `workers` of them.

    `address` is an address for Ray. None starts a cluster on this machine. A worker that dies is started again on
    another machine. All machines must reach the folders of model and results under the same names. Raises InputError if
    Ray is not installed, and if no machine has `threads` processors, because a task would then wait forever.
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
        machines = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        self._slots = sum(processors // threads for processors in machines)
        if not self._slots:
            ray.shutdown()
            largest = max(machines, default=0)
            raise InputError(
                f"no machine of the cluster has {threads} processors, the largest has {largest}: set --threads to that "
                "or less"
            )
        self._slots = min(self._slots, workers or self._slots)

    def slots(self, peak: int) -> int:
        """How many tasks the processors of all machines can run at once."""
        return self._slots

    def submit(self, spec: Mapping[str, Any], log: Path) -> Future[dict[str, Any]]:
        """Submits the task for a spec to the cluster."""
        future: Future[dict[str, Any]] = self._task.remote(dict(spec), log).future()
        return future

    def close(self) -> None:
        """Disconnects from the cluster."""
        self._ray.shutdown()


Pool = LocalPool | RayPool


@dataclass(frozen=True)
class Workers:
    """How many tasks run at once, and where.

    - `count`: tasks at once. Default None: 1 on this machine, all that fit on a Ray cluster.
    - `threads`: threads of each task. Default None: the processors of this machine divided by `count`.
    - `ray`: the address of a Ray cluster; ``local`` starts one on this machine. Default None: no cluster.
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
        """The threads of each task."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.threads or max(1, cores // (self.count or 1))


def make_pool(task: Task, workers: Workers) -> Pool:
    """The pool for a task that `workers` describes."""
    if workers.ray is not None:
        return RayPool(task, None if workers.ray == "local" else workers.ray, workers.each, workers.count)
    return LocalPool(task, workers.count or 1, workers.each)
