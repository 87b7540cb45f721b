"""Processes of our own: tried once more when they were killed, and nothing of them is left."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from process_checks import comes, running
from selection import some

from gyroquant.system import subprocesses as processes
from gyroquant.system.subprocesses import DiedError, KilledError, Processes, bound, run_in_subprocess, serve
from gyroquant.system.worker_pool import LocalPool

SPEC = {"threads": 1, "what": "it"}


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is run instead of Python; its arguments end with the files of question and answer."""
    path = tmp_path / "python"
    monkeypatch.setattr(processes.sys, "executable", str(path))
    return path


def says(path: Path, body: str) -> None:
    path.write_text(f'#!/bin/bash\nanswer="${{@: -1}}"; here=$(dirname "$answer")\n{body}\n')
    path.chmod(0o755)


def test_a_killed_process_is_started_once_more_in_an_empty_folder(program: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    says(
        program,
        'ls -A "$here" >> ' + str(tmp_path / "seen") + f'; mkdir "$here/model" || exit 3; touch "$here/model/x"\n'
        f'ln -s {kept} "$here/link"\n'
        f'[ -e {tmp_path}/first ] || {{ touch {tmp_path}/first; kill -KILL $$; }}\necho \'{{"is": 2}}\' > "$answer"',
    )
    assert run_in_subprocess("module", SPEC, scratch, tmp_path / "logs" / "log") == {"is": 2}
    assert (tmp_path / "seen").read_text().split() == ["asked.json"] * 2
    assert (kept / "file").exists()


@pytest.mark.parametrize(
    ("body", "reason", "runs"),
    [
        (
            "echo half way; kill -KILL $$",
            r"SIGKILL, most likely because memory ran out, 2 times; its last line: half way$",
            2,
        ),
        ("kill -TERM $$", "SIGTERM, 2 times$", 2),
        ("echo this is why; exit 4", "^this is why$", 1),
        ("exit 0", "ended with status 0", 1),
    ],
)
def test_one_that_gives_no_answer_says_why(body: str, reason: str, runs: int, program: Path, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    says(program, f"echo x >> {tmp_path}/runs\n{body}")
    with pytest.raises(DiedError, match=reason):
        run_in_subprocess("module", SPEC, scratch, tmp_path / "log")
    assert (tmp_path / "runs").read_text() == "x\n" * runs


MODULES = ["gyroquant.benchmark.worker", "gyroquant.pipeline.parallel_blocks"]


@pytest.mark.parametrize("module", some(MODULES, MODULES[:1]))
def test_a_log_has_no_warning_of_how_a_process_is_started(module: str, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with pytest.raises(DiedError, match="KeyError"):
        run_in_subprocess(module, SPEC, tmp_path / "scratch", tmp_path / "log")
    assert (tmp_path / "log").read_text().startswith("Traceback")


def gone(pids: Path) -> bool:
    """Whether the processes with the numbers in a file end."""
    return comes(lambda: not any(map(running, map(int, pids.read_text().split()))))


@pytest.mark.skipif(sys.platform != "linux", reason="groups are killed on Linux only")
def test_nothing_that_a_process_has_started_is_left_by_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    assert Processes().run(["/bin/sh", "-c", f"sleep 600 & echo $! > {pids}; exit 7"], {}, tmp_path / "log") == 7
    assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="groups are killed on Linux only")
def test_an_interruption_ends_a_process_and_what_it_has_started(tmp_path: Path) -> None:
    started, pids = tmp_path / "started", tmp_path / "pids"
    command = ["/bin/bash", "-c", f"sleep 600 & echo $$ $! > {pids}; mkdir {started}; wait"]
    local = LocalPool(lambda spec, log, processes: {"is": processes.run(command, {}, log)}, workers=1, threads=1)
    future = local.submit({}, tmp_path / "log")
    assert comes(started.exists)
    local.close()
    assert future.result(timeout=30) == {"is": -signal.SIGKILL}
    assert gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="it asks the system for what only Linux has")
def test_a_command_is_not_begun_for_one_that_is_gone(tmp_path: Path) -> None:
    command = bound(["/usr/bin/touch", str(tmp_path / "begun")])
    assert Processes().run(command, {}, tmp_path / "log") == 0  # this process began it
    assert (tmp_path / "begun").exists()
    (tmp_path / "begun").unlink()
    shell = ["/bin/sh", "-c", '"$@"; exit 0', "sh", *command]  # and now the shell does
    assert Processes().run(shell, {}, tmp_path / "log") == 0
    assert not (tmp_path / "begun").exists()


def test_work_that_was_killed_ends_its_process_in_the_same_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked, answer, raised = tmp_path / "asked.json", tmp_path / "answer.json", list[int]()
    asked.write_text("{}")
    monkeypatch.setattr(processes.sys, "argv", ["module", str(asked), str(answer)])
    monkeypatch.setattr(processes.signal, "raise_signal", raised.append)

    def work(spec: dict[str, Any]) -> dict[str, Any]:
        raise KilledError("the program was killed", signal.SIGTERM)

    with pytest.raises(KilledError):
        serve(work)
    assert raised == [signal.SIGTERM]
    assert capfd.readouterr().err == "the program was killed\n"
    assert not answer.exists()
    serve(lambda spec: {"is": 1})
    assert answer.read_text() == '{\n "is": 1\n}\n'
