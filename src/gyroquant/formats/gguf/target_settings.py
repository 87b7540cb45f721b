"""The settings that a GGUF file states of an architecture, and what llama.cpp would not follow: one function each, of a
configuration of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from gyroquant.models.graph.heads import heads_of
from gyroquant.models.graph.rope import rope_settings

Settings = dict[str, Any]
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of the functions of routers
RMS, LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def nothing(config: Any) -> Settings:
    """No settings beyond those of all architectures."""
    return {}


def experts(config: Any) -> Settings:
    """The numbers of experts and their width, under the names that architectures of transformers give them."""
    keys = {
        "expert_count": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        "expert_used_count": ("num_experts_per_tok", "moe_k", "moe_topk"),
        "expert_feed_forward_length": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
    }
    return {key: next(v for name in names if (v := getattr(config, name, None))) for key, names in keys.items()}


def mixture(**names: str) -> Callable[[Any], Settings]:
    """The settings of experts, and further ones: for each key, the name of the setting in the configuration."""

    def settings(config: Any) -> Settings:
        more = {key: getattr(config, name) for key, name in names.items()}
        return experts(config) | {key: value for key, value in more.items() if value is not None}

    return settings


def windows(every: int, pattern: bool = False) -> tuple[Callable[[Any], Settings], Callable[[Any], Iterable[str]]]:
    """The settings of layers with a window, and the reasons why llama.cpp would not follow them. In llama.cpp, each
    `every`th layer has none. With `pattern`, the file says which.
    """

    def settings(config: Any) -> Settings:
        window = config.sliding_window if "sliding_attention" in config.layer_types else 0
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        return {"attention.sliding_window": window} | ({"attention.sliding_window_pattern": kinds} if pattern else {})

    def problems(config: Any) -> Iterable[str]:
        kinds = [kind == "sliding_attention" for kind in config.layer_types]
        usual = [i % every < every - 1 for i in range(len(kinds))]
        if not pattern and any(kinds) and kinds != usual:
            yield f"llama.cpp gives no window to each {every}th layer of {config.model_type}, but this model to others"

    return settings, problems


def gemma2(config: Any) -> Settings:
    """The settings of Gemma 2."""
    return windows(2)[0](config) | {
        f"{part}_logit_softcapping": getattr(config, f"{part}_logit_softcapping") for part in ("attn", "final")
    }


def gemma2_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of Gemma 2, one sentence each."""
    yield from windows(2)[1](config)
    yield from gemma_scale(config, 46)
    for part in ("attn", "final"):
        if not getattr(config, f"{part}_logit_softcapping"):
            yield f"llama.cpp always caps the logits of gemma2, but this model has no {part}_logit_softcapping"


def gemma_scale(config: Any, layers_of_27b: int) -> Iterable[str]:
    """Whether the scores of a Gemma are divided by another number than in llama.cpp, which knows the largest model by
    its number of layers; one sentence if they are.
    """
    large = config.num_hidden_layers == layers_of_27b
    width = config.hidden_size // config.num_attention_heads if large else heads_of(config).size
    if config.query_pre_attn_scalar != width:
        yield (
            f"llama.cpp divides the scores of {config.model_type} by the root of {width}, this model by that of "
            f"{config.query_pre_attn_scalar} (query_pre_attn_scalar)"
        )


def gemma3(config: Any) -> Settings:
    """The settings of Gemma 3."""
    local = {"rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"])}
    cap = config.final_logit_softcapping
    return windows(6)[0](config) | local | ({"final_logit_softcapping": cap} if cap else {})


def gemma3_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of Gemma 3, one sentence each."""
    yield from windows(6)[1](config)
    yield from gemma_scale(config, 62)
    yield from plain_local_rope(config)


def plain_local_rope(config: Any) -> Iterable[str]:
    """Layers with a window turn by angles without scaling in llama.cpp."""
    if config.rope_parameters["sliding_attention"].get("rope_type", "default") != "default":
        yield f"llama.cpp does not scale the RoPE of layers of {config.model_type} with a window"


def cohere(config: Any) -> Settings:
    """The settings of Cohere."""
    return {"logit_scale": config.logit_scale}


def cohere2(config: Any) -> Settings:
    """The settings of Cohere-2."""
    return windows(4)[0](config) | cohere(config)


def olmoe_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of OLMoE, one sentence each."""
    if config.num_key_value_heads != config.num_attention_heads:
        yield "llama.cpp runs olmoe only with a key and value head for each query head (num_key_value_heads)"


def granite(config: Any) -> Settings:
    """The settings of Granite."""
    return {
        "logit_scale": config.logits_scaling,
        "residual_scale": config.residual_multiplier,
        "embedding_scale": config.embedding_multiplier,
        "attention.scale": config.attention_multiplier,
    }


