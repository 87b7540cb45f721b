"""One whole run in a process of its own: its memory is measured alone, and a crash ends this run only."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from gyroquant.benchmark.external_tools import ExternalTool, Size, Task
from gyroquant.benchmark.external_tools.base import folder_bytes
from gyroquant.benchmark.kinds import RECIPE
from gyroquant.benchmark.running_cost import writing_speed
from gyroquant.benchmark.shared_measurements import brief, forward_seconds, measured, outliers, read_tokens
from gyroquant.errors import GyroquantError
from gyroquant.evaluation.offline_tasks import read_items
from gyroquant.evaluation.tasks import score_tasks
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.gguf.store import GgufStore
from gyroquant.models.stores.source import open_model, open_original
from gyroquant.models.stores.weight_bytes import whole_model_bits
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.system.environment import versions
from gyroquant.system.subprocesses import DiedError, Processes, run_in_subprocess, serve


def run_in_worker(spec: Mapping[str, Any], log: Path, processes: Processes | None = None) -> dict[str, Any]:
    """Makes a run in a process of its own. Returns its result with the seconds of the whole run.

    `spec` has the entries that `perform` takes, and `threads`. A process that was killed is started once more. The
    failure of a run does not raise: it is a result with the reason.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=spec["scratch"], prefix=".run-") as scratch:
        try:
            result = run_in_subprocess(__name__, {**spec, "scratch": scratch}, Path(scratch), log, processes)
        except DiedError as error:
            return failed(spec["run"], str(error))
    if result["status"] == "done":
        result["measured"]["wall_seconds"] = time.perf_counter() - started
    return result


def failed(run: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """The result of a run that failed."""
    return {**run, "status": "failed", "reason": reason}


def perform(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Makes and measures one run. Returns its result. A model whose loss is not finite is a failure.

    Entries of `spec`:

    run, settings: the run as a comparison stores it, and its settings.
    model: the original.
    calibration: the file of calibration windows.
    matched: the file of the matched windows. Forward equivalents count passes over these.
    tests: the files of the tests, by key.
    tasks: numbers of questions of lm-evaluation-harness tasks, by name (0: all).
    items: the file of the items of offline tasks, or None.
    dtype: the dtype of evaluation.
    add_bos: whether windows begin with BOS.
    speed: whether to measure how fast the result of a recipe writes.
    scratch: a folder for temporary files.
    plain, python: for external tools, the folder with plain weights and the tool's interpreter.
    """
    run, scratch = spec["run"], Path(spec["scratch"])
    result = _recipe(spec, scratch) if run["kind"] == RECIPE else _external_tool(spec, scratch)
    place = result.pop("place")
    rounded, original = open_model(place), open_model(spec["model"])
    tests = {key: measured(rounded, original, Path(file), spec["dtype"]) for key, file in spec["tests"].items()}
    for test in tests.values():
        if not math.isfinite(test["loss"]):
            return failed(run, f"its loss is {test['loss']}: the quantized model does not compute finite numbers")
    result["measured"] |= _forward(original, Path(spec["matched"]))
    if result["weight_bytes"]:
        result["whole_model_bits"] = whole_model_bits(result["weight_bytes"], original.weights)
    return {
        **run,
        "status": "done",
        "reason": None,
        **result,
        "tests": tests,
        "tasks": _tasks(spec, place, original),
    }


def _forward(original: WeightStore, matched: Path) -> dict[str, float]:
    """The time of one pass of the original, with the threads of this process and the same other runs beside it.

    It comes after the rounding, so that it does not raise the peak memory of the run.
    """
    tokens = read_tokens(matched).ids
    return {"forward_seconds": forward_seconds(original, tokens), "forward_windows": len(tokens)}


def answered(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The result of `perform`, or a failure with its reason, and the versions that it ran with."""
    try:
        result = perform(spec)
    except GyroquantError as error:
        result = failed(spec["run"], str(error))
    return {**result, "versions": versions()}


def _recipe(spec: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Runs one of our recipes."""
    started, out = time.perf_counter(), scratch / "model"
    tokens = read_tokens(Path(spec["calibration"]))
    manifest = pipeline.run(prepare(spec["model"], out, spec["settings"], tokens))
    seconds = time.perf_counter() - started
    return _speed(spec, out, tokens.ids, manifest["warnings"]) | {
        "place": out,
        "true_bits": manifest["bits"]["per_weight"],
        "weight_bytes": manifest["bits"]["bytes"],
        "bytes": folder_bytes(out) - (out / "gyroquant.json").stat().st_size,  # its size varies: it holds times
        "proof_error": manifest["proof"]["relative_logit_error"],
        "warnings": manifest["warnings"],
        "measured": {"seconds": seconds, "peak_memory_bytes": manifest["peak_memory_bytes"]},
        "layers": [brief(_layer(layer)) for layer in manifest["layers"]],
        "outliers": outliers(open_model(out), Path(spec["calibration"])),
    }


def _speed(spec: Mapping[str, Any], out: Path, tokens: torch.Tensor, warnings: list[str]) -> dict[str, Any]:
    """The speed of a result, if it is asked for. If it cannot be measured, there is a warning in its place."""
    if not spec.get("speed"):
        return {}
    try:
        return {"speed": writing_speed(out, open_original(spec["model"]), tokens)}
    except GyroquantError as error:
        warnings.append(f"its tokens a second were not measured: {error}")
        return {}


def _tasks(spec: Mapping[str, Any], place: Path, original: WeightStore) -> dict[str, dict[str, Any]] | None:
    """Accuracies of the quantized model in transformers, by task. None without tasks."""
    limits, file = spec.get("tasks") or {}, spec.get("items")
    items = [] if file is None else read_items(Path(file))
    if not limits and not items:
        return None
    if place.is_file():
        model = GgufStore(place).load()
    else:
        options = {"dtype": torch.float32, "trust_remote_code": False, "use_safetensors": True}
        model = AutoModelForCausalLM.from_pretrained(place, **options).eval()
    limit, add_bos = max(limits.values(), default=0) or None, bool(spec.get("add_bos", True))
    scores = score_tasks(model, original.tokenizer(), list(limits), items=items, limit=limit, add_bos=add_bos)
    return {name: dict(score.facts) for name, score in scores.items()}


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    parts = layer["name"].split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    bound = layer["rate_distortion"]
    return {
        "name": layer["name"],
        "block": None if at is None else int(parts[at]),
        "module": ".".join(parts[(at or -1) + 1 :]),
        "output_error": layer["output_error"],
        "weight_error": layer["weight_error"],
        "decibels": None if bound is None else bound["decibels"],
    }


def _external_tool(spec: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Runs an external tool."""
    run, settings = spec["run"], spec["settings"]
    tool = ExternalTool.registry[run["name"].partition(":")[0]]()
    out = scratch / "model"
    out.mkdir()
    size = Size(run["bits"], run["group_size"], run["symmetric"])
    task = Task(Path(spec["plain"]), Path(spec["calibration"]), out, size, run["seed"])
    result = tool.run(settings["variant"], task, Path(spec["python"]))
    return {
        "place": result.dense,
        "true_bits": result.true_bits,
        "bytes": result.bytes,
        "file_bytes": result.file_bytes,
        "weight_bytes": result.weight_bytes,
        "proof_error": None,
        "warnings": [],
        "measured": {"seconds": result.seconds, "peak_memory_bytes": result.peak_memory_bytes},
        "layers": [],
        "outliers": [],
        "program": result.versions,
    }


__all__ = ["answered", "failed", "perform", "run_in_worker"]

if __name__ == "__main__":
    serve(answered)
