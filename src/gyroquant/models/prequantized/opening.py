"""The door to folders that another program has quantized: which format it is, or why it is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError
from gyroquant.models.outside import read_json
from gyroquant.models.prequantized.base import Format, PrequantizedStore, method_of

_PLACES = ("quantization_config", "compression_config")  # the second is compressed-tensors' of 2024
_INSIDE = ("text_config", "llm_config", "language_config")


def quantization_of(folder: Path, config: Mapping[str, Any]) -> Any:
    """What a folder says of the quantization of its weights, or None: in config.json, in the part of it that describes
    the text model, or in the files of their own that AutoGPTQ, AutoAWQ and ModelOpt have written.
    """
    inside = [config.get(name) for name in _INSIDE]
    for part in (config, *(one for one in inside if isinstance(one, dict))):
        for place in _PLACES:
            if part.get(place) is not None:
                return part[place]
    if (folder / "quantize_config.json").is_file():
        found = read_json(folder / "quantize_config.json")
        return {"quant_method": "gptq"} | found if "bits" in found else None
    if (folder / "quant_config.json").is_file():
        found = read_json(folder / "quant_config.json")
        bits, size = found.get("w_bit"), found.get("q_group_size")
        return {"quant_method": "awq", "bits": bits, "group_size": size} | found if "w_bit" in found else None
    if (folder / "hf_quant_config.json").is_file():
        return {"quant_method": "modelopt"} | read_json(folder / "hf_quant_config.json")
    return None


def open_prequantized(folder: Path, settings: Any) -> PrequantizedStore:
    """A folder by its quantization_config. Raises InputError for forms that are not decoded, before any weight is
    read.
    """
    remedy = "start from the model in full precision"
    if not isinstance(settings, dict):
        raise InputError(f"{folder} is already quantized ({settings}), and does not say how; {remedy}")
    method = method_of(settings)
    if method not in Format.kinds:
        known = ", ".join(sorted(Format.kinds))
        raise InputError(
            f"{folder} is already quantized ({method}), a form that is not decoded ({known} are); {remedy}"
        )
    return PrequantizedStore(folder, Format.kinds[method](settings, str(folder)))


__all__ = ["open_prequantized", "quantization_of"]
