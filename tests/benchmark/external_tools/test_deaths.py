"""A program that is run for a run dies with it, whoever is killed, and is started once more when it was killed itself.

The runs here are real processes, three deep: a comparison, its run, the program.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_tools
import pytest
from process_checks import comes, running

from gyroquant.benchmark import worker
from gyroquant.benchmark.external_tools.base import run_script
from gyroquant.system.worker_pool import LocalPool

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it asks the system for what only Linux has")

SLEEPS = """
import os, subprocess, time
helper = subprocess.Popen(["sleep", "600"])
place = out.parent.parent / "pids"
place.with_suffix(".partial").write_text(f"{os.getpid()} {helper.pid}")
place.with_suffix(".partial").rename(place)
time.sleep(600)
"""
DIES = """
import os
with (out.parent.parent / "runs").open("a") as runs:
    runs.write("x")
print("layer 4 of 30", flush=True)
os.kill(os.getpid(), 9)
"""


def spec(folder: Path, body: str) -> dict[str, Any]:
    """The run of an external tool whose interpreter does what `body` says, two folders below this one."""
    run = {"key": "k", "kind": "opponent", "name": "gptqmodel: GPTQ", "bits": 4, "group_size": 64, "seed": 0}
    files = {"plain": str(folder), "calibration": str(folder), "python": str(fake_tools.interpreter(folder, body))}
    return {
        "run": {**run, "symmetric": False},
        "settings": {"variant": "GPTQ"},
        "scratch": str(folder),
        "threads": 1,
        **files,
    }


def compare(given: dict[str, Any], log: Path) -> None:
    """What a comparison does with a run."""
    pool = LocalPool(worker.run_in_worker, workers=1, threads=1)
    try:
        pool.submit(given, log).result()
    finally:
        pool.close()


def ask(folder: Path) -> None:
    """What a run does with a program."""
    out = folder / "run" / "model"
    out.mkdir(parents=True)
    run_script(fake_tools.interpreter(folder, SLEEPS), "any.py", [], out / "report.json")


def program_of(number: signal.Signals, folder: Path, target: Callable[..., None], *given: Any) -> list[bool]:
    """Sends a process that has the program running a signal; whether program and its helper go on, 10 s later."""
    first = multiprocessing.get_context("fork").Process(target=target, args=given)
    first.start()
    pids: list[int] = []
    try:
        assert comes(lambda: (folder / "pids").exists() or not first.is_alive(), 120)
        pids = [int(pid) for pid in (folder / "pids").read_text().split()]
        assert [running(pid) for pid in pids] == [True, True]
        os.kill(first.pid or 0, number)
        comes(lambda: not running(pids[0]))
        first.join(10)
        assert first.exitcode is not None
        return [running(pid) for pid in pids]
    finally:
        first.kill()
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


def test_a_program_dies_with_its_cell(tmp_path: Path) -> None:
    assert not program_of(signal.SIGKILL, tmp_path, ask, tmp_path)[0]


def test_a_program_dies_with_the_comparison(tmp_path: Path) -> None:
    assert not program_of(signal.SIGKILL, tmp_path, compare, spec(tmp_path, SLEEPS), tmp_path / "log")[0]


@pytest.mark.slow
def test_nothing_outlives_a_comparison_that_is_interrupted(tmp_path: Path) -> None:
    assert program_of(signal.SIGINT, tmp_path, compare, spec(tmp_path, SLEEPS), tmp_path / "log") == [False, False]


@pytest.mark.slow
def test_a_program_that_the_system_kills_is_started_once_more(tmp_path: Path) -> None:
    found = worker.run_in_worker(spec(tmp_path, DIES), tmp_path / "log")
    assert (tmp_path / "runs").read_text() == "xx"
    assert found["status"] == "failed"
    assert "was killed by SIGKILL, most likely because memory ran out, 2 times" in found["reason"]
    assert found["reason"].endswith("gptqmodel.py was killed by SIGKILL; its last line: layer 4 of 30")
