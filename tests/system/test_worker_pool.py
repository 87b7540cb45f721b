"""Where cells run does not change what comes out, and a worker that dies is no loss."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

import gyroquant as gq
from gyroquant.benchmark import Limits, worker
from gyroquant.system import subprocesses as processes
from gyroquant.system import worker_pool as pool
from gyroquant.system.worker_pool import LocalPool, Workers, make_pool


def nothing(spec: Any, log: Path, processes: Any = None) -> dict[str, Any]:
    return {}


def test_the_first_cell_runs_alone_then_as_many_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "available_memory", lambda: 10 * 10**9)
    local = LocalPool(nothing, workers=4, threads=1)
    monkeypatch.setattr(pool, "available_memory", lambda: 10**9)  # those that run hold the rest
    assert local.slots(0) == 1
    assert local.slots(10**9) == 4
    assert local.slots(4 * 10**9) == 2
    assert local.slots(40 * 10**9) == 1  # one always runs: it may be smaller than the largest


def test_workers_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.os, "sched_getaffinity", lambda pid: set(range(8)))
    assert (make_pool(nothing, Workers()).workers, make_pool(nothing, Workers()).threads) == (1, 8)
    assert (make_pool(nothing, Workers(4)).workers, make_pool(nothing, Workers(4)).threads) == (4, 2)
    assert make_pool(nothing, Workers(4, 1)).threads == 1


def test_tasks_of_a_local_pool_run_at_once(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=20)
    local = LocalPool(lambda spec, log, processes: {"at": both.wait(), "is": spec["is"]}, workers=2, threads=1)
    futures: list[Future[dict[str, Any]]] = [local.submit({"is": i}, tmp_path / "log") for i in range(2)]
    assert sorted(future.result(timeout=30)["is"] for future in futures) == [0, 1]


def test_a_pool_that_is_closed_ends_what_runs_and_starts_nothing_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program, started = tmp_path / "python", tmp_path / "started"
    program.write_text(f"#!/bin/sh\necho x >> {started}\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setattr(processes.sys, "executable", str(program))
    local = LocalPool(worker.run_in_worker, workers=1, threads=1)
    future = local.submit({"run": {"key": "k"}, "scratch": str(tmp_path), "threads": 1}, tmp_path / "log" / "k.log")
    while not started.exists():
        time.sleep(0.01)
    local.close()
    assert future.result(timeout=30)["status"] == "failed"
    assert started.read_text() == "x\n"


def test_ray_that_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(gq.InputError, match=r"pip install 'gyroquant\[ray\]'"):
        make_pool(nothing, Workers(ray="local"))


def cluster(*processors: int) -> Any:
    """What stands for Ray with machines of so many processors each."""
    fake = MagicMock()
    fake.nodes.return_value = [{"Alive": True, "Resources": {"CPU": float(count)}} for count in processors]
    fake.nodes.return_value.append({"Alive": False, "Resources": {"CPU": 64.0}})
    return fake


def test_a_cluster_has_as_many_tasks_as_its_machines_have_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", cluster(7, 3, 8))
    assert make_pool(nothing, Workers(threads=4, ray="there")).slots(0) == 3
    assert make_pool(nothing, Workers(2, threads=4, ray="there")).slots(0) == 2
    with pytest.raises(
        gq.InputError, match="no machine of the cluster has 16 processors, the largest has 8: set --threads"
    ):
        make_pool(nothing, Workers(threads=16, ray="there"))


def _workers() -> list[int]:
    """The processes that run a cell for Ray."""
    found = subprocess.run(["pgrep", "-f", "ray::run_in_worker"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
def test_ray_gives_the_same_though_one_of_its_workers_is_killed(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    options = {"bits": [2], "group_sizes": [16], "nsamples": 4, "seqlen": 32, "window": 32, "windows": 4}
    given = (folders["llama"], ["quarot"])
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            for pid in _workers()[:1]:
                time.sleep(1)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.1)

    killer = threading.Thread(target=kill)
    killer.start()
    found = gq.compare(
        *given, tmp_path / "ray", corpus, corpus, **options, limits=Limits(workers=2, threads=1, ray="local")
    )
    killer.join()
    assert killed
    assert all(cell["status"] == "done" for cell in found["cells"])
    alone = gq.compare(*given, tmp_path / "alone", corpus, corpus, **options, limits=Limits(threads=1))
    for one in (found, alone):
        for cell in one["cells"]:
            del cell["measured"], cell["forward_equivalents"]
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(alone))
