"""Where cells run: processes on this machine, as many as memory has room for, or the workers of a Ray cluster."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gyroquant.comparison.worker import Processes, run_cell
from gyroquant.environment import available_memory
from gyroquant.errors import InputError

_SLACK = 1.25  # how much more memory than the largest so far a cell is given room for
_RETRIES = 3


class LocalPool:
    """Processes on this machine, at most `workers`, each with `threads` threads.

    The first cell runs alone: what memory it takes tells how many there is room for.
    """

    def __init__(self, workers: int, threads: int):
        self.workers, self.threads = workers, threads
        self._waiters, self._processes = ThreadPoolExecutor(workers), Processes()

    def slots(self, peak: int) -> int:
        """How many cells may run at once, when the largest so far took `peak` bytes (0: none has run)."""
        if not peak:
            return 1
        return max(1, min(self.workers, int(available_memory() // (peak * _SLACK))))

    def submit(self, spec: Mapping[str, Any], log: Path) -> Future[dict[str, Any]]:
        """Starts a cell."""
        return self._waiters.submit(run_cell, spec, log, self._processes)

    def close(self) -> None:
        """Ends what still runs, after an interruption."""
        self._processes.end()
        self._waiters.shutdown(wait=False, cancel_futures=True)


class RayPool:
    """The workers of a Ray cluster; `address` as Ray takes it, None for one on this machine.

    A worker that dies is started again elsewhere. The folders of model and results must be reachable under the same
    names from all of its machines. Raises InputError where Ray is not installed.
    """

    def __init__(self, address: str | None, threads: int, workers: int | None = None):
        try:
            import ray
        except ImportError as error:
            raise InputError("--ray needs the package ray: pip install 'gyroquant[ray]'") from error
        self._ray, self.threads = ray, threads
        local = {"num_cpus": threads * workers} if address is None and workers else {}
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, include_dashboard=False, **local)
        self._task = ray.remote(run_cell).options(num_cpus=threads, max_retries=_RETRIES)

    def slots(self, peak: int) -> int:
        """How many cells the cluster has processors for."""
        return max(1, int(self._ray.cluster_resources().get("CPU", 1) // self.threads))

    def submit(self, spec: Mapping[str, Any], log: Path) -> Future[dict[str, Any]]:
        """Gives a cell to the cluster."""
        found: Future[dict[str, Any]] = self._task.remote(dict(spec), log).future()
        return found

    def close(self) -> None:
        """Lets go of the cluster."""
        self._ray.shutdown()


Pool = LocalPool | RayPool


def make_pool(ray: str | None, workers: int | None, threads: int | None) -> Pool:
    """The pool that is asked for: `ray` is an address, ``local`` for a cluster of this machine's own, None for none."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"--{name} is {value}, and has to be at least 1")
    each = threads or max(1, cores // (workers or 1))
    if ray is not None:
        return RayPool(None if ray == "local" else ray, each, workers)
    return LocalPool(workers or 1, each)
