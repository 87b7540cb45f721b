"""NNCF's weight compression: the front door of OpenVINO's own quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

from gyroquant.opponents.base import Opponent, OpponentError, Outcome, Size, Task, run_side
from gyroquant.opponents.stored import WIDE, layer_weights

_SYMMETRIC_ONLY = (2, 3)
_IR = "openvino_model.xml"
_PREFIX = "self.decoder."  # of a parameter's name in the graph that its script makes
_AWQ = {"awq": True, "scale_estimation": True}


class Nncf(Opponent):
    """`nncf.compress_weights` on the model as OpenVINO IR, which is what it deploys. Codes are stored with an fp16
    scale a group and, on asymmetric grids, a zero point; embedding and head are left as they are (`all_layers=False`,
    no backup type). Variants whose name says "symmetric" take symmetric grids whatever is asked for: at 2 and 3 bits it
    has no others.
    """

    name = "nncf"
    home = "openvinotoolkit/nncf"
    requirements = ("nncf==3.4.0", "openvino==2026.4.1", "transformers==5.23.0", "safetensors==0.8.0")
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "data-free": {},
        "AWQ + scale estimation": _AWQ,
        "GPTQ": {"gptq": True},
        "AWQ + scale estimation + GPTQ": {**_AWQ, "gptq": True},
        "symmetric data-free": {"symmetric": True},
        "symmetric AWQ + scale estimation": {**_AWQ, "symmetric": True},
        "symmetric GPTQ": {"gptq": True, "symmetric": True},
    }
    fixed = frozenset(("data-free", "symmetric data-free"))

    def problem(self, variant: str, size: Size) -> str:
        if size.bits not in (*_SYMMETRIC_ONLY, 4):
            return f"NNCF has integer grids of 2, 3, 4 and 8 bits for weights in groups, not of {size.bits}"
        if size.bits in _SYMMETRIC_ONLY and not self._symmetric(variant, size):
            return (
                f"NNCF has only a symmetric grid of {size.bits} bits (INT{size.bits}_SYM); variants whose name says "
                '"symmetric" take it'
            )
        return ""

    def run(self, variant: str, task: Task, python: Path) -> Outcome:
        problem = self.problem(variant, task.size)
        if problem:
            raise OpponentError(problem)
        files, dense = task.out / "files", task.out / "dense"
        files.mkdir()
        arguments = ["--model", task.model, "--tokens", task.tokens, "--files", files, "--dense", dense]
        arguments += self.arguments(variant, task.size)
        report = run_side(python, "nncf.py", [str(one) for one in arguments], task.out / "report.json")
        bits, wide = 8 * report["stored_bytes"] / report["weights"], wide_constants(files / _IR, task.model)
        return Outcome.reported(self.name, report, dense, files, true_bits=bits, wide=wide)

    def arguments(self, variant: str, size: Size) -> list[str]:
        """What its script is told to ask for."""
        kind = "SYM" if self._symmetric(variant, size) else "ASYM"
        chosen = [f"--{name.replace('_', '-')}" for name in self.variants[variant] if name != "symmetric"]
        return ["--mode", f"INT{size.bits}_{kind}", "--group-size", str(size.group_size), *chosen]

    def _symmetric(self, variant: str, size: Size) -> bool:
        return size.symmetric or bool(self.variants[variant].get("symmetric"))


def wide_constants(path: Path, original: Path) -> int:
    """Bytes that the constants of an OpenVINO IR take beyond 16 bits an entry, those of rounded layers left out.

    `path` is its .xml, `original` the folder of the model that it was made of. Constants that share their bytes count
    once.
    """
    rounded = tuple(f"{_PREFIX}{module}.weight/" for module in layer_weights(original))  # /scale, /zero_point
    found: dict[str, int] = {}
    for layer in ElementTree.parse(path).iter("layer"):
        data = layer.find("data")
        if layer.get("type") != "Const" or data is None or layer.attrib["name"].startswith(rounded):
            continue
        kind, size = data.attrib["element_type"].upper(), int(data.attrib["size"])
        if kind in WIDE:
            found[data.attrib["offset"]] = size * WIDE[kind] // (2 + WIDE[kind])
    return sum(found.values())
