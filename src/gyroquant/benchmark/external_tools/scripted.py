"""The base class of external tools that save safetensors files and load them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from gyroquant.benchmark.external_tools.base import ExternalTool, ExternalToolError, Size, Task, ToolResult, run_script
from gyroquant.benchmark.external_tools.stored import bytes_by_part, true_bits, wide_bytes


class ScriptedTool(ExternalTool):
    """A tool with a script in `runners`. The script writes the tool's files to `files`, plain weights to `dense`, and a
    report.
    """

    script: ClassVar[str]
    """The file name of the script in `runners`."""
    outside_bits = 16
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)
    refused: ClassVar[dict[str, str]] = {}
    """The variants that cannot run, with the reason."""

    def problem(self, variant: str, size: Size) -> str:
        if variant not in self.variants:
            return f"{self.name} has no variant {variant}; it has {', '.join(self.variants)}"
        if variant in self.refused:
            return self.refused[variant]
        if size.bits not in self.bits:
            return f"{self.name} does not support codes of {size.bits} bits, only {', '.join(map(str, self.bits))}"
        if size.group_size != -1 and (size.group_size <= 0 or size.group_size % 32):
            return f"{self.name} needs groups that are multiples of 32, or whole rows (-1), not {size.group_size}"
        return ""

    def run(self, variant: str, task: Task, python: Path) -> ToolResult:
        reason = self.problem(variant, task.size)
        if reason:
            raise ExternalToolError(reason)
        report = run_script(python, self.script, self._arguments(variant, task), task.out / "report.json")
        files, dense = task.out / "files", task.out / "dense"
        if not (dense / "config.json").exists():
            raise ExternalToolError(f"{self.script} ended with status 0 but wrote no model to {dense}")
        bits, wide = true_bits(files, task.model), wide_bytes(files, task.model)
        parts = bytes_by_part(files, task.model)
        return ToolResult.reported(self.name, report, dense, files, true_bits=bits, wide=wide, weight_bytes=parts)

    def _arguments(self, variant: str, task: Task) -> list[str]:
        size = task.size
        arguments = [str(task.model), str(task.tokens), str(task.out), f"--bits={size.bits}"]
        arguments += [f"--group-size={size.group_size}", f"--seed={task.seed}"]
        arguments += [f"--settings={json.dumps(dict(self.variants[variant]))}"]
        return [*arguments, "--symmetric"] if size.symmetric else arguments


__all__ = ["ScriptedTool"]