def granite_experts(config: Any) -> Settings:
    """The settings of Granite with experts."""
    shared = getattr(config, "shared_intermediate_size", 0)
    found = granite(config) | experts(config)
    return found | ({"expert_shared_feed_forward_length": shared} if shared else {})


def smollm3_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of SmolLM3, one sentence each."""
    if list(config.no_rope_layers) != [int((i + 1) % 4 != 0) for i in range(config.num_hidden_layers)]:
        yield "llama.cpp leaves RoPE out of every fourth layer of smollm3, this model out of others (no_rope_layers)"


def olmo3_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of OLMo 3, one sentence each."""
    yield from windows(4)[1](config)
    yield from plain_local_rope(config)
    kinds = config.rope_parameters
    if kinds["sliding_attention"]["rope_theta"] != kinds["full_attention"]["rope_theta"]:
        yield "llama.cpp has one base of RoPE for all layers of olmo2"


def exaone4(config: Any) -> Settings:
    """The settings of EXAONE 4."""
    return windows(4, pattern=True)[0](config) if config.num_hidden_layers == 64 else {}


def exaone4_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of EXAONE 4, one sentence each."""
    if config.num_hidden_layers != 64 and config.sliding_window:
        yield "llama.cpp gives windows to models of exaone4 with 64 layers only"


def glm4_moe(config: Any) -> Settings:
    """The settings of GLM-4.5 and others with a sigmoid in their router."""
    names = {"expert_shared_count": "n_shared_experts", "expert_weights_scale": "routed_scaling_factor"}
    names |= {"expert_weights_norm": "norm_topk_prob"}
    more = {"expert_gating_func": SIGMOID, "leading_dense_block_count": dense_layers(config)}
    return mixture(**names)(config) | groups(config) | more


def dense_layers(config: Any) -> int:
    """The number of layers without experts, which come first."""
    kinds = getattr(config, "mlp_layer_types", None)
    return int(getattr(config, "first_k_dense_replace", 0)) if kinds is None else list(kinds).count("dense")


def dense_first(config: Any) -> Iterable[str]:
    """Whether layers without experts come after others, which llama.cpp cannot run."""
    dense = [kind == "dense" for kind in getattr(config, "mlp_layer_types", None) or ()]
    if dense != sorted(dense, reverse=True):
        yield f"llama.cpp has layers of {config.model_type} without experts at the start only (mlp_layer_types)"


def groups(config: Any) -> Settings:
    """The settings of groups of experts, of which only some are used. Empty if all are used."""
    count, used = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    return {"expert_group_count": count, "expert_group_used_count": used} if 1 < count != used else {}


def deepseek(config: Any) -> Settings:
    """The settings of DeepSeek."""
    size = config.qk_nope_head_dim + config.qk_rope_head_dim
    routed = getattr(config, "n_routed_experts", None)
    found = {
        "attention.head_count_kv": config.num_attention_heads,
        "attention.key_length": size,
        "attention.value_length": config.v_head_dim,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim,
        "attention.q_lora_rank": config.q_lora_rank or 0,
    }
    if routed is None:
        dense = {"leading_dense_block_count": config.num_hidden_layers, "expert_shared_count": 0}
        return found | dense | {"expert_feed_forward_length": config.intermediate_size}
    softmax = config.model_type == "deepseek_v2"
    norm = bool(config.norm_topk_prob) and not softmax  # transformers' DeepSeek-V2 does not read it
    return (
        found | glm4_moe(config) | {"expert_gating_func": SOFTMAX if softmax else SIGMOID, "expert_weights_norm": norm}
    )


def deepseek_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of DeepSeek, one sentence each."""
    if config.num_hidden_layers in (26, 27) and config.q_lora_rank:
        yield "llama.cpp reads no q_lora_rank from models of deepseek2 with 26 or 27 layers"
    kinds = {settings.get("rope_type", "default") for settings in rope_settings(config)}
    if kinds - {"default"}:
        yield f"llama.cpp scales the scores of deepseek2 with the RoPE of type {', '.join(kinds)} in another way"
    if not getattr(config, "rope_interleave", True):
        yield "llama.cpp turns neighbours in the heads of deepseek2 (rope_interleave), this model halves"
    if config.model_type == "deepseek_v2" and groups(config):
        yield "llama.cpp chooses groups of experts by their two best, DeepSeek-V2 by the best one (n_group)"
    yield from dense_first(config)


def olmo(config: Any) -> Settings:
    """The settings of OLMo."""
    return {LAYER: 1e-5} | ({"attention.clamp_kqv": config.clip_qkv} if config.clip_qkv else {})


