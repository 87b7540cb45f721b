"""The configuration of a GGUF file in the words of transformers, with everything that changes what a model computes."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING

from gyroquant.errors import InputError
from gyroquant.models.gguf_architectures import ARCHITECTURES, Config, GgufArchitecture, has_bias
from gyroquant.models.gguf_check import StringArray
from gyroquant.models.gguf_file import GgufFile
from gyroquant.models.gguf_rope import FREQS, LONG, SHORT, rope_parameters
from gyroquant.models.gguf_settings import Settings

_SPECIAL = {"bos": "bos", "eos": "eos", "pad": "padding"}


def architecture_of(file: GgufFile) -> GgufArchitecture:
    """The description of a file's architecture. Raises InputError where there is none."""
    found = ARCHITECTURES.get(file.architecture)
    if found is None:
        raise InputError(
            f"{file.path} is of llama.cpp's architecture {file.architecture}, which is not described; these are: "
            f"{', '.join(ARCHITECTURES)}. Start from the model in safetensors"
        )
    if file.metadata.get("general.type", "model") != "model":
        raise InputError(f"{file.path} is no model but of the type {file.metadata['general.type']!r} (general.type)")
    return found


def read_config(file: GgufFile, described: GgufArchitecture) -> Any:
    """The transformers config of a file. Raises InputError for a setting that is missing, that differs from layer to
    layer, or that may change the model and is not described, and for a config that transformers does not take.
    """
    settings, config = Settings(file), dict(described.fixed)
    config["model_type"] = described.model_type
    key, name = described.epsilon
    config |= {name: float(settings.need(key)), "vocab_size": _words(file)}
    config |= {
        "num_hidden_layers": settings.need("block_count"),
        "hidden_size": settings.need("embedding_length"),
        "max_position_embeddings": settings.need("context_length"),
        "intermediate_size": settings.need("feed_forward_length"),
    }
    heads = config["num_attention_heads"] = settings.need("attention.head_count")
    if config["hidden_size"] % heads and settings.layers("attention.key_length") is None:
        raise InputError(f"{file.path}: {heads} heads do not divide {config['hidden_size']} (attention.head_count)")
    config["num_key_value_heads"] = settings.take("attention.head_count_kv", heads)
    width = settings.take("attention.key_length", config["hidden_size"] // heads)
    if settings.take("attention.value_length", config["hidden_size"] // heads) != width:
        raise InputError(f"{file.path}: keys and values differ in width (key_length, value_length): not described")
    config["head_dim"] = width
    _add_rope(settings, config, file, described)
    for flag, stems in described.biases.items():
        config[flag] = any(has_bias(name, stems) for name in file.tensors)
    config["tie_word_embeddings"] = described.tied or "output.weight" not in file.tensors
    for special, stated in _SPECIAL.items():
        number = file.metadata.get(f"tokenizer.ggml.{stated}_token_id")
        config[f"{special}_token_id"] = number if number is not None and number < config["vocab_size"] else None
    described.more(settings, config)
    settings.finish()
    return _built(config, file)


def _words(file: GgufFile) -> int:
    """The rows of the embedding, of which llama.cpp wants one for each token."""
    if "token_embd.weight" not in file.tensors:
        raise InputError(f"{file.path} lacks token_embd.weight, the embedding")
    rows, tokens = file.tensors["token_embd.weight"].shape[0], file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, StringArray) and tokens.count != rows:
        raise InputError(
            f"{file.path} has {tokens.count} tokens and an embedding of {rows} rows: they do not belong together"
        )
    return rows


def _add_rope(settings: Settings, config: Config, file: GgufFile, described: GgufArchitecture) -> None:
    if not described.rope:
        return
    tensors = {FREQS: "rope_freqs", LONG: "longrope", SHORT: "longrope"}
    for name, kind in tensors.items():
        if name in file.tensors and kind not in described.factors:
            raise InputError(
                f"{file.path} has {name}, which llama.cpp does not read for the architecture {described.name}"
            )
    if described.name == "llama":  # which of the two it reads depends on the type
        long = settings.layers("rope.scaling.type") == "longrope"
        for name in (FREQS,) if long else (LONG, SHORT):
            if name in file.tensors:
                raise InputError(
                    f"{file.path} has {name}, which llama.cpp does not read with rope.scaling.type "
                    f"{settings.layers('rope.scaling.type')!r}"
                )
    width = config["head_dim"]
    turned = settings.take("rope.dimension_count", width)
    if turned != width and not described.partial:
        raise InputError(
            f"{file.path}: RoPE turns {turned} of {width} coordinates of a head (rope.dimension_count), and all is "
            f"what is described for {described.name}"
        )
    config["rope_parameters"] = rope_parameters(
        settings, file, turned, config["max_position_embeddings"], described.scalings
    )
    if described.partial:
        config["rope_parameters"]["partial_rotary_factor"] = turned / width


def _built(config: Config, file: GgufFile) -> Any:
    kind = CONFIG_MAPPING[config.pop("model_type")]
    names, heads = kind.attribute_map, config["num_attention_heads"]
    usual = config["hidden_size"] // heads
    if config["head_dim"] == usual and not hasattr(kind(), "head_dim"):
        del config["head_dim"]
    plain = "num_key_value_heads" not in kind().to_dict()
    if plain and config.pop("num_key_value_heads") != heads:
        raise InputError(f"{file.path}: {kind.model_type} has as many heads of keys as of queries (head_count_kv)")
    try:
        return kind(**{names.get(key, key): value for key, value in config.items()})
    except Exception as error:  # each architecture checks its settings in its own way
        raise InputError(f"{file.path} has settings that transformers does not take: {error}") from error
