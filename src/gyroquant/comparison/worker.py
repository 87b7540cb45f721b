"""One cell, run from beginning to end in a process of its own, so that its memory is its own and so is its death."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gyroquant import pipeline
from gyroquant.comparison.files import write_json
from gyroquant.comparison.shared import measured, outliers, read_tokens
from gyroquant.environment import versions
from gyroquant.errors import GyroquantError
from gyroquant.evaluation.tasks import score_tasks
from gyroquant.job import prepare
from gyroquant.models.source import open_model
from gyroquant.models.store import WeightStore
from gyroquant.opponents import Opponent, Size, Task
from gyroquant.opponents.base import folder_bytes

_PR_SET_PDEATHSIG = 1
_ATTEMPTS = 2  # a process that was killed is started once more


class Processes:
    """The processes that cells run in, so that all can be ended."""

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


def run_cell(spec: Mapping[str, Any], log: Path, processes: Processes | None = None) -> dict[str, Any]:
    """Runs a cell in a process of its own and returns its result; a killed process is started once more.

    `spec` is what `perform` takes, and `threads`. Never raises for what a cell does: a failure
    is a result with the reason.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=spec["scratch"], prefix=".cell-") as scratch:
        asked, answer = Path(scratch) / "spec.json", Path(scratch) / "result.json"
        write_json(asked, {**spec, "scratch": scratch})
        command = [sys.executable, "-c", "from gyroquant.comparison.worker import main; main()", str(asked)]
        environment = os.environ | {"OMP_NUM_THREADS": str(spec["threads"]), "TOKENIZERS_PARALLELISM": "false"}
        for _ in range(_ATTEMPTS):
            status = (processes or Processes()).run([*command, str(answer)], environment, log)
            if status == 0 and answer.exists():
                found: dict[str, Any] = json.loads(answer.read_text())
                return found
            if status > 0:
                return failed(spec["cell"], _last_line(log) or f"its process ended with status {status}")
    name = signal.Signals(-status).name
    hint = ", most likely for want of memory" if name == "SIGKILL" else ""
    return failed(spec["cell"], f"its process was killed by {name}{hint}, {_ATTEMPTS} times")


def failed(cell: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The result of a cell that did not come to an end."""
    return {**cell, "status": "failed", "reason": reason}


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else ""


def perform(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Transforms, proves, rounds and measures: `spec` has the `cell` with its `settings`, the `model`, the files of
    `calibration` and `tests`, `dtype`, `scratch`, and for opponents `environments` with the interpreter.
    """
    cell, scratch = spec["cell"], Path(spec["scratch"])
    made = _recipe(spec, scratch) if cell["kind"] == "recipe" else _opponent(spec, scratch)
    place = made.pop("place")
    rounded, original = open_model(place), open_model(spec["model"])
    tests = {name: measured(rounded, original, Path(file), spec["dtype"]) for name, file in spec["tests"].items()}
    return {
        **cell,
        "status": "done",
        "reason": None,
        **made,
        "tests": tests,
        "tasks": _tasks(spec, place, original),
        "versions": versions(),
    }


def answered(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What came of `perform`, which may be a failure with its reason."""
    try:
        return perform(spec)
    except GyroquantError as error:
        return failed(spec["cell"], str(error))


def _recipe(spec: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Runs one of our recipes."""
    started, out = time.perf_counter(), scratch / "model"
    tokens = read_tokens(Path(spec["calibration"]))
    manifest = pipeline.run(prepare(spec["model"], out, spec["settings"], tokens))
    seconds = time.perf_counter() - started
    return {
        "place": out,
        "true_bits": manifest["bits"]["per_weight"],
        "bytes": folder_bytes(out) - (out / "gyroquant.json").stat().st_size,  # which tells times, too
        "proof_error": manifest["proof"]["relative_logit_error"],
        "warnings": manifest["warnings"],
        "measured": {"seconds": seconds, "peak_memory_bytes": manifest["peak_memory_bytes"]},
        "layers": [_layer(layer) for layer in manifest["layers"]],
        "outliers": outliers(open_model(out), Path(spec["calibration"])),
    }


def _tasks(spec: Mapping[str, Any], place: Path, original: WeightStore) -> dict[str, dict[str, float]] | None:
    """Accuracies in the tasks that are asked for, of the deployed model in transformers."""
    asked = spec.get("tasks")
    if not asked:
        return None
    where = {"gguf_file": place.name} if place.is_file() else {"use_safetensors": True}
    folder = place.parent if place.is_file() else place
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **where).eval()
    (limit,) = set(asked.values())
    return score_tasks(model, original.tokenizer(), list(asked), limit=limit or None)


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    parts = layer["name"].split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    limit = layer["limit"]
    return {
        "name": layer["name"],
        "block": None if at is None else int(parts[at]),
        "module": ".".join(parts[(at or -1) + 1 :]),
        "output_error": layer["output_error"],
        "weight_error": layer["weight_error"],
        "decibels": None if limit is None else limit["decibels"],
    }


def _opponent(spec: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Has another program make its files, and takes what they stand for."""
    cell, settings = spec["cell"], spec["settings"]
    opponent = Opponent.kinds[cell["name"].partition(":")[0]]()
    out = scratch / "model"
    out.mkdir()
    size = Size(cell["bits"], cell["group_size"], cell["symmetric"])
    task = Task(Path(spec["plain"]), Path(spec["calibration"]), out, size, cell["seed"])
    done = opponent.run(settings["variant"], task, Path(spec["python"]))
    return {
        "place": done.dense,
        "true_bits": done.true_bits,
        "bytes": done.bytes,
        "proof_error": None,
        "warnings": [],
        "measured": {"seconds": done.seconds, "peak_memory_bytes": done.peak_memory_bytes},
        "layers": [],
        "outliers": [],
        "program": done.versions,
    }


def main() -> None:
    """Performs what the file of the first argument asks for, and writes the result to that of the second."""
    _die_with_parent()
    asked, answer = map(Path, sys.argv[1:3])
    write_json(answer, answered(json.loads(asked.read_text())))


def _die_with_parent() -> None:
    """On Linux, has this process killed when the one that waits for it is gone, so that none is left behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


__all__ = ["answered", "failed", "main", "perform", "run_cell"]