def exaone_moe(config: Any) -> Settings:
    """The settings of EXAONE with experts."""
    names = {"expert_weights_scale": "routed_scaling_factor", "expert_weights_norm": "norm_topk_prob"}
    names |= {"expert_shared_count": "num_shared_experts"}
    more = {"expert_gating_func": SIGMOID, "leading_dense_block_count": dense_layers(config)}
    more["expert_shared_feed_forward_length"] = config.num_shared_experts * config.moe_intermediate_size
    return mixture(**names)(config) | groups(config) | windows(4, pattern=True)[0](config) | more


def exaone_moe_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of EXAONE with experts, one sentence each."""
    yield from dense_first(config)
    if "sliding_attention" not in config.layer_types:
        yield "llama.cpp runs exaone_moe only with sliding windows (layer_types)"


def minimax_m2(config: Any) -> Settings:
    """The settings of MiniMax-M2."""
    return experts(config) | {"expert_gating_func": SIGMOID}


def ernie_experts(config: Any) -> Settings:
    """The settings of ERNIE 4.5 with experts."""
    more = {"interleave_moe_layer_step": config.moe_layer_interval}
    more["leading_dense_block_count"] = config.moe_layer_start_index
    if config.moe_num_shared_experts:
        more["expert_shared_count"] = config.moe_num_shared_experts
        more["expert_shared_feed_forward_length"] = config.moe_num_shared_experts * config.moe_intermediate_size
    return experts(config) | more


def ernie_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of ERNIE 4.5, one sentence each."""
    last = config.moe_layer_end_index
    if last not in (-1, config.num_hidden_layers - 1):
        yield "llama.cpp has experts of ernie4_5_moe up to the last layer (moe_layer_end_index)"


def hunyuan_experts(config: Any) -> Settings:
    """The settings of Hunyuan with experts."""
    found = experts(config) | {"expert_shared_feed_forward_length": config.intermediate_size}
    return found | {"expert_shared_count": 1}


def ministral3(config: Any) -> Settings:
    """The settings of Ministral 3."""
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn":
        return {}
    return {"attention.temperature_scale": float(rope["llama_4_scaling_beta"])}


def ministral3_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of Ministral 3, one sentence each."""
    rope = config.rope_parameters
    if rope["rope_type"] != "yarn" and rope.get("llama_4_scaling_beta"):
        yield "llama.cpp scales queries of mistral3 by their position only with YaRN (llama_4_scaling_beta)"


def nemotron_h(config: Any) -> Settings:
    """The settings of Nemotron-H."""
    kinds = config.layers_block_type
    width = config.moe_intermediate_size if "moe" in kinds else config.intermediate_size
    found: Settings = {
        "attention.head_count_kv": [config.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds],
        "feed_forward_length": [width if kind in ("mlp", "moe") else 0 for kind in kinds],
        "ssm.conv_kernel": config.conv_kernel,
        "ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim,
        "ssm.state_size": config.ssm_state_size,
        "ssm.time_step_rank": config.mamba_num_heads,
        "ssm.group_count": config.n_groups,
        RMS: float(config.layer_norm_epsilon),
    }
    if "moe" not in kinds:
        return found
    names = {"expert_shared_count": "n_shared_experts", "expert_weights_norm": "norm_topk_prob"}
    names |= {"expert_weights_scale": "routed_scaling_factor"}
    names |= {"expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size"}
    return found | mixture(**names)(config) | groups(config)


def nemotron_h_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of Nemotron-H, one sentence each."""
    kinds = set(config.layers_block_type)
    if {"mlp", "moe"} <= kinds:
        yield "llama.cpp runs nemotron_h with experts in all feed-forward layers or in none (layers_block_type)"
    if not {"full_attention", "linear_attention"} <= kinds:
        yield "llama.cpp runs nemotron_h only with both attention and recurrent layers (layers_block_type)"


def lfm2_problems(config: Any) -> Iterable[str]:
    """Why llama.cpp would not follow a configuration of LFM2, one sentence each."""
    if len(set(config.layer_types)) < 2:
        yield f"llama.cpp runs {config.model_type} only with both convolutions and attention (layer_types)"


def lfm2(config: Any) -> Settings:
    """The settings of LFM2."""
    shared = [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]
    return {"attention.head_count_kv": shared, "shortconv.l_cache": config.conv_L_cache}


def lfm2_dense(config: Any) -> Settings:
    """The settings of LFM2 without experts."""
    width = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        width = int((config.block_ffn_dim_multiplier or 1.0) * int(2 * width / 3))
        width = -(-width // config.block_multiple_of) * config.block_multiple_of
    return lfm2(config) | {"feed_forward_length": width}


def lfm2_moe(config: Any) -> Settings:
    """The settings of LFM2 with experts."""
    more = {"leading_dense_block_count": config.num_dense_layers, "expert_gating_func": SIGMOID}
    return lfm2(config) | experts(config) | more
