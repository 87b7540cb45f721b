"""Tiny models of any architecture: every kind of layer that a configuration has, with small random parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gyroquant.errors import UnsupportedModelError
from gyroquant.models.execution.runner import auto_class

VOCABULARY = 100
MOST_LAYERS = 12
"""The largest number of layers of a tiny model; kinds of layers beyond it are left out."""

_HIDDEN, _HEADS, _HEAD = 64, 4, 16
_FEW = 4  # sizes up to this one are numbers of things, and a model with fewer keeps its own number
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "num_layers_per_stack"),
)


def _sizes() -> dict[str, int]:
    """The sizes of a tiny model, by the names of settings."""
    groups: dict[int, str] = {
        _HIDDEN: "hidden_size n_embd d_model dim word_embed_proj_dim emb_dim embedding_dim lru_width "
        "input_embedding_size output_embedding_size embedding_size prompt_mid_dim",
        96: "intermediate_size ffn_dim n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim dff dim_ff "
        "feed_forward_size intermediate_size_mlp dense_intermediate_size",
        _HEADS: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads "
        "swa_num_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts linear_num_heads "
        "linear_num_value_heads zero_expert_num",
        2: "num_key_value_heads num_kv_heads n_kv_heads num_query_groups swa_num_key_value_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k linear_num_key_heads n_groups mamba_n_groups "
        "n_group num_expert_group attn_layer_period expert_layer_period heads_per_ngram o_groups "
        "adapter_reduction_factor n_layers_per_attn_res_block split_ngram_parts rescale_every "
        "global_attn_every_n_layers full_attention_interval "
        "moe_layer_freq no_rope_layer_interval sliding_window_pattern _sliding_window_pattern layer_group_size "
        "interleave_moe_layer_step index_topk_blocks attention_every_k_layers moe_layer_interval",
        1: "n_shared_experts num_shared_experts moe_num_shared_experts topk_group "
        "attn_layer_offset expert_layer_offset cross_attn_k encoder_layerdrop",
        _HEAD: "index_n_heads head_dim v_head_dim query_pre_attn_scalar swa_head_dim "
        "linear_head_dim linear_key_head_dim "
        "linear_value_head_dim index_head_dim mamba_d_head mamba_headdim mamba_head_dim d_head dim_head "
        "hidden_size_per_layer_input laurel_rank hc_lowrank gated_norm_rank o_lora_rank router_hidden_size d_rel "
        "rel_extent state_size mamba_d_state ssm_state_size attention_head_size kv_channels adapter_rank "
        "pronunciation_embed_dim shape_embed_dim ple_embed_dim linear_conv_dim block_multiple_of "
        "ffn_round_up_to_multiple_of index_block_size block_size attention_window_size local_attention window_size "
        "local_attn_chunk_length lsh_attn_chunk_length keep_window_size",
        8: "qk_rope_head_dim rotary_dim sliding_window sliding_window_size attention_chunk_size index_topk chunk_size "
        "mamba_chunk_size mamba_dt_rank time_step_rank mamba_n_heads n_mamba_heads mamba_num_heads floor_scale "
        "position_bias_num_buckets num_buckets log_scaling_n_floor",
        24: "qk_nope_head_dim",
        32: "qk_head_dim q_lora_rank attention_head_dim",
        48: "kv_lora_rank moe_intermediate_size expert_ffn_hidden_size",
        80: "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_intermediate_size "
        "shared_experts_intermediate_size",
        128: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length "
        "max_target_positions max_source_positions relative_max_distance original_max_position_embeddings "
        "position_bias_max_distance attention_hidden_size mamba_d_ssm d_inner make_ngram_vocab_size_divisible_by "
        "max_window_layers_ ngram_vocab_size_base encoder_hash_byte_group_vocab",
        VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size "
        "pronunciation_vocab_size shape_vocab_size",
    }
    return {name: size for size, names in groups.items() for name in names.split()}


SIZES: Mapping[str, int] = _sizes()
_TOKENS = ("token_id", "token_index", "token_ids", "_tokens")
_DROPPED = ("dtype", "torch_dtype", "transformers_version", "quantization_config", "id2label", "label2id")
_ROPE_SECTIONS = ("mrope_section",)
# The number of first layers (or last ones) that differ from the others.
_FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "num_hash_layers")
_LAST = ("num_kv_shared_layers",)
_ALL = ("moe_layer_end_index", "max_window_layers")


_USUAL: Mapping[str, Mapping[str, Any]] = {
    "cohere_compass_text": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "reformer": {"is_decoder": True},
}


def causal_model_types() -> list[str]:
    """Every model type of transformers that has a causal language model."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))


def default_config(model_type: str) -> Any:
    """The configuration of a model type with the default settings of transformers.

    Some settings without a usable default get those of a usual model.
    """
    return CONFIG_MAPPING[model_type](**_USUAL.get(model_type, {}))


