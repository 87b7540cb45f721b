"""Blocks that are rounded side by side are the same, to the byte, as one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fault_injection
import pytest
import torch

import gyroquant as gq
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.pipeline import parallel_blocks as apart
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.system.subprocesses import DiedError
from gyroquant.system.worker_pool import Workers

SMALL = [*fault_injection.SMALL, "calibration.inputs=original"]
HARD = [
    "transform.R4.method=massdiff",
    "weights.ignore=[]",
    "weights.bits=3",
    "kv_cache.bits=4",
    "kv_cache.center_keys=true",
]
ROWS = ["weights.allocate={budget: 4.3, bits: [2, 4], costs: gradient, granularity: rows}"]
ALONE = Workers(1, torch.get_num_threads())  # as many threads as the tests of this process have


def run(model: Any, out: Path, corpus: Path, *changes: str, **options: Any) -> dict[str, Any]:
    recipe = gq.load_recipe("gptq", [*SMALL, *changes])
    return pipeline.run(prepare(model, out, recipe, corpus, **options))


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has workers work in this process, which takes a moment instead of seconds; holds the blocks in order."""
    order: list[int] = []

    def work(module: str, spec: Any, *rest: Any) -> dict[str, Any]:
        assert module == apart.__name__
        order.append(spec["index"])
        return apart.quantize_one_block(json.loads(json.dumps(spec)))

    monkeypatch.setattr(apart, "run_in_subprocess", work)
    return order


@contextmanager
def workers_given(patch: pytest.MonkeyPatch, trouble: Callable[[dict[str, Any]], dict[str, Any]]) -> Iterator[None]:
    """Has workers work on what `trouble` makes of what they are asked for."""
    usual = apart.run_in_subprocess
    with patch.context() as inner:
        inner.setattr(apart, "run_in_subprocess", lambda module, spec, *rest: usual(module, trouble(dict(spec)), *rest))
        yield


OUTPUTS = ["weights.guided={groups: 2, kronecker: tokens}", "weights.solver.static_groups=true"]


@pytest.mark.parametrize("changes", [[], HARD, OUTPUTS, ["weights.tune.iters=3", "weights.tune.batch_size=2"], ROWS])
def test_they_are_the_same_bytes(
    changes: list[str], inside: list[int], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    name = "llama" if "weights.ignore=[]" in changes else "llama_tied"
    run(folders[name], tmp_path / "one", corpus, *changes)
    assert not inside
    run(folders[name], tmp_path / "many", corpus, *changes, workers=ALONE)
    assert inside == [0, 1]
    assert fault_injection.content(tmp_path / "one") == fault_injection.content(tmp_path / "many")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many", "one"]


def test_inputs_matter(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    first = run(folders["llama"], tmp_path / "original", corpus, "weights.bits=2")
    second = run(folders["llama"], tmp_path / "rounded", corpus, "weights.bits=2", "calibration.inputs=rounded")
    errors = [[layer["output_error"] for layer in manifest["layers"]] for manifest in (first, second)]
    half = len(errors[0]) // 2
    assert errors[0][:half] == errors[1][:half]  # nothing is rounded in front of the first block
    assert errors[0][half:] != errors[1][half:]


def test_a_worker_that_fails_is_told_and_what_is_done_is_kept(
    inside: list[int], folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(spec: dict[str, Any]) -> dict[str, Any]:
        if spec["index"] == 1:
            raise DiedError("its process was killed by SIGKILL")
        return spec

    died = pytest.raises(OSError, match=r"block 1 was not rounded: its process was killed by SIGKILL")
    with workers_given(monkeypatch, die), died:
        run(folders["llama"], tmp_path / "out", corpus, workers=ALONE)
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]
    run(folders["llama"], tmp_path / "out", corpus, workers=ALONE)
    assert inside == [0, 1]
    run(folders["llama"], tmp_path / "one", corpus)
    assert fault_injection.content(tmp_path / "one") == fault_injection.content(tmp_path / "out")


def test_holes_are_filled_one_after_the_other(
    inside: list[int], folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on without workers behind one that had them and left some blocks and the head to be rounded."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "commit", lambda folder: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            run(folders["llama"], out, corpus, *HARD, workers=ALONE)
    for name in ("block-00000.json", "outer.json"):
        (tmp_path / ".out.journal" / name).unlink()
    run(folders["llama"], out, corpus, *HARD)
    run(folders["llama"], tmp_path / "one", corpus, *HARD)
    assert fault_injection.content(tmp_path / "one") == fault_injection.content(out)


def test_damage_that_a_worker_finds_is_no_reason_to_throw_blocks_away(
    inside: list[int], folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(spec: dict[str, Any]) -> dict[str, Any]:
        if spec["index"] == 1:
            path = tmp_path / ".out.journal" / spec["inputs"][0]["file"]
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        return spec

    noticed = pytest.raises(gq.InputError, match=r"into-block-00001-0\.bin is damaged")
    with workers_given(monkeypatch, damage), noticed:
        run(folders["llama"], tmp_path / "out", corpus, workers=ALONE)
    assert (tmp_path / ".out.journal" / "block-00000.json").exists()
    run(folders["llama"], tmp_path / "out", corpus, workers=ALONE)
    assert inside == [0, 1, 1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"versions": {"torch": "1.0"}}, r"its machine has torch .*, and the run needs 1\.0"),
        ({"head": "another"}, "now belongs to another run"),
    ],
)
def test_a_worker_of_another_machine_or_run_keeps_nothing(
    other: dict[str, Any],
    message: str,
    inside: list[int],
    folders: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = pytest.raises(gq.InputError, match=message)
    with workers_given(monkeypatch, lambda spec: {**spec, **other}), refused:
        run(folders["llama"], tmp_path / "out", corpus, workers=ALONE)
    assert inside == [0]
    assert not list(tmp_path.glob(".out.journal/block-*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["calibration.inputs=rounded"], "need --set calibration.inputs=original"),
        (["weights.solver=gptaq"], "no input error for weights.solver to correct"),
        (["weights.target.share=0.5"], "no input error for weights.target to correct"),
    ],
)
def test_what_cannot_be_side_by_side_is_refused(
    changes: list[str], message: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(gq.GyroquantError, match=message):
        run(folders["llama"], tmp_path / "out", corpus, *changes, workers=ALONE)
    with pytest.raises(gq.InputError, match="--workers is 0"):
        Workers(0)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_real_processes_give_the_same_bytes(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    run(folders["llama"], tmp_path / "one", corpus)
    run(folders["llama"], tmp_path / "many", corpus, workers=Workers(2, torch.get_num_threads()))
    assert fault_injection.content(tmp_path / "one") == fault_injection.content(tmp_path / "many")


@pytest.mark.slow
def test_a_ray_worker_that_is_killed_is_no_loss(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    killed: list[int] = []

    def kill() -> None:
        while not killed:
            found = subprocess.run(["pgrep", "-f", "ray::work_apart"], capture_output=True, text=True, check=False)
            for number in found.stdout.split()[:1]:
                os.kill(int(number), signal.SIGKILL)
                killed.append(int(number))
            time.sleep(0.02)

    threading.Thread(target=kill, daemon=True).start()
    run(folders["llama"], tmp_path / "ray", corpus, workers=Workers(2, 2, "local"))
    assert killed
    run(folders["llama"], tmp_path / "one", corpus)
    assert fault_injection.content(tmp_path / "one") == fault_injection.content(tmp_path / "ray")
