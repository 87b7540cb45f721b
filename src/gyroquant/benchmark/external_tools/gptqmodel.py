"""GPTQModel: GPTQ with a column order that keeps groups together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gyroquant.benchmark.external_tools.scripted import ScriptedTool


class GPTQModel(ScriptedTool):
    """Saves the GPTQ format: 16-bit scales, zero points of as many bits as codes, and 32 bits per input channel for the
    number of its group.
    """

    name = "gptqmodel"
    home = "ModelCloud/GPTQModel"
    requirements = ("gptqmodel==7.6.0",)
    script = "gptqmodel.py"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"GPTQ": {}, "GPTQ + rotation": {"rotation": "hadamard"}}
    rotated = frozenset(("GPTQ + rotation",))
    refused: ClassVar[dict[str, str]] = {
        "GPTQ + rotation": "gptqmodel 7.6.0 rotates on a CUDA GPU only: it calls .cuda() on each weight that it rotates"
    }


__all__ = ["GPTQModel"]
