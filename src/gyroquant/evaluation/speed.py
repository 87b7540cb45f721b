"""Speed and memory of a model, measured in a separate process that does nothing else."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.runtime import Runtime, open_runtime
from gyroquant.system.environment import peak_memory_bytes

_REPEATS = 3


def footprint(format_name: str, folder: Path, prompt: list[int], tokens: int, exact: bool) -> dict[str, float]:
    """Speed and memory of an exported folder.

    - prefill_tokens_per_second, decode_tokens_per_second: while the prompt is read, and while `tokens` are written; the
      median of three.
    - peak_memory_bytes, memory_before_bytes: the largest resident memory of the process, and the same before the model
      was opened.

    Raises InputError with the last line of the process's errors if it fails.
    """
    request = {"format": format_name, "folder": str(folder), "prompt": prompt, "tokens": tokens, "exact": exact}
    command = [sys.executable, "-c", "from gyroquant.evaluation.speed import main; main()"]
    process = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if process.returncode:
        raise InputError(f"{folder} does not run as {format_name} in a separate process: {_reason(process)}")
    figures: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return figures


def _reason(process: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed, in one line."""
    if process.returncode < 0:
        return f"it was killed by {signal.Signals(-process.returncode).name}"
    return (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]


def _measured(request: dict[str, Any]) -> dict[str, float]:
    before = peak_memory_bytes()
    runtime = open_runtime(request["format"], Path(request["folder"]), request["exact"])
    (rates,) = generation_rates([runtime], torch.tensor(request["prompt"]), request["tokens"])
    return rates | {"peak_memory_bytes": peak_memory_bytes(), "memory_before_bytes": before}


def generation_rates(runtimes: Sequence[Runtime], prompt: Tensor, tokens: int) -> list[dict[str, float]]:
    """The speed of several models in this process, in turns, so that what else the machine does slows all of them.

    Each reads a prompt, shape (length,), and writes `tokens` tokens greedily, one at a time. Returns for each
    prefill_tokens_per_second and decode_tokens_per_second, medians of _REPEATS turns after one that does not count.
    """
    read: list[list[float]] = [[] for _ in runtimes]
    written: list[list[float]] = [[] for _ in runtimes]
    for _ in range(_REPEATS + 1):  # the first includes work that is done only once
        for index, runtime in enumerate(runtimes):
            began = time.perf_counter()
            token = int(runtime.logits(prompt)[-1].argmax())
            read_at = time.perf_counter()
            for _ in range(tokens):
                token = int(runtime.feed(torch.tensor([[token]]))[-1].argmax())
            read[index].append(read_at - began)
            written[index].append(time.perf_counter() - read_at)
    return [
        {
            "prefill_tokens_per_second": len(prompt) / median(reading[1:]),
            "decode_tokens_per_second": tokens / median(writing[1:]),
        }
        for reading, writing in zip(read, written, strict=True)
    ]


def main() -> None:
    """Reads a JSON request from stdin, measures, and writes the result to stdout as JSON."""
    sys.stdout.write(json.dumps(_measured(json.load(sys.stdin))) + "\n")
