"""GPTQModel: GPTQ with an order of columns that keeps groups whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from gyroquant.opponents.scripted import Scripted


class GPTQModel(Scripted):
    """The format of GPTQ: scales of 16 bits, zero points of as many bits as codes, 32 bits a channel for its group."""

    name = "gptqmodel"
    home = "ModelCloud/GPTQModel"
    requirements = ("gptqmodel==7.6.0",)
    script = "gptqmodel.py"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"GPTQ": {}, "GPTQ + rotation": {"rotation": "hadamard"}}
    rotated = frozenset(("GPTQ + rotation",))
    refused: ClassVar[dict[str, str]] = {
        "GPTQ + rotation": "gptqmodel 7.6.0 rotates on a CUDA GPU only: it calls .cuda() on every weight it turns"
    }


__all__ = ["GPTQModel"]
