"""The transformers config of a GGUF file, with every setting that changes what the model computes."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from gyroquant.errors import InputError
from gyroquant.models.stores.gguf.architectures import ARCHITECTURES, Config, GgufArchitecture, has_bias
from gyroquant.models.stores.gguf.check import StringArray
from gyroquant.models.stores.gguf.file import GgufFile
from gyroquant.models.stores.gguf.rope import FREQS, LONG, SHORT, rope_parameters
from gyroquant.models.stores.gguf.settings import Settings

_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def architecture_of(file: GgufFile) -> GgufArchitecture:
    """The description of a file's architecture. Raises InputError if there is none, or if the file is not a model."""
    architecture = ARCHITECTURES.get(file.architecture)
    if architecture is None:
        raise InputError(
            f"{file.path} has llama.cpp's architecture {file.architecture}, which is not described; these are: "
            f"{', '.join(ARCHITECTURES)}. Start from the model in safetensors"
        )
    if file.metadata.get("general.type", "model") != "model":
        raise InputError(
            f"{file.path} is not a model: its general.type is {file.metadata['general.type']!r}; give another file"
        )
    return architecture


def read_config(file: GgufFile, architecture: GgufArchitecture) -> Any:
    """The transformers config of a file.

    Raises InputError for a setting that is missing, that differs from layer to layer, or that may change the model and
    is not described, and for a config that transformers does not accept.
    """
    settings, config = Settings(file), dict(architecture.fixed)
    config["model_type"] = architecture.model_type
    key, name = architecture.epsilon
    config |= {name: float(settings.need(key)), "vocab_size": _vocabulary_size(file)}
    config |= {
        "num_hidden_layers": settings.need("block_count"),
        "hidden_size": settings.need("embedding_length"),
        "max_position_embeddings": settings.need("context_length"),
        "intermediate_size": settings.need("feed_forward_length"),
    }
    heads = config["num_attention_heads"] = settings.need("attention.head_count")
    if config["hidden_size"] % heads and settings.layers("attention.key_length") is None:
        raise InputError(
            f"{file.path}: {heads} heads do not divide the width {config['hidden_size']} (attention.head_count): "
            "convert the model again"
        )
    config["num_key_value_heads"] = settings.take("attention.head_count_kv", heads)
    width = settings.take("attention.key_length", config["hidden_size"] // heads)
    if settings.take("attention.value_length", config["hidden_size"] // heads) != width:
        raise InputError(
            f"{file.path}: keys and values differ in width (key_length, value_length), which is not described: start "
            "from the model in safetensors"
        )
    config["head_dim"] = width
    _add_rope(settings, config, file, architecture)
    for flag, stems in architecture.biases.items():
        config[flag] = any(has_bias(name, stems) for name in file.tensors)
    config["tie_word_embeddings"] = architecture.tied or "output.weight" not in file.tensors
    for special, stated in _SPECIAL.items():
        number = file.metadata.get(f"tokenizer.ggml.{stated}_token_id")
        config[f"{special}_token_id"] = number if number is not None and number < config["vocab_size"] else None
    architecture.more(settings, config)
    settings.finish()
    return _build_config(config, file)


def _vocabulary_size(file: GgufFile) -> int:
    """The number of rows of the embedding. llama.cpp requires one row for each token."""
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path} lacks token_embd.weight, the embedding: fetch it again")
    rows, tokens = file.tensors["token_embd.weight"].shape[0], file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, StringArray) and tokens.count != rows:
        raise InputError(
            f"{file.path} has {tokens.count} tokens, but an embedding of {rows} rows: convert the model again"
        )
    return rows


def _add_rope(settings: Settings, config: Config, file: GgufFile, architecture: GgufArchitecture) -> None:
    if not architecture.rope:
        return
    tensors = {FREQS: "rope_freqs", LONG: "longrope", SHORT: "longrope"}
    for name, kind in tensors.items():
        if name in file.tensors and kind not in architecture.factors:
            raise InputError(
                f"{file.path} has {name}, which llama.cpp does not read for the architecture {architecture.name}: "
                "start from the model in safetensors"
            )
    if architecture.name == "llama":  # the type of scaling decides which of the two llama.cpp reads
        long = settings.layers("rope.scaling.type") == "longrope"
        for name in (FREQS,) if long else (LONG, SHORT):
            if name in file.tensors:
                raise InputError(
                    f"{file.path} has {name}, which llama.cpp does not read with rope.scaling.type "
                    f"{settings.layers('rope.scaling.type')!r}: start from the model in safetensors"
                )
    width = config["head_dim"]
    turned = settings.take("rope.dimension_count", width)
    if turned != width and not architecture.partial:
        raise InputError(
            f"{file.path}: RoPE turns {turned} of {width} coordinates of a head (rope.dimension_count); "
            f"{architecture.name} is only described with all of them turned: start from the model in safetensors"
        )
    config["rope_parameters"] = rope_parameters(
        settings, file, turned, config["max_position_embeddings"], architecture.scalings
    )
    if architecture.partial:
        config["rope_parameters"]["partial_rotary_factor"] = turned / width


def _build_config(config: Config, file: GgufFile) -> Any:
    """The config object of transformers from these settings."""
    kind = CONFIG_MAPPING[config.pop("model_type")]
    names, heads = kind.attribute_map, config["num_attention_heads"]
    default_width = config["hidden_size"] // heads
    if config["head_dim"] == default_width and not hasattr(kind(), "head_dim"):
        del config["head_dim"]
    plain = "num_key_value_heads" not in kind().to_dict()
    if plain and config.pop("num_key_value_heads") != heads:
        raise InputError(
            f"{file.path}: {kind.model_type} has as many kv heads as query heads, but head_count_kv is another number: "
            "convert the model again"
        )
    try:
        return kind(**{names.get(key, key): value for key, value in config.items()})
    except Exception as error:  # architectures check their settings and raise many kinds
        raise InputError(
            f"{file.path} has settings that transformers does not accept: {error}; convert the model again"
        ) from error
