"""One cell, run from beginning to end in a process of its own, so that its memory is its own and so is its death."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gyroquant import pipeline
from gyroquant.comparison.shared import brief, forward_seconds, measured, outliers, read_tokens
from gyroquant.environment import versions
from gyroquant.errors import GyroquantError
from gyroquant.evaluation.tasks import score_tasks
from gyroquant.job import prepare
from gyroquant.models.gguf import GgufStore
from gyroquant.models.source import open_model
from gyroquant.models.store import WeightStore
from gyroquant.opponents import Opponent, Size, Task
from gyroquant.opponents.base import folder_bytes
from gyroquant.processes import DiedError, Processes, run_apart, serve


def run_cell(spec: Mapping[str, Any], log: Path, processes: Processes | None = None) -> dict[str, Any]:
    """Runs a cell in a process of its own and returns its result, with the seconds that all of it took; a killed
    process is started once more.

    `spec` is what `perform` takes, and `threads`. Never raises for what a cell does: a failure
    is a result with the reason.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=spec["scratch"], prefix=".cell-") as scratch:
        try:
            result = run_apart(__name__, {**spec, "scratch": scratch}, Path(scratch), log, processes)
        except DiedError as error:
            return failed(spec["cell"], str(error))
    if result["status"] == "done":
        result["measured"]["wall_seconds"] = time.perf_counter() - started
    return result


def failed(cell: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The result of a cell that did not come to an end."""
    return {**cell, "status": "failed", "reason": reason}


def perform(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Transforms, proves, rounds and measures: `spec` has the `cell` with its `settings`, the `model`, the files of
    `calibration`, of the `matched` windows that everybody's time is counted in, and of `tests`, `dtype`, `scratch`, and
    for opponents the `plain` folder and their `python`.

    A model whose loss is not finite is a failure.
    """
    cell, scratch = spec["cell"], Path(spec["scratch"])
    made = _recipe(spec, scratch) if cell["kind"] == "recipe" else _opponent(spec, scratch)
    place = made.pop("place")
    rounded, original = open_model(place), open_model(spec["model"])
    tests = {key: measured(rounded, original, Path(file), spec["dtype"]) for key, file in spec["tests"].items()}
    for test in tests.values():
        if not math.isfinite(test["loss"]):
            return failed(cell, f"its loss is {test['loss']}: what it deploys computes no finite numbers")
    made["measured"] |= _forward(original, Path(spec["matched"]))
    return {
        **cell,
        "status": "done",
        "reason": None,
        **made,
        "tests": tests,
        "tasks": _tasks(spec, place, original),
    }


def _forward(original: WeightStore, matched: Path) -> dict[str, float]:
    """What a pass of the original takes with the threads of this process and beside the same neighbours: after the
    rounding, whose peak memory it must not raise.
    """
    tokens = read_tokens(matched).ids
    return {"forward_seconds": forward_seconds(original, tokens), "forward_windows": len(tokens)}


def answered(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What came of `perform`, which may be a failure with its reason, and what it ran with."""
    try:
        result = perform(spec)
    except GyroquantError as error:
        result = failed(spec["cell"], str(error))
    return {**result, "versions": versions()}


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
        "layers": [brief(_layer(layer)) for layer in manifest["layers"]],
        "outliers": outliers(open_model(out), Path(spec["calibration"])),
    }


def _tasks(spec: Mapping[str, Any], place: Path, original: WeightStore) -> dict[str, dict[str, float]] | None:
    """Accuracies in the tasks that are asked for, of the deployed model in transformers."""
    asked = spec.get("tasks")
    if not asked:
        return None
    if place.is_file():
        model = GgufStore(place).load()
    else:
        options = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
        model = AutoModelForCausalLM.from_pretrained(place, **options).eval()
    (limit,) = set(asked.values())
    add_bos = bool(spec.get("add_bos", True))
    return score_tasks(model, original.tokenizer(), list(asked), limit=limit or None, add_bos=add_bos)


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
        "file_bytes": done.file_bytes,
        "proof_error": None,
        "warnings": [],
        "measured": {"seconds": done.seconds, "peak_memory_bytes": done.peak_memory_bytes},
        "layers": [],
        "outliers": [],
        "program": done.versions,
    }


__all__ = ["answered", "failed", "perform", "run_cell"]

if __name__ == "__main__":
    serve(answered)
