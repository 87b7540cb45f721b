"""Brevitas, AMD's quantizer: GPTQ and Qronos, with and without rotations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from gyroquant.opponents.base import Opponent, Outcome, Size, Task, run_side
from gyroquant.opponents.stored import wide_bytes

_BITS = range(2, 9)
_ROTATED = ("--rotation", "fused_no_fx", "--replace-rmsnorm", "--rotation-mode", "had", "--rotation-sdpa-regions")
_PERMUTED = ("--permute-fn", "massdiff", "--rotation-block-size", "64")
_BY_BLOCKS = ("--gpxq-act-order", "--gpxq-block-name", "model.layers")


class Brevitas(Opponent):
    """Brevitas's front door for language models, `brevitas_ptq_llm`, calibrated on our tokens, one block after the
    other. Its rotations are those that it can fold into the weights: the residual stream and the value heads, none that
    runs online. It only simulates, so that its bits are those of what such a grid stores: codes, an fp16 scale a group
    and, on asymmetric grids, a zero point of as many bits as a code.
    """

    name = "brevitas"
    home = "Xilinx/brevitas"
    requirements = ("brevitas[llm,hadamard]==0.13.4", "transformers==5.23.0")
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "GPTQ": {"options": ("--gptq", *_BY_BLOCKS)},
        "rotation + GPTQ": {"options": (*_ROTATED, "--gptq", *_BY_BLOCKS)},
        "rotation + MassDiff + Qronos": {"options": (*_ROTATED, *_PERMUTED, "--qronos", *_BY_BLOCKS)},
    }
    rotated = frozenset(("rotation + GPTQ", "rotation + MassDiff + Qronos"))

    def problem(self, variant: str, size: Size) -> str:
        if size.bits not in _BITS:
            return f"Brevitas rounds weights to {_BITS[0]} to {_BITS[-1]} bits here, not to {size.bits}"
        return ""

    def run(self, variant: str, task: Task, python: Path) -> Outcome:
        files, dense = task.out / "files", task.out / "dense"
        files.mkdir()
        arguments: list[Any] = ["--model", task.model, "--tokens", task.tokens, "--files", files, "--dense", dense]
        arguments.append("--options=" + " ".join(self.options(variant, task.size, task.seed)))
        report = run_side(python, "brevitas.py", [str(one) for one in arguments], task.out / "report.json")
        bits, wide = 8 * report["stored_bytes"] / report["weights"], wide_bytes(files, task.model)
        return Outcome.reported(self.name, report, dense, files, true_bits=bits, wide=wide)

    def options(self, variant: str, size: Size, seed: int) -> list[str]:
        """What its front door is asked for."""
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
