"""Checks of files from outside, before anything is built from them: kinds of files, JSON, the sizes they claim."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from gyroquant.errors import InputError

MAX_JSON = 1 << 25  # bytes; the longest indices of shards take a third of this
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "block_count")
_AT_LEAST_ONE = (
    *("hidden_size", "n_embd", "d_model", "embedding_length", "vocab_size"),
    *("num_attention_heads", "n_head", "attention.head_count", "max_position_embeddings", "n_positions"),
)
_DIMENSIONS = (
    *("hidden_size", "n_embd", "d_model", "embedding_length", "word_embed_proj_dim", "vocab_size"),
    *("intermediate_size", "ffn_dim", "n_inner", "feed_forward_length"),
    *("moe_intermediate_size", "shared_expert_intermediate_size", "expert_feed_forward_length"),
    *("num_attention_heads", "n_head", "num_key_value_heads", "attention.head_count", "attention.head_count_kv"),
    *("head_dim", "attention.key_length", "attention.value_length", "rope.dimension_count"),
    *("num_experts", "num_local_experts", "n_routed_experts", "expert_count", "num_experts_per_tok"),
)
# A model in which all layers are experts may state these without using them.
_UNUSED = ("intermediate_size", "ffn_dim", "n_inner", "feed_forward_length")
_COUNTS = ("max_position_embeddings", "n_positions", "context_length")
_NUMBERS = (
    *("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"),
    *("rope.freq_base", "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save writes a zip of pickles


def kind_of(path: Path) -> str:
    """The kind of a file by its first bytes: `gguf`, `pickle`, `safetensors`, `empty`, `unknown` or `unreadable`."""
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:
        return "unreadable"
    if not start:
        return "empty"
    if start[:4] == b"GGUF":
        return "gguf"
    if start.startswith(_PICKLES):
        return "pickle"
    return "safetensors" if start[8:] == b"{" else "unknown"


_REMEDIES = {
    "gguf": "it is a GGUF file by another name: call it .gguf and open that file",
    "pickle": "it is a pickle of PyTorch, which could run code and is never read: save the model as safetensors",
    "safetensors": "it is a safetensors file by another name: call it model.safetensors, beside its config.json",
    "empty": "it is empty: fetch it again",
    "unreadable": "the file does not exist, or there is no permission to read it: fetch it again",
    "unknown": "it is damaged or cut short: fetch it again",
}


def remedy(path: Path, wanted: str) -> str:
    """What is wrong with a file that cannot be read as the kind `wanted`, and what to do."""
    kind = kind_of(path)
    return _REMEDIES["unknown" if kind == wanted else kind]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError for other content, and for a file that is too long or too deep."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise ValueError(f"it has {size} bytes, more than the {MAX_JSON} that are allowed")
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise InputError(f"{path} cannot be read as JSON: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__} where a JSON object is expected")
    return content


def check_sizes(claimed: Mapping[str, Any], shapes: Iterable[tuple[int, ...]], where: str) -> None:
    """Raises InputError if a description claims sizes that the stored tensors cannot have.

    `shapes` are the shapes of all stored tensors. A model cannot have more layers than tensors, and no dimension may
    exceed the largest one of a tensor. Call this before the model is built: a build allocates every claimed layer.
    """
    shapes = list(shapes)
    largest = max((max(shape, default=1) for shape in shapes), default=1)
    most = max((_elements(shape) for shape in shapes), default=1)
    for key, value in _flat(claimed):
        if value is None:
            continue
        if key in (*_LAYERS, *_DIMENSIONS, *_COUNTS):
            for size in value if isinstance(value, list) else [value]:
                least = 1 if key in (*_LAYERS, *_AT_LEAST_ONE) else 0
                if not isinstance(size, int) or isinstance(size, bool) or size < least:
                    raise InputError(
                        f"{where} states {key} is {_short(size)}: it must be a whole number, {least} or more"
                    )
                limit = len(shapes) if key in _LAYERS else most if key in _UNUSED else largest
                if key not in _COUNTS and size > limit:
                    stored = f"{limit} tensors" if key in _LAYERS else f"no dimension above {limit}"
                    raise InputError(
                        f"{where} states {key} is {_short(size)}, but its weights have {stored}: correct it"
                    )
        elif key in _NUMBERS:
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not good or not (0 if "eps" in key else 1e-30) <= value <= 1e30:
                raise InputError(f"{where} states {key} is {_short(value)}: it must be a finite number above 0")


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _flat(claimed: Mapping[str, Any], depth: int = 0) -> Iterable[tuple[str, Any]]:
    """All settings, also those of nested configurations (a text model inside another)."""
    for key, value in claimed.items():
        if isinstance(value, dict) and key != "quantization_config" and depth < 4:
            yield from _flat(value, depth + 1)
        else:
            yield key, value


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 40 else text[:40] + "..."


def load_config(folder: Path, shapes: Iterable[tuple[int, ...]]) -> Any:
    """The configuration in a model's folder, checked against the shapes of its stored tensors.

    Never runs code from the folder. Raises InputError if the configuration is missing, damaged or impossible.
    """
    path = folder / "config.json"
    try:
        raw = read_json(path)
    except InputError as error:
        raise InputError(f"{folder} has no usable config.json: {error}") from error
    if "configuration_files" in raw:
        raise InputError(
            f"{path} names other files (configuration_files), which are not read: put all settings into {path.name}"
        )
    check_sizes(raw, shapes, str(path))
    known = isinstance(raw.get("model_type"), str) and raw["model_type"] in CONFIG_MAPPING
    if raw.get("auto_map") and not known:
        raise InputError(
            f"{path} names code of the model's own (auto_map), which is never run, and transformers has no "
            f"architecture {_short(raw.get('model_type'))}: use a model whose architecture is part of transformers"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # architectures check their settings and raise many kinds
        raise InputError(f"{folder} has no usable config.json: {' '.join(str(error).split())}") from error
