"""Speed and memory come from a process that really opened the model."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import saved_models
import tiny_models

from gyroquant.errors import InputError
from gyroquant.evaluation import speed as room
from gyroquant.evaluation.speed import footprint


def fork(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Does what `subprocess.run` does with a command, in a process that has imported PyTorch and transformers."""
    return fresh_process.run(command[2], given=options["input"])


def test_a_larger_model_takes_more_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.subprocess, "run", fork)
    found = {}
    for name, words in (("small", 96), ("large", 40_000)):
        model = tiny_models.build("llama", vocab_size=words)
        saved_models.written("dense", saved_models.rounded(model, tmp_path / name), tmp_path / f"{name}-dense")
        found[name] = footprint("dense", tmp_path / f"{name}-dense", [3, 4, 5], 2, exact=True)
        assert found[name]["prefill_tokens_per_second"] > 0
        assert found[name]["decode_tokens_per_second"] > 0
    grown = {name: one["peak_memory_bytes"] - one["memory_before_bytes"] for name, one in found.items()}
    assert grown["large"] - grown["small"] > 40_000 * 64 * 4  # at least one of its two tables in fp32


def test_a_model_that_does_not_open_says_why(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not run as dense in a separate process: .*InputError"):
        footprint("dense", tmp_path, [3], 1, exact=True)


def test_a_program_that_is_killed_says_by_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = tmp_path / "python"
    killed.write_text("#!/bin/sh\nkill -SEGV $$\n")
    killed.chmod(0o755)
    monkeypatch.setattr(room.sys, "executable", str(killed))
    with pytest.raises(InputError, match=r"in a separate process: it was killed by SIGSEGV"):
        footprint("dense", tmp_path, [3], 1, exact=True)