def kept_layers(config: Mapping[str, Any], count: int) -> list[int]:
    """The layers that a tiny model keeps, in order: the first two of every kind, or four if all are of one kind."""
    listed = {key: value for key, value in config.items() if isinstance(value, (list, tuple)) and len(value) == count}
    numbers = _layer_numbers(config, count)
    special = config.get("per_layer_config") or {}
    kinds: dict[Any, list[int]] = {}
    for i in range(count):
        kind: list[Any] = [repr(value[i]) for value in listed.values()]
        kind += [i in value for value in numbers.values()]
        kind += [i < config[key] for key in _FIRST if isinstance(config.get(key), int)]
        kind += [i >= count - config[key] for key in _LAST if isinstance(config.get(key), int)]
        kind.append(repr(next((value for key, value in special.items() if key.isdigit() and int(key) == i), None)))
        kinds.setdefault(tuple(kind), []).append(i)
    firsts, seconds = ([layers[n] for layers in kinds.values() if len(layers) > n] for n in (0, 1))
    if len(kinds) == 1:
        return list(range(min(count, 4)))
    return sorted((firsts + seconds)[:MOST_LAYERS])


def _layer_numbers(config: Mapping[str, Any], count: int) -> dict[str, list[int]]:
    """Settings that list the numbers of layers."""
    return {
        key: list(value)
        for key, value in config.items()
        if isinstance(value, (list, tuple))
        and key.endswith(("layers", "idxs", "layer_ids", "_indices"))
        and len(value) != count
        and all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= count for i in value)
    }


