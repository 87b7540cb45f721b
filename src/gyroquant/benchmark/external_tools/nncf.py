"""NNCF's weight compression, the quantizer of OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

from gyroquant.benchmark.external_tools.base import ExternalTool, ExternalToolError, Size, Task, ToolResult, run_script
from gyroquant.benchmark.external_tools.stored import WIDE, grouped, layer_weights
from gyroquant.models.stores.source import open_model

_SYMMETRIC_ONLY = (2, 3)
_IR = "openvino_model.xml"
_PREFIX = "self.decoder."  # prefix of parameter names in the graph that the script makes
_OUTSIDE = {"outside": "default"}  # what it does to embedding and head; part of the key of a result
_AWQ = {"awq": True, "scale_estimation": True, **_OUTSIDE}


class Nncf(ExternalTool):
    """`nncf.compress_weights` on the model as OpenVINO IR.

    The IR stores codes, one fp16 scale per group and, on asymmetric grids, a zero point. Embedding and head have 8
    bits, as NNCF rounds them by default. Variants with "symmetric" in their name always use symmetric grids: at 2 and 3
    bits NNCF has no others.
    """

    name = "nncf"
    home = "openvinotoolkit/nncf"
    requirements = ("nncf==3.4.0", "openvino==2026.4.1", "transformers==5.23.0", "safetensors==0.8.0")
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "data-free": {**_OUTSIDE},
        "AWQ + scale estimation": _AWQ,
        "GPTQ": {"gptq": True, **_OUTSIDE},
        "AWQ + scale estimation + GPTQ": {**_AWQ, "gptq": True},
        "symmetric data-free": {"symmetric": True, **_OUTSIDE},
        "symmetric AWQ + scale estimation": {**_AWQ, "symmetric": True},
        "symmetric GPTQ": {"gptq": True, "symmetric": True, **_OUTSIDE},
    }
    outside_bits = 8
    fixed = frozenset(("data-free", "symmetric data-free"))

    def problem(self, variant: str, size: Size) -> str:
        if size.bits not in (*_SYMMETRIC_ONLY, 4):
            return f"nncf supports 2, 3 and 4 bits in comparisons, not {size.bits}"
        if size.bits in _SYMMETRIC_ONLY and not self._symmetric(variant, size):
            return (
                f"nncf has only a symmetric grid at {size.bits} bits (INT{size.bits}_SYM): use the variants with "
                '"symmetric" in their name'
            )
        return ""

    def run(self, variant: str, task: Task, python: Path) -> ToolResult:
        problem = self.problem(variant, task.size)
        if problem:
            raise ExternalToolError(problem)
        files, dense = task.out / "files", task.out / "dense"
        files.mkdir()
        arguments = ["--model", task.model, "--tokens", task.tokens, "--files", files, "--dense", dense]
        arguments += self.arguments(variant, task.size)
        report = run_script(python, "nncf.py", [str(word) for word in arguments], task.out / "report.json")
        bits, wide = 8 * report["stored_bytes"] / report["weights"], wide_constants(files / _IR, task.model)
        parts = constant_parts(files / _IR, task.model)
        return ToolResult.reported(self.name, report, dense, files, true_bits=bits, wide=wide, weight_bytes=parts)

    def arguments(self, variant: str, size: Size) -> list[str]:
        """The arguments of its script for a variant and a size."""
        kind = "SYM" if self._symmetric(variant, size) else "ASYM"
        flags = [
            f"--{name.replace('_', '-')}"
            for name, on in self.variants[variant].items()
            if on is True and name != "symmetric"
        ]
        return ["--mode", f"INT{size.bits}_{kind}", "--group-size", str(size.group_size), *flags]

    def _symmetric(self, variant: str, size: Size) -> bool:
        return size.symmetric or bool(self.variants[variant].get("symmetric"))


def wide_constants(path: Path, original: Path) -> int:
    """Bytes that the constants of an OpenVINO IR take beyond 16 bits per entry, without those of rounded layers.

    `path`: the .xml file. `original`: the folder of the original model. Constants that share their bytes count once.
    """
    return sum(wide for _, wide in _constants(path, original).values())


def constant_parts(path: Path, original: Path) -> dict[str, int]:
    """The bytes of the constants of an OpenVINO IR by part of the model, and their `total`.

    Plain numbers count at most 16 bits each. The arguments are those of `wide_constants`.
    """
    sizes = {name: size - wide for name, (size, wide) in _constants(path, original).items()}
    named = {name.replace("/", "."): size for name, size in sizes.items()}  # WEIGHT/scale belongs to the layer
    return grouped(named, open_model(original).graph, _PREFIX)


def _constants(path: Path, original: Path) -> dict[str, tuple[int, int]]:
    """Every constant of an OpenVINO IR by name: its bytes, and those beyond 16 bits per entry of plain numbers."""
    rounded = tuple(f"{_PREFIX}{module}.weight/" for module in layer_weights(original))  # /scale, /zero_point
    by_offset: dict[str, tuple[str, int, int]] = {}
    for layer in ElementTree.parse(path).iter("layer"):
        data, name = layer.find("data"), layer.attrib["name"]
        if layer.get("type") != "Const" or data is None:
            continue
        kind, size = data.attrib["element_type"].upper(), int(data.attrib["size"])
        wide = size * WIDE[kind] // (2 + WIDE[kind]) if kind in WIDE and not name.startswith(rounded) else 0
        by_offset.setdefault(data.attrib["offset"], (name, size, wide))
    return {name: (size, wide) for name, size, wide in by_offset.values()}
