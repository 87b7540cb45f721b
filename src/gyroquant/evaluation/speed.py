"""Speed and memory of a model, measured in a separate process that does nothing else."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gyroquant.errors import InputError
from gyroquant.formats.runtime import open_runtime
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
    prompt, tokens = torch.tensor(request["prompt"]), request["tokens"]
    read, written = [], []
    for _ in range(_REPEATS + 1):  # the first includes work that is done only once
        began = time.perf_counter()
        token = int(runtime.logits(prompt)[-1].argmax())
        read_at = time.perf_counter()
        for _ in range(tokens):
            token = int(runtime.feed(torch.tensor([[token]]))[-1].argmax())
        read.append(read_at - began)
        written.append(time.perf_counter() - read_at)
    return {
        "prefill_tokens_per_second": len(prompt) / median(read[1:]),
        "decode_tokens_per_second": tokens / median(written[1:]),
        "peak_memory_bytes": peak_memory_bytes(),
        "memory_before_bytes": before,
    }


def main() -> None:
    """Reads a JSON request from stdin, measures, and writes the result to stdout as JSON."""
    sys.stdout.write(json.dumps(_measured(json.load(sys.stdin))) + "\n")