def tiny_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration with small sizes and few layers. What says how layers work is unchanged."""
    layers = next((key for key in _LAYERS if isinstance(config.get(key), int)), None)
    listed = config.get("layers_block_type") or config.get("layer_types")
    count = config[layers] if layers else len(listed or ())
    kept = kept_layers(config, count) if count else []
    numbers = _layer_numbers(config, count)
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in _DROPPED:
            continue
        if key in _LAYERS and isinstance(value, int):
            out[key] = len(kept) if key == layers else min(value, 2)
        elif key in numbers:
            out[key] = [kept.index(i) for i in numbers[key] if i in kept]
        elif count and isinstance(value, (list, tuple)) and len(value) == count:
            out[key] = [_small(key.removesuffix("_per_layer"), value[i]) for i in kept]
        elif key == "per_layer_config" and value and all(name.isdigit() for name in value):
            special = {int(i): tiny_settings(settings) for i, settings in value.items()}
            width = len(str(len(kept) - 1))
            out[key] = {f"{new:0{width}d}": special[i] for new, i in enumerate(kept) if i in special}
        elif key in _FIRST and isinstance(value, int):
            out[key] = sum(i < value for i in kept)
        elif key in _LAST and isinstance(value, int):
            out[key] = sum(i >= count - value for i in kept)
        elif key in _ALL and isinstance(value, int):
            out[key] = max(0, len(kept) - 1) if value >= 0 else value
        elif isinstance(value, Mapping):
            out[key] = _nested(key, value)
        else:
            out[key] = _small(key, value)
    return _consistent(config, out)


def _nested(key: str, value: Mapping[str, Any]) -> dict[str, Any]:
    if "rope" in key or "rope_type" in value:
        return {name: _rope(name, setting) for name, setting in value.items()}
    return tiny_settings(value)


def _rope(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rope(name, setting) for name, setting in value.items()}
    if key in _ROPE_SECTIONS:
        return [2, 3, 3]
    if key in ("short_factor", "long_factor"):
        return [1.0 + 0.1 * i for i in range(_HEAD // 2)]
    return 64 if key == "original_max_position_embeddings" else value


def _small(key: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)):
        return value
    if key.endswith(_TOKENS):
        if not isinstance(value, int):
            return [min(i, VOCABULARY - 1) if isinstance(i, int) else i for i in value]
        return min(value, VOCABULARY - 1)
    if isinstance(value, (list, tuple)):
        if key in SIZES and all(isinstance(i, int) for i in value):
            return [SIZES[key]] * len(value)
        return list(value)
    if key not in SIZES or value <= 0:
        return value
    return min(value, SIZES[key]) if SIZES[key] <= _FEW else SIZES[key]


def _sum(config: Mapping[str, Any], *keys: str) -> int | None:
    sizes = [config.get(key) for key in keys]
    return sum(sizes) if all(isinstance(size, int) for size in sizes) else None  # type: ignore[arg-type]


def _consistent(config: Mapping[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """Small settings that depend on each other as those of the configuration do."""
    heads = next((k for k in ("num_attention_heads", "n_head", "n_heads", "num_heads") if k in small), None)
    for key in ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_query_groups", "swa_num_key_value_heads"):
        queries = "swa_num_attention_heads" if key.startswith("swa") else heads
        if queries and isinstance(small.get(key), int) and isinstance(config.get(queries), int):
            small[key] = small[queries] if config[key] == config[queries] else 1 if config[key] == 1 else small[key]
    if config.get("linear_num_key_heads") == config.get("linear_num_value_heads") is not None:
        small["linear_num_key_heads"] = small["linear_num_value_heads"]
    if "qk_rope_head_dim" in small and config.get("head_dim") == config["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    if isinstance(config.get("head_dim"), int) and config["head_dim"] == _sum(
        config, "qk_nope_head_dim", "qk_rope_head_dim"
    ):
        small["head_dim"] = SIZES["qk_nope_head_dim"] + SIZES["qk_rope_head_dim"]
    if "linear_num_heads" in small and "head_dim" in small and config.get("linear_head_dim") is None:
        small["head_dim"] = _HEAD
    widths = ("embedding_size", "input_embedding_size", "output_embedding_size", "word_embed_proj_dim")
    for key in widths:
        if isinstance(config.get(key), int) and config[key] != config.get("hidden_size"):
            small[key] = 32
    expand = config.get("mamba_expand") or config.get("expand")
    if isinstance(expand, int) and "mamba_d_ssm" in small and small["mamba_d_ssm"]:
        small["mamba_d_ssm"] = _HEAD * small["mamba_n_heads"]
    if isinstance(small.get("hidden_size"), int) and isinstance(small.get("attention_head_dim"), int) and heads:
        twice = config.get("attention_hidden_size") == 2 * config.get("hidden_size", 0)
        small["attention_head_dim"] = (2 if twice else 1) * small["hidden_size"] // small[heads]
    if "num_heads" in small and "expand" in small and "state_size" in small:  # Mamba-2: heads fill the inner width
        small["num_heads"] = small["expand"] * small["hidden_size"] // small["head_dim"]
    if "axial_pos_shape" in small:
        small |= {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, _HIDDEN - 16]}
    return small


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter random values, and disturbs the persistent buffers of floating point.

    With the usual initial values, ones and zeros, a fold that ignores gains and biases would pass the proof.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() < 2:
            parameter.nan_to_num_(0.0).clamp_(-4, 4).add_(0.3 * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and buffer.is_floating_point() and buffer.dim() < 3:
                buffer.add_(0.1 * torch.randn(buffer.shape, generator=generator).to(buffer))
    return model


def tiny_config(config: Any, filled: bool = False) -> Any:
    """A tiny configuration with the layers of `config`.

    `filled`: sizes that the configuration leaves empty get small values. Raises UnsupportedModelError if there is none.
    """
    settings = tiny_settings(config.to_dict())
    if filled:
        settings |= {key: SIZES[key] for key, value in settings.items() if value is None and key in SIZES}
    try:
        return type(config)(**settings)
    except Exception as error:  # configurations check their settings and raise many kinds
        raise UnsupportedModelError(
            f"{config.model_type}: its configuration cannot be made small ({_short(error)})"
        ) from error


def tiny_model(config: Any, build: Callable[[Any], nn.Module] | None = None, seed: int = 0) -> Any:
    """A tiny random model of a configuration, fp32, in evaluation mode, which has run once.

    `build` makes a model from a configuration. Default: the causal language model of transformers. Raises
    UnsupportedModelError if no tiny model can be built and run.
    """
    try:
        return _built(tiny_config(config), build, seed)
    except Exception as first:  # layers check their sizes and raise many kinds
        try:
            return _built(tiny_config(config, filled=True), build, seed)
        except Exception:
            raise UnsupportedModelError(
                f"{config.model_type}: no tiny model can be built and run ({_short(first)})"
            ) from first


def _built(config: Any, build: Callable[[Any], nn.Module] | None, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # some parameters keep their initial values
        if build is not None:
            model = build(deepcopy(config))
        else:
            model = auto_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
    model = randomise(model.float(), seed).eval()
    with torch.no_grad():
        logits = model(input_ids=tiny_tokens(model), use_cache=False).logits
    if not bool(logits.isfinite().all()):
        raise ValueError("its logits are not finite")
    return model


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:200] if isinstance(error, UnsupportedModelError) else f"{type(error).__name__}: {text[:200]}"


def tiny_tokens(model: Any, batch: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids for a tiny model, shape (batch, length), without its special tokens."""
    size = model.config.get_text_config(decoder=True).vocab_size
    special = set(_special(model.config.to_dict()))
    plain = torch.tensor([i for i in range(size) if i not in special] or list(range(size)))
    generator = torch.Generator().manual_seed(seed)
    return plain[torch.randint(0, len(plain), (batch, length), generator=generator)]


def _special(settings: Mapping[str, Any]) -> Iterable[int]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif str(key).endswith(_TOKENS):
            yield from (value if isinstance(value, (list, tuple)) else [value])
