"""What running a model takes: speed and memory, measured in a process of its own that does nothing else."""

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

from gyroquant.environment import peak_memory_bytes
from gyroquant.errors import InputError
from gyroquant.runtimes import open_runtime

_REPEATS = 3


def footprint(format_name: str, folder: Path, prompt: list[int], tokens: int, exact: bool) -> dict[str, float]:
    """Tokens a second while a prompt is read and while `tokens` are written, each the median of three, and the largest
    resident memory in bytes: of the process, and what it had before the model was opened.

    Raises InputError with what the process said when it fails.
    """
    asked = {"format": format_name, "folder": str(folder), "prompt": prompt, "tokens": tokens, "exact": exact}
    command = [sys.executable, "-c", "from gyroquant.footprint import main; main()"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{folder} does not run as {format_name} in a process of its own: {_reason(done)}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """Why a process failed, in a line."""
    if done.returncode < 0:
        return f"it was killed by {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _measured(asked: dict[str, Any]) -> dict[str, float]:
    before = peak_memory_bytes()
    runtime = open_runtime(asked["format"], Path(asked["folder"]), asked["exact"])
    prompt, tokens = torch.tensor(asked["prompt"]), asked["tokens"]
    read, written = [], []
    for _ in range(_REPEATS + 1):  # the first does what is done once
        began = time.perf_counter()
        token = int(runtime.logits(prompt)[-1].argmax())
        there = time.perf_counter()
        for _ in range(tokens):
            token = int(runtime.feed(torch.tensor([[token]]))[-1].argmax())
        read.append(there - began)
        written.append(time.perf_counter() - there)
    return {
        "prefill_tokens_per_second": len(prompt) / median(read[1:]),
        "decode_tokens_per_second": tokens / median(written[1:]),
        "peak_memory_bytes": peak_memory_bytes(),
        "memory_before_bytes": before,
    }


def main() -> None:
    """Measures what is asked for on stdin, and says it on stdout."""
    sys.stdout.write(json.dumps(_measured(json.load(sys.stdin))) + "\n")
