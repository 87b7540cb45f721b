"""Architectures of llama.cpp in terms of transformers: built-in settings, settings of the file, differences in layout.

Everything is as llama.cpp runs it (src/models/*.cpp there). That is not always the model as it was trained: llama.cpp
runs GPT-NeoX with the tanh approximation of GELU, and Phi-3 without its sliding window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gyroquant.errors import InputError
from gyroquant.models.stores.gguf.settings import Settings

Config = dict[str, Any]
_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
_QKV = _ATTENTION[:4]
_FFN = ("ffn_gate", "ffn_up", "ffn_down")
_ALL_BIASES = {"attention_bias": _ATTENTION, "mlp_bias": _FFN}
_RMS, _LAYER = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"


def _no_settings(settings: Settings, config: Config) -> None:
    """Reads no settings beyond those of all architectures."""


@dataclass(frozen=True)
class GgufArchitecture:
    """How one architecture of llama.cpp becomes a transformers config.

    name: the name in llama.cpp.
    model_type: the name in transformers.
    epsilon: the epsilon of the norms: its key in the file and its name in the config.
    fixed: settings that llama.cpp has built in.
    biases: for each config setting that switches biases on, the tensors whose biases show its value.
    permuted: the rows of queries and keys are ordered so that RoPE turns neighbours; transformers turns halves.
    norm_offset: the file's gains minus the parameters.
    tied: the head is always the embedding.
    partial: RoPE may turn only a part of a head.
    factors: the tensors that may divide the frequencies of RoPE.
    scalings: the kinds of RoPE scaling that transformers supports for it. All of them can be written as longrope.
    scales: second scales (NVFP4) are applied to all layers.
    rope: the architecture uses RoPE.
    optional_biases: a missing bias of a linear layer is zero.
    no_biases: tensors that may not have a bias, although the parameters do.
    more: reads the architecture's own settings into the config.
    """

    name: str
    model_type: str
    epsilon: tuple[str, str] = (_RMS, "rms_norm_eps")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    permuted: bool = False
    norm_offset: float = 0.0
    tied: bool = False
    partial: bool = False
    factors: tuple[str, ...] = ()
    scalings: tuple[str, ...] = ("linear", "yarn", "llama3")
    scales: bool = False
    rope: bool = True
    optional_biases: bool = True
    no_biases: tuple[str, ...] = ()
    more: Callable[[Settings, Config], None] = _no_settings


def _experts(settings: Settings, config: Config) -> None:
    config["num_experts_per_tok"] = settings.need("expert_used_count")
    if wide := settings.take("expert_feed_forward_length"):
        config["moe_intermediate_size"] = wide
    if shared := settings.take("expert_shared_feed_forward_length"):
        config["shared_expert_intermediate_size"] = shared


def _mixtral(settings: Settings, config: Config) -> None:
    """llama.cpp runs Mixtral as Llama with experts."""
    if count := settings.take("expert_count"):
        _experts(settings, config)
        config |= {"model_type": "mixtral", "num_local_experts": count}
        if config["attention_bias"] or config["mlp_bias"]:
            raise InputError(
                f"{settings.path} has biases beside experts, which is not described for {settings.architecture}: start "
                "from the model in safetensors"
            )
    settings.take("expert_used_count")


def _moe(settings: Settings, config: Config) -> None:
    config["num_experts"] = settings.need("expert_count")
    _experts(settings, config)
    if config["model_type"] != "olmoe" and "moe_intermediate_size" not in config:  # llama.cpp's own rule
        config["moe_intermediate_size"] = config["intermediate_size"] // config["num_experts_per_tok"]
    if config["model_type"] == "qwen2_moe":
        config.setdefault("shared_expert_intermediate_size", config["intermediate_size"])


def _add_windows(settings: Settings, config: Config, every: int, default: int | None) -> bool:
    """Adds the layers with a sliding window to the config. Returns whether there are any.

    If the file has no pattern, every layer has a window except each `every`th one.
    """
    window = settings.take("attention.sliding_window", default)
    pattern, layers = settings.layers("attention.sliding_window_pattern"), config["num_hidden_layers"]
    if not window:
        config |= {"sliding_window": None, "layer_types": ["full_attention"] * layers}
        return False
    if not isinstance(pattern, list):
        every = every if pattern is None else int(pattern)
        pattern = [every == 0 or i % every < every - 1 for i in range(layers)]
    if len(pattern) != layers:
        raise InputError(
            f"{settings.path}: attention.sliding_window_pattern has {len(pattern)} entries for {layers} layers: "
            "convert the model again"
        )
    kinds = ["sliding_attention" if sliding else "full_attention" for sliding in pattern]
    config |= {"sliding_window": int(window), "layer_types": kinds}
    return True


def _check_window_rope_base(settings: Settings, config: Config) -> None:
    """Raises InputError if layers with a window have a RoPE base of their own: transformers does not support that."""
    settings.ignore("rope.freq_base_swa", config["rope_parameters"]["rope_theta"])


def _gemma_scale(config: Config, layers_of_27b: int) -> None:
    is_27b = config["num_hidden_layers"] == layers_of_27b
    width = config["hidden_size"] // config["num_attention_heads"] if is_27b else config["head_dim"]
    config["query_pre_attn_scalar"] = width


def _gemma2(settings: Settings, config: Config) -> None:
    _add_windows(settings, config, 2, 4096)
    _check_window_rope_base(settings, config)
    _gemma_scale(config, 46)
    for key, default in (("attn", 50.0), ("final", 30.0)):
        config[f"{key}_logit_softcapping"] = settings.take(f"{key}_logit_softcapping", default) or None


def _gemma3(settings: Settings, config: Config) -> None:
    _add_windows(settings, config, 6, None)
    _gemma_scale(config, 62)
    config["final_logit_softcapping"] = settings.take("final_logit_softcapping") or None
    local = {"rope_type": "default", "rope_theta": float(settings.take("rope.freq_base_swa", 10000.0))}
    config["rope_parameters"] = {"full_attention": config["rope_parameters"], "sliding_attention": local}


def _phi3(settings: Settings, config: Config) -> None:
    """llama.cpp ignores the window: every layer attends to all tokens."""
    settings.take("attention.sliding_window")
    config["sliding_window"] = None
    config["original_max_position_embeddings"] = config["rope_parameters"].get(
        "original_max_position_embeddings", config["max_position_embeddings"]
    )


def _granite(settings: Settings, config: Config) -> None:
    if settings.take("rope.scaling.finetuned", True) is False:
        raise InputError(
            f"{settings.path}: granite without RoPE (rope.scaling.finetuned) is not described: start from the model in "
            "safetensors"
        )
    config["logits_scaling"] = settings.need("logit_scale")
    config["residual_multiplier"] = settings.take("residual_scale") or 1.0
    config["embedding_multiplier"] = settings.take("embedding_scale") or 1.0
    config["attention_multiplier"] = settings.take("attention.scale") or config["head_dim"] ** -0.5


def _smollm3(settings: Settings, config: Config) -> None:
    layers = config["num_hidden_layers"]
    config |= {"no_rope_layer_interval": 4, "no_rope_layers": [int((i + 1) % 4 != 0) for i in range(layers)]}
    config |= {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * layers}


def _olmo(settings: Settings, config: Config) -> None:
    if _add_windows(settings, config, 4, None):
        _check_window_rope_base(settings, config)
        rope = config["rope_parameters"]
        local = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        config |= {"model_type": "olmo3", "rope_parameters": {"full_attention": rope, "sliding_attention": local}}
    else:
        del config["sliding_window"], config["layer_types"]


def _exaone4(settings: Settings, config: Config) -> None:
    """For llama.cpp, only models with 64 layers have windows. In others, all layers attend to all tokens with RoPE."""
    if config["num_hidden_layers"] == 64:
        _add_windows(settings, config, 4, 4096)
    else:
        settings.take("attention.sliding_window")
        settings.layers("attention.sliding_window_pattern")
        config |= {"sliding_window": None, "layer_types": ["full_attention"] * config["num_hidden_layers"]}
    _check_window_rope_base(settings, config)


def _cohere(settings: Settings, config: Config) -> None:
    config["logit_scale"] = settings.take("logit_scale") or 1.0


def _cohere2(settings: Settings, config: Config) -> None:
    _cohere(settings, config)
    _add_windows(settings, config, 4, None)
    _check_window_rope_base(settings, config)


def _gpt2(settings: Settings, config: Config) -> None:
    config["n_inner"] = config.pop("intermediate_size")


def _gptneox(settings: Settings, config: Config) -> None:
    config["use_parallel_residual"] = bool(settings.need("use_parallel_residual"))


_SILU, _TANH = {"hidden_act": "silu"}, "gelu_pytorch_tanh"
_GEMMA: dict[str, Any] = {"norm_offset": 1.0, "biases": {"attention_bias": _QKV}, "no_biases": ("attn_output",)}
_LLAMA_FACTORS = ("rope_freqs", "longrope")
_NORMS = (_LAYER, "layer_norm_eps")

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        GgufArchitecture(
            "llama",
            "llama",
            fixed=_SILU,
            biases=_ALL_BIASES,
            permuted=True,
            factors=_LLAMA_FACTORS,
            scales=True,
            more=_mixtral,
        ),
        GgufArchitecture("qwen2", "qwen2", fixed=_SILU | {"use_sliding_window": False}),
        GgufArchitecture(
            "qwen3",
            "qwen3",
            fixed=_SILU | {"use_sliding_window": False},
            scales=True,
            biases={"attention_bias": _QKV},
            no_biases=("attn_output",),
        ),
        GgufArchitecture(
            "qwen2moe",
            "qwen2_moe",
            more=_moe,
            fixed=_SILU | {"norm_topk_prob": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
        ),
        GgufArchitecture(
            "qwen3moe",
            "qwen3_moe",
            more=_moe,
            biases={"attention_bias": _QKV},
            no_biases=("attn_output",),
            fixed=_SILU | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        ),
        GgufArchitecture(
            "olmoe",
            "olmoe",
            fixed=_SILU | {"norm_topk_prob": False},
            more=_moe,
            biases={"attention_bias": _QKV},
            no_biases=("attn_output",),
        ),
        GgufArchitecture("phi3", "phi3", fixed=_SILU, partial=True, factors=("longrope",), scalings=(), more=_phi3),
        GgufArchitecture("gemma", "gemma", fixed={"hidden_act": _TANH}, tied=True, **_GEMMA),
        GgufArchitecture("gemma2", "gemma2", fixed={"hidden_activation": _TANH}, tied=True, more=_gemma2, **_GEMMA),
        GgufArchitecture("gemma3", "gemma3_text", fixed={"hidden_activation": _TANH}, more=_gemma3, **_GEMMA),
        GgufArchitecture(
            "granite",
            "granite",
            fixed=_SILU,
            biases=_ALL_BIASES,
            permuted=True,
            factors=("rope_freqs", "longrope"),
            more=_granite,
        ),
        GgufArchitecture(
            "smollm3",
            "smollm3",
            fixed=_SILU,
            permuted=True,
            more=_smollm3,
            biases={"attention_bias": _QKV},
            no_biases=("attn_output",),
        ),
        GgufArchitecture(
            "seed_oss",
            "seed_oss",
            fixed=_SILU | {"attention_out_bias": False, "mlp_bias": False},
            biases={"attention_bias": _QKV},
            no_biases=("attn_output",),
        ),
        GgufArchitecture("ernie4_5", "ernie4_5", fixed=_SILU, biases={"use_bias": _ATTENTION}, no_biases=_FFN),
        GgufArchitecture(
            "arcee",
            "arcee",
            fixed={"hidden_act": "relu2"},
            permuted=True,
            factors=("rope_freqs",),
            biases={"attention_bias": _QKV},
            no_biases=("attn_output",),
        ),
        GgufArchitecture(
            "olmo2", "olmo2", fixed=_SILU, more=_olmo, biases={"attention_bias": _QKV}, no_biases=("attn_output",)
        ),
        GgufArchitecture("exaone4", "exaone4", fixed=_SILU, factors=("rope_freqs",), more=_exaone4),
        GgufArchitecture(
            "command-r",
            "cohere",
            fixed=_SILU | {"use_qk_norm": False},
            epsilon=_NORMS,
            tied=True,
            more=_cohere,
            biases={"attention_bias": _QKV},
            no_biases=("attn_output",),
        ),
        GgufArchitecture(
            "cohere2",
            "cohere2",
            fixed=_SILU,
            epsilon=_NORMS,
            tied=True,
            more=_cohere2,
            biases={"attention_bias": _QKV},
            no_biases=("attn_output",),
        ),
        GgufArchitecture(
            "gpt2",
            "gpt2",
            fixed={"activation_function": "gelu_new"},
            rope=False,
            optional_biases=False,
            epsilon=(_LAYER, "layer_norm_epsilon"),
            more=_gpt2,
        ),
        GgufArchitecture(
            "gptneox",
            "gpt_neox",
            fixed={"hidden_act": "gelu_new", "attention_bias": True},
            epsilon=_NORMS,
            partial=True,
            optional_biases=False,
            more=_gptneox,
        ),
        GgufArchitecture(
            "starcoder2",
            "starcoder2",
            fixed={"hidden_act": _TANH, "use_bias": True, "sliding_window": None},
            epsilon=(_LAYER, "norm_epsilon"),
            optional_biases=False,
        ),
        GgufArchitecture(
            "nemotron",
            "nemotron",
            fixed={"hidden_act": "relu2"},
            epsilon=(_LAYER, "norm_eps"),
            norm_offset=1.0,
            partial=True,
            biases=_ALL_BIASES,
        ),
    )
}


def has_bias(name: str, stems: tuple[str, ...]) -> bool:
    """Whether a tensor is the bias of one of these layers of a block."""
    *_, stem, kind = ("", *name.split("."))
    return kind == "bias" and stem in stems
