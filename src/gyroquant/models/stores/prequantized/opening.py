"""Opens folders that another program quantized: finds their format, or raises InputError with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError
from gyroquant.models.stores.config_loading import read_json
from gyroquant.models.stores.prequantized.base import PrequantizedFormat, PrequantizedStore, method_of

_KEYS = ("quantization_config", "compression_config")  # compressed-tensors wrote the second one in 2024
_INNER_CONFIGS = ("text_config", "llm_config", "language_config")


def quantization_of(folder: Path, config: Mapping[str, Any]) -> Any:
    """The description of the quantization of a folder's weights, or None if there is none.

    It is in config.json, in the configuration of the text model inside it, or in a separate file that AutoGPTQ, AutoAWQ
    or ModelOpt wrote.
    """
    inner = [config.get(name) for name in _INNER_CONFIGS]
    for part in (config, *(nested for nested in inner if isinstance(nested, dict))):
        for key in _KEYS:
            if part.get(key) is not None:
                return part[key]
    if (folder / "quantize_config.json").is_file():
        settings = read_json(folder / "quantize_config.json")
        return {"quant_method": "gptq"} | settings if "bits" in settings else None
    if (folder / "quant_config.json").is_file():
        settings = read_json(folder / "quant_config.json")
        bits, size = settings.get("w_bit"), settings.get("q_group_size")
        return {"quant_method": "awq", "bits": bits, "group_size": size} | settings if "w_bit" in settings else None
    if (folder / "hf_quant_config.json").is_file():
        return {"quant_method": "modelopt"} | read_json(folder / "hf_quant_config.json")
    return None


def open_prequantized(folder: Path, settings: Any) -> PrequantizedStore:
    """The store of a folder with this quantization_config.

    Raises InputError for a form that is not decoded, before any weight is read.
    """
    remedy = "start from the model in full precision"
    if not isinstance(settings, dict):
        raise InputError(f"{folder} is already quantized ({settings}), but does not state how; {remedy}")
    method = method_of(settings)
    if method not in PrequantizedFormat.registry:
        known = ", ".join(PrequantizedFormat.registry)
        raise InputError(
            f"{folder} is already quantized ({method}), a form that is not decoded ({known} are); {remedy}"
        )
    return PrequantizedStore(folder, PrequantizedFormat.registry[method](settings, str(folder)))


__all__ = ["open_prequantized", "quantization_of"]
