"""Runs that die: a process is killed, or told that the disk is full, at its n-th step towards the disk.

A child, forked from a server that has imported everything and done nothing, runs a quantization of a tiny model. Every
writing, syncing, renaming and deleting of files is counted; at the one that is asked for, the fault happens, before it
or after it.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.system import files, journal

SMALL = ["weights.group_size=16", "calibration.nsamples=8", "calibration.seqlen=32", "calibration.dtype=float32"]
RECIPES = {
    "rtn": ("rtn", SMALL),
    "gptq": ("gptq", SMALL),
    "learned, measured, tuned and finished": (
        "gptq",
        [
            *SMALL,
            "transform.R1.method=hadamard",
            "transform.R4.method=massdiff",
            "learn.steps=4",
            "learn.objective=weights",
            "learn.checkpoint_every=1",
            "learn.sites=[R1]",
            "weights.guided={groups: 2}",
            "weights.tune.iters=4",
            "weights.tune.batch_size=2",
            "finetune.steps=4",
            "finetune.batch_size=2",
        ],
    ),
}
_NAMING, _SAVE = (Path.replace, Path.rename), save_file
_CONTEXT = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
if hasattr(os, "fork"):
    # what takes seconds to import; this module itself, which lies beside tests, the server does not find
    _CONTEXT.set_forkserver_preload(["gyroquant.pipeline.run", "transformers.models.llama.modeling_llama"])
MEASURED = ("seconds", "stage_seconds", "peak_memory_bytes")


@dataclass(frozen=True)
class Fault:
    """What happens at which step: `kill`, or `full` for a disk without room; `before` the step or after it.

    `at` is the number of a step, or the name of a file: then it is when that has got its name.
    """

    kind: str
    at: int | str
    before: bool = True


def quantize(model: Path, out: Path, corpus: Path, name: str, **options: Any) -> dict[str, Any]:
    """The quantization that is disturbed."""
    recipe, changes = RECIPES[name]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the same in this process and in children
    try:
        return pipeline.run(prepare(model, out, gq.load_recipe(recipe, changes), corpus, **options))
    finally:
        torch.set_num_threads(threads)


def disturbed(fault: Fault | None, work: Callable[[], object]) -> tuple[int, int]:
    """Does work, which can be pickled, in a child with a fault; returns its exit code, negative for a signal (3 for a
    full disk), and how many steps it took.
    """
    with tempfile.NamedTemporaryFile() as counter:
        child = _CONTEXT.Process(target=_child, args=(fault, work, counter.name))
        child.start()
        child.join()
        assert child.exitcode is not None
        return child.exitcode, Path(counter.name).stat().st_size


def told(work: Callable[[], object]) -> tuple[int, str]:
    """Does work in a child without a fault; returns its exit code, and what error it told of."""
    with tempfile.NamedTemporaryFile() as message:
        child = _CONTEXT.Process(target=_teller, args=(work, message.name))
        child.start()
        child.join()
        assert child.exitcode is not None
        return child.exitcode, Path(message.name).read_text()


def _child(fault: Fault | None, work: Callable[[], object], counter: str) -> None:
    gc.freeze()  # what the server imported is no garbage, and searching it takes as long as the work
    with Path(counter).open("ab", buffering=0) as file:
        _Steps(fault, file.fileno()).watch()
        try:
            work()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                sys.exit(3)
            traceback.print_exc()
            sys.exit(1)


def _teller(work: Callable[[], object], message: str) -> None:
    gc.freeze()
    try:
        work()
    except gq.GyroquantError as error:
        Path(message).write_text(str(error))
        sys.exit(1)


class _Steps:
    """Counts steps towards the disk and makes the fault happen; each is told as a byte, which outlives the process."""

    def __init__(self, fault: Fault | None, counter: int):
        self.fault, self.counter, self.count = fault, counter, 0

    def watch(self) -> None:
        for owner, name in (
            (files, "sync"),
            (files, "save_file"),
            (journal, "_copy"),
            (Path, "write_text"),
            (Path, "replace"),
            (Path, "rename"),
            (Path, "unlink"),
            (shutil, "rmtree"),
        ):
            setattr(owner, name, self._counted(getattr(owner, name), name in ("save_file", "_copy", "write_text")))
        for module, steps in (("gyroquant.rounding.steps.signround", 2), ("gyroquant.finetuning.scales", 1)):
            stage = importlib.import_module(module)
            assert hasattr(stage, "_CHECKPOINT")
            stage._CHECKPOINT = steps  # type: ignore[attr-defined]

    def _counted(self, step: Callable[..., Any], writes: bool) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            number, self.count = self.count, self.count + 1
            os.write(self.counter, b".")
            name = Path(args[1]).name if step in _NAMING else None
            mine = self.fault is not None and self.fault.at in (number, name)
            if mine and self.fault is not None and self.fault.kind == "full" and writes:
                if step is _SAVE:  # says it in its own way
                    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
                raise OSError(errno.ENOSPC, "No space left on device")
            if mine and self.fault is not None and self.fault.kind == "kill" and self.fault.before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = step(*args, **kwargs)
            if mine and self.fault is not None and self.fault.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted


def content(out: Path) -> dict[str, Any]:
    """What a folder holds, but for what differs whenever it is made: times and memory."""
    found: dict[str, Any] = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    manifest = json.loads(found.pop("gyroquant.json"))
    found.pop("SHA256SUMS", None)  # of the manifest, too
    for place in (manifest, manifest.get("learned") or {}, manifest.get("finetuned") or {}):
        for key in MEASURED:
            place.pop(key, None)
    return found | {"gyroquant.json": manifest}
