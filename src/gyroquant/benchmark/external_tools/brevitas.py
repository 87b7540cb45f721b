"""Brevitas, AMD's quantizer: GPTQ and Qronos, with and without rotations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from gyroquant.benchmark.external_tools.base import ExternalTool, Size, Task, ToolResult, run_script
from gyroquant.benchmark.external_tools.stored import bytes_by_part, wide_bytes

_BITS = range(2, 9)
_ROTATED = ("--rotation", "fused_no_fx", "--replace-rmsnorm", "--rotation-mode", "had", "--rotation-sdpa-regions")
_PERMUTED = ("--permute-fn", "massdiff", "--rotation-block-size", "64")
_BY_BLOCKS = ("--gpxq-act-order", "--gpxq-block-name", "model.layers")


class Brevitas(ExternalTool):
    """Brevitas's interface for language models, `brevitas_ptq_llm`, calibrated on our tokens block by block.

    Its rotations are those that it can fold into the weights: the residual stream and the value heads. None of them
    runs online. Brevitas only simulates quantization, so true bits are computed from its grid: codes, one fp16 scale
    per group and, on asymmetric grids, a zero point of as many bits as a code.
    """

    name = "brevitas"
    home = "Xilinx/brevitas"
    requirements = ("brevitas[llm,hadamard]==0.13.4", "transformers==5.23.0")
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "GPTQ": {"options": ("--gptq", *_BY_BLOCKS)},
        "rotation + GPTQ": {"options": (*_ROTATED, "--gptq", *_BY_BLOCKS)},
        "rotation + MassDiff + Qronos": {"options": (*_ROTATED, *_PERMUTED, "--qronos", *_BY_BLOCKS)},
    }
    outside_bits = 16
    rotated = frozenset(("rotation + GPTQ", "rotation + MassDiff + Qronos"))

    def problem(self, variant: str, size: Size) -> str:
        if size.bits not in _BITS:
            return f"brevitas supports {_BITS[0]} to {_BITS[-1]} bits in comparisons, not {size.bits}"
        return ""

    def run(self, variant: str, task: Task, python: Path) -> ToolResult:
        files, dense = task.out / "files", task.out / "dense"
        files.mkdir()
        arguments: list[Any] = ["--model", task.model, "--tokens", task.tokens, "--files", files, "--dense", dense]
        arguments.append("--options=" + " ".join(self.options(variant, task.size, task.seed)))
        report = run_script(python, "brevitas.py", [str(word) for word in arguments], task.out / "report.json")
        bits, wide = 8 * report["stored_bytes"] / report["weights"], wide_bytes(files, task.model)
        parts = bytes_by_part(files, task.model)
        return ToolResult.reported(self.name, report, dense, files, true_bits=bits, wide=wide, weight_bytes=parts)

    def options(self, variant: str, size: Size, seed: int) -> list[str]:
        """The options of `brevitas_ptq_llm`."""
        groups = (
            ["per_channel"] if size.group_size == -1 else ["per_group", "--weight-group-size", str(size.group_size)]
        )
        kind = ["sym"] if size.symmetric else ["asym", "--quantize-weight-zero-point"]
        grid = [
            "--weight-bit-width",
            str(size.bits),
            "--weight-quant-granularity",
            *groups,
            "--weight-quant-type",
            *kind,
        ]
        return [*grid, "--seed", str(seed), *self.variants[variant]["options"]]
