"""Opponents that save safetensors files and load them again: all of them are run, and counted, in the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from gyroquant.opponents.base import Opponent, OpponentError, Outcome, Size, Task, run_side
from gyroquant.opponents.stored import true_bits, wide_bytes


class Scripted(Opponent):
    """Run by a script of `sides`, which writes its files to `files`, plain weights to `dense`, and a report."""

    script: ClassVar[str]
    """Its file name in `sides`."""
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    refused: ClassVar[dict[str, str]] = {}
    """Variants that cannot be run, and why."""

    def problem(self, variant: str, size: Size) -> str:
        if variant not in self.variants:
            return f"{self.name} has no variant {variant}; it has {', '.join(self.variants)}"
        if variant in self.refused:
            return self.refused[variant]
        if size.bits not in self.bits:
            return f"{self.name} has no codes of {size.bits} bits, only of {', '.join(map(str, self.bits))}"
        if size.group_size != -1 and (size.group_size <= 0 or size.group_size % 32):
            return f"{self.name} packs whole words: groups are multiples of 32, or rows, not {size.group_size}"
        return ""

    def run(self, variant: str, task: Task, python: Path) -> Outcome:
        reason = self.problem(variant, task.size)
        if reason:
            raise OpponentError(reason)
        report = run_side(python, self.script, self._arguments(variant, task), task.out / "report.json")
        files, dense = task.out / "files", task.out / "dense"
        if not (dense / "config.json").exists():
            raise OpponentError(f"{self.script} ended well and left no model in {dense}")
        bits, wide = true_bits(files, task.model), wide_bytes(files, task.model)
        return Outcome.reported(self.name, report, dense, files, true_bits=bits, wide=wide)

    def _arguments(self, variant: str, task: Task) -> list[str]:
        size = task.size
        arguments = [str(task.model), str(task.tokens), str(task.out), f"--bits={size.bits}"]
        arguments += [f"--group-size={size.group_size}", f"--seed={task.seed}"]
        arguments += [f"--settings={json.dumps(dict(self.variants[variant]))}"]
        return [*arguments, "--symmetric"] if size.symmetric else arguments


__all__ = ["Scripted"]
