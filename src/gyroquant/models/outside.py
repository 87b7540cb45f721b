"""What comes from outside, looked at before anything is built from it: kinds of files, JSON, the sizes it claims."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from gyroquant.errors import InputError

MAX_JSON = 1 << 25  # bytes; the longest indices of shards take a third of it
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
_UNUSED = (
    "intermediate_size",
    "ffn_dim",
    "n_inner",
    "feed_forward_length",
)  # may be there where all layers are experts
_COUNTS = ("max_position_embeddings", "n_positions", "context_length")
_NUMBERS = (
    *("rope_theta", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon"),
    *("rope.freq_base", "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save is a zip of them


def kind_of(path: Path) -> str:
    """What the first bytes of a file say it is: `gguf`, `pickle`, `safetensors`, `empty` or nothing of these."""
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
    "gguf": "it is a GGUF file by another name: call it .gguf and give it as the model",
    "pickle": "it is a pickle of PyTorch, which could run code and is never read: save the model as safetensors",
    "safetensors": "it is a safetensors file by another name: call it model.safetensors, beside its config.json",
    "empty": "it is empty: fetch it again",
    "unreadable": "there is no such file, or it may not be read: fetch it again",
    "unknown": "it is damaged or cut short: fetch it again",
}


def remedy(path: Path, wanted: str) -> str:
    """What may be wrong with a file that cannot be read as what is `wanted`, and what to do."""
    kind = kind_of(path)
    return _REMEDIES["unknown" if kind == wanted else kind]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError for anything else, and for what is too long or too deep."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise ValueError(f"it has {size} bytes, and nothing of the kind has more than {MAX_JSON}")
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise InputError(f"{path} cannot be read as JSON: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__} where a JSON object is expected")
    return found


def check_sizes(claimed: Mapping[str, Any], shapes: Iterable[tuple[int, ...]], where: str) -> None:
    """Raises InputError where a description claims sizes that what is stored cannot have.

    `shapes` are those of all stored tensors: there are no more layers than tensors, and a dimension is one of theirs.
    Checked before a model is built, which would have to have all the layers that are claimed.
    """
    shapes = list(shapes)
    largest = max((max(shape, default=1) for shape in shapes), default=1)
    most = max((_elements(shape) for shape in shapes), default=1)
    for key, value in _flat(claimed):
        if value is None:
            continue
        if key in (*_LAYERS, *_DIMENSIONS, *_COUNTS):
            for one in value if isinstance(value, list) else [value]:
                least = 1 if key in (*_LAYERS, *_AT_LEAST_ONE) else 0
                if not isinstance(one, int) or isinstance(one, bool) or one < least:
                    raise InputError(f"{where} says {key} is {_short(one)}: it is a whole number, {least} or more")
                limit = len(shapes) if key in _LAYERS else most if key in _UNUSED else largest
                if key not in _COUNTS and one > limit:
                    what = f"{limit} tensors" if key in _LAYERS else f"no dimension above {limit}"
                    raise InputError(f"{where} says {key} is {_short(one)}, but its weights have {what}: mend it")
        elif key in _NUMBERS:
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not good or not (0 if "eps" in key else 1e-30) <= value <= 1e30:
                raise InputError(f"{where} says {key} is {_short(value)}: it is a finite number above 0")


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _flat(claimed: Mapping[str, Any], depth: int = 0) -> Iterable[tuple[str, Any]]:
    """All settings, those of parts of the model (a text model inside another) included."""
    for key, value in claimed.items():
        if isinstance(value, dict) and key != "quantization_config" and depth < 4:
            yield from _flat(value, depth + 1)
        else:
            yield key, value


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # whole numbers of thousands of digits have no text
        return "a number of thousands of digits"
    return text if len(text) <= 40 else text[:40] + "..."


def load_config(folder: Path, shapes: Iterable[tuple[int, ...]]) -> Any:
    """The configuration in a model's folder, checked against the shapes of its stored tensors.

    Never runs code from the folder. Raises InputError for a configuration that is missing, damaged or impossible.
    """
    path = folder / "config.json"
    try:
        raw = read_json(path)
    except InputError as error:
        raise InputError(f"{folder} has no usable config.json: {error}") from error
    if "configuration_files" in raw:
        raise InputError(
            f"{path} names other files (configuration_files), which are not read: put all settings into it"
        )
    check_sizes(raw, shapes, str(path))
    known = isinstance(raw.get("model_type"), str) and raw["model_type"] in CONFIG_MAPPING
    if raw.get("auto_map") and not known:
        raise InputError(
            f"{path} names code of the model's own (auto_map), which is never run, and transformers has no "
            f"{_short(raw.get('model_type'))} of its own: only architectures of transformers can be opened"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each architecture checks its settings in its own way
        raise InputError(f"{folder} has no usable config.json: {' '.join(str(error).split())}") from error
