"""What llama.cpp calls each architecture, and what a file has to say of it: the other direction of the tables in
`models/stores/gguf`.

Everything is as llama.cpp runs it (src/models/*.cpp there). A setting that llama.cpp has built in must have that value
in the model. Tests run every architecture here in llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from gyroquant.formats.gguf import target_settings as st
from gyroquant.formats.gguf.rope import rope_problems
from gyroquant.models.graph.heads import heads_of


@dataclass(frozen=True)
class Target:
    """An architecture of llama.cpp as the target of an export.

    name: the name in llama.cpp.
    fixed: for settings that llama.cpp has built in, the values that it has. A setting that a configuration lacks fits.
    neighbours: RoPE turns neighbouring coordinates in llama.cpp, half a head apart in transformers.
    norm_offset: the number that is added to stored gains.
    rope: whether it uses RoPE.
    partial: whether RoPE may turn a part of a head.
    factors: whether it reads factors of the frequencies of RoPE from tensors.
    epsilon: the epsilon of the norms: its key in the file and its name in the configuration.
    own_head: whether the file may have a head that is not the embedding, must have one (None), or not.
    square: whether the heads together must be as wide as the model.
    windows: whether llama.cpp follows sliding windows.
    settings: settings of the architecture, by their keys without its name.
    problems: other reasons why llama.cpp would not follow a configuration, one sentence each.
    names: parts of names of parameters that the gguf package does not know, with their names in llama.cpp.
    changes: what is done to parameters that are not rounded, by the names of tensors in a block.
    variant: takes a configuration. Returns the name in llama.cpp, if that depends on it.
    """

    name: str
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: {**_SILU, **_NO_BIASES})
    neighbours: bool = False
    norm_offset: float = 0.0
    rope: bool = True
    partial: bool = False
    factors: bool = False
    epsilon: tuple[str, str] = (st.RMS, "rms_norm_eps")
    own_head: bool | None = True
    square: bool = False
    windows: bool = False
    settings: Callable[[Any], st.Settings] = st.nothing
    problems: Callable[[Any], Iterable[str]] = lambda config: ()
    names: Mapping[str, str] = field(default_factory=dict)
    changes: Mapping[str, Callable[[Tensor, Any], Tensor]] = field(default_factory=dict)
    variant: Callable[[Any], str] | None = None


_NO = (False, None)
_ANY = (False, True, None)
_SILU: Mapping[str, tuple[Any, ...]] = {"hidden_act": ("silu",)}
_NO_BIASES: Mapping[str, tuple[Any, ...]] = {"attention_bias": _NO, "mlp_bias": _NO}
_BIASES: Mapping[str, tuple[Any, ...]] = {"attention_bias": _ANY, "mlp_bias": _ANY}
_TANH = ("gelu_pytorch_tanh", "gelu_new")
_QWEN = {**_SILU, "attention_bias": _NO, "use_sliding_window": _NO}
_EVERY_LAYER = {"mlp_only_layers": ([], None), "decoder_sparse_step": (1, None), "use_sliding_window": _NO}
_COHERE = {**_SILU, "use_qk_norm": _NO, "attention_bias": _NO}
_GPT2 = {
    "activation_function": _TANH,
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": _NO,
}
_GRANITE_NAMES = {
    ".block_sparse_moe.router.weight": "ffn_gate_inp.weight",
    ".shared_mlp.output_linear.weight": "ffn_down_shexp.weight",
}
_NEMOTRON_NAMES = {
    ".mixer.in_proj.weight": "ssm_in.weight",
    ".mixer.out_proj.weight": "ssm_out.weight",
    ".mixer.conv1d.": "ssm_conv1d.",
    ".mixer.dt_bias": "ssm_dt.bias",
    ".mixer.A_log": "ssm_a",
    ".mixer.D": "ssm_d",
    ".mixer.norm.weight": "ssm_norm.weight",
    ".mixer.gate.weight": "ffn_gate_inp.weight",
    ".mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
    ".mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    ".mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
    ".mixer.up_proj.": "ffn_up.",
    ".mixer.down_proj.": "ffn_down.",
    **{f".mixer.{part}_proj.": f"attn_{part}." for part in "qkv"},
    ".mixer.o_proj.": "attn_output.",
}
_NEMOTRON_CHANGES: Mapping[str, Callable[[Tensor, Any], Tensor]] = {
    "ssm_a": lambda values, config: -values.exp()[:, None],
    "ssm_d": lambda values, config: values[:, None],
    "ssm_norm.weight": lambda values, config: values.view(config.n_groups, -1),
}
_LLAMA = Target("llama", fixed={**_SILU, **_BIASES}, neighbours=True, factors=True)
_GEMMA = Target("gemma", fixed={"hidden_act": _TANH, **_NO_BIASES}, norm_offset=1.0, own_head=False)
_GRANITE = replace(_LLAMA, name="granite", settings=st.granite)
_GRANITE_MOE = replace(
    _GRANITE,
    name="granitemoe",
    settings=st.granite_experts,
    fixed={**_SILU, "attention_bias": _NO},
    names=_GRANITE_NAMES,
)
_DEEPSEEK = Target("deepseek2", partial=True, settings=st.deepseek, problems=st.deepseek_problems)
_GLM_MOE = Target("glm4moe", fixed=_SILU, partial=True, settings=st.glm4_moe, problems=st.dense_first)

TARGETS: dict[str, Target] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": replace(
        _LLAMA, name="mistral3", settings=st.ministral3, problems=st.ministral3_problems, fixed={**_SILU, **_NO_BIASES}
    ),
    "mixtral": replace(_LLAMA, settings=st.experts, fixed={**_SILU, **_NO_BIASES}),
    "qwen2": Target("qwen2", fixed=_QWEN, square=True),
    "qwen3": Target("qwen3", fixed=_QWEN),
    "qwen2_moe": Target(
        "qwen2moe",
        fixed={**_SILU, **_EVERY_LAYER, "norm_topk_prob": _NO},
        square=True,
        settings=st.mixture(expert_shared_feed_forward_length="shared_expert_intermediate_size"),
    ),
    "qwen3_moe": Target("qwen3moe", fixed={**_QWEN, **_EVERY_LAYER, "norm_topk_prob": (True,)}, settings=st.experts),
    "olmoe": Target(
        "olmoe",
        fixed={**_SILU, **_NO_BIASES, "norm_topk_prob": _NO, "clip_qkv": (None,)},
        square=True,
        settings=st.experts,
        problems=st.olmoe_problems,
    ),
    "phi3": Target("phi3", fixed=_SILU, partial=True, factors=True, square=True),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, name="gemma2", settings=st.gemma2, problems=st.gemma2_problems, windows=True),
    "gemma3_text": replace(
        _GEMMA, name="gemma3", own_head=True, settings=st.gemma3, problems=st.gemma3_problems, windows=True
    ),
    "granite": _GRANITE,
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_MOE,
    "smollm3": Target(
        "smollm3",
        neighbours=True,
        fixed={**_SILU, **_NO_BIASES, "use_sliding_window": _NO},
        problems=st.smollm3_problems,
    ),
    "seed_oss": Target("seed_oss", fixed={**_SILU, "attention_out_bias": _NO, "mlp_bias": _NO}),
    "ernie4_5": Target("ernie4_5", fixed={**_SILU, "use_bias": _NO}),
    "ernie4_5_moe": Target(
        "ernie4_5-moe",
        fixed={**_SILU, "use_bias": _NO},
        settings=st.ernie_experts,
        problems=st.ernie_problems,
        names={".mlp.gate.moe_statics.e_score_correction_bias": "exp_probs_b.bias"},
    ),
    "arcee": Target("arcee", fixed={"hidden_act": ("relu2",), **_NO_BIASES}, neighbours=True, factors=True),
    "olmo": Target("olmo", neighbours=True, square=True, epsilon=("", ""), settings=st.olmo),
    "olmo2": Target("olmo2", square=True),
    "olmo3": Target("olmo2", square=True, settings=st.windows(4)[0], problems=st.olmo3_problems, windows=True),
    "exaone4": Target(
        "exaone4",
        fixed=_SILU,
        factors=True,
        square=True,
        settings=st.exaone4,
        problems=st.exaone4_problems,
        windows=True,
    ),
    "exaone_moe": Target(
        "exaone-moe", fixed=_SILU, settings=st.exaone_moe, problems=st.exaone_moe_problems, windows=True
    ),
    "cohere": Target(
        "command-r",
        fixed=_COHERE,
        epsilon=(st.LAYER, "layer_norm_eps"),
        own_head=False,
        square=True,
        settings=st.cohere,
    ),
    "cohere2": Target(
        "cohere2",
        fixed=_COHERE,
        epsilon=(st.LAYER, "layer_norm_eps"),
        own_head=False,
        square=True,
        windows=True,
        settings=st.cohere2,
        problems=st.windows(4)[1],
    ),
    "gpt2": Target("gpt2", fixed=_GPT2, epsilon=(st.LAYER, "layer_norm_epsilon"), rope=False),
    "gpt_neox": Target(
        "gptneox",
        fixed={"hidden_act": _TANH, "attention_bias": (True,)},
        epsilon=(st.LAYER, "layer_norm_eps"),
        partial=True,
        own_head=None,
        settings=lambda config: {"use_parallel_residual": config.use_parallel_residual},
    ),
    "starcoder2": Target(
        "starcoder2",
        fixed={"hidden_act": _TANH, "use_bias": (True,)},
        epsilon=(st.LAYER, "norm_epsilon"),
        square=True,
    ),
    "nemotron": Target(
        "nemotron",
        fixed={"hidden_act": ("relu2",), **_BIASES},
        epsilon=(st.LAYER, "norm_eps"),
        norm_offset=1.0,
        partial=True,
        own_head=None,
        square=True,
    ),
    "nemotron_h": Target(
        "nemotron_h",
        fixed={
            "mlp_hidden_act": ("relu2",),
            "mamba_hidden_act": ("silu",),
            "use_bias": _NO,
            "mamba_proj_bias": _NO,
            "mlp_bias": _NO,
            "attention_bias": _NO,
            "moe_latent_size": (None,),
        },
        epsilon=(st.LAYER, "layer_norm_epsilon"),
        rope=False,
        settings=st.nemotron_h,
        problems=st.nemotron_h_problems,
        names=_NEMOTRON_NAMES,
        changes=_NEMOTRON_CHANGES,
        variant=lambda config: "nemotron_h_moe" if "moe" in config.layers_block_type else "nemotron_h",
    ),
    "gpt_oss": Target(
        "gpt-oss",
        fixed={**_SILU, "attention_bias": (True,)},
        own_head=None,
        windows=True,
        settings=lambda config: st.experts(config) | st.windows(2)[0](config),
        problems=st.windows(2)[1],
    ),
    "glm4": Target("glm4", fixed=_SILU, partial=True),
    "glm4_moe": _GLM_MOE,
    "solar_open": _GLM_MOE,
    "glm4_moe_lite": _DEEPSEEK,
    "youtu": _DEEPSEEK,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "dots1": Target("dots1", settings=st.glm4_moe, problems=st.dense_first),
    "minimax_m2": Target("minimax-m2", fixed=_SILU, partial=True, own_head=None, settings=st.minimax_m2),
    "hunyuan_v1_dense": Target("hunyuan-dense"),
    "hunyuan_v1_moe": Target("hunyuan-moe", settings=st.hunyuan_experts),
    "lfm2": Target(
        "lfm2",
        fixed={"conv_bias": _NO},
        epsilon=(st.RMS, "norm_eps"),
        square=True,
        settings=st.lfm2_dense,
        problems=st.lfm2_problems,
    ),
    "lfm2_moe": Target(
        "lfm2moe",
        fixed={"conv_bias": _NO, "norm_topk_prob": (True,), "use_expert_bias": (True,)},
        epsilon=(st.RMS, "norm_eps"),
        square=True,
        settings=st.lfm2_moe,
        problems=st.lfm2_problems,
    ),
    "stablelm": Target(
        "stablelm",
        fixed={**_SILU, "qk_layernorm": _NO},
        epsilon=(st.LAYER, "layer_norm_eps"),
        partial=True,
        own_head=None,
        square=True,
    ),
    "phi": Target(
        "phi2",
        fixed={"hidden_act": _TANH, "qk_layernorm": _NO},
        epsilon=(st.LAYER, "layer_norm_eps"),
        partial=True,
        own_head=None,
        square=True,
    ),
    "jais2": Target(
        "jais2",
        fixed={"hidden_act": ("relu2",), "attention_bias": (True,), "mlp_bias": (True,)},
        epsilon=(st.LAYER, "layer_norm_eps"),
    ),
}
"""The targets by model type of transformers."""


def target_of(config: Any) -> Target:
    """The target of a configuration. Raises KeyError for an architecture without one."""
    target = TARGETS[config.model_type]
    return target if target.variant is None else replace(target, name=target.variant(config))


def target_problems(config: Any) -> Iterable[str]:
    """The settings of a configuration that llama.cpp would not follow, one sentence each."""
    target = target_of(config)
    name = target.name
    for key, values in target.fixed.items():
        value = getattr(config, "hidden_activation" if _renamed(config, key) else key, values[0])
        if value in values:
            continue
        if key in ("hidden_act", "activation_function"):
            yield f"llama.cpp does not support the activation {value} for {name}; it supports {', '.join(values)}"
        elif "bias" in key and value:
            yield f"llama.cpp does not support the biases ({key}) of {config.model_type}"
        else:
            yield f"llama.cpp runs {name} with {key} {values[0]}, but this model has {value}"
    if target.rope:
        yield from rope_problems(config, name, target.factors, target.partial)
    heads = heads_of(config)
    if target.square and heads.queries * heads.size != config.hidden_size:
        yield (
            f"llama.cpp needs heads of {name} that are as wide together as the model, which has {heads.queries} of "
            f"{heads.size} coordinates and is {config.hidden_size} wide"
        )
    yield from target.problems(config)


def _renamed(config: Any, key: str) -> bool:
    return key == "hidden_act" and not hasattr(config, key)
