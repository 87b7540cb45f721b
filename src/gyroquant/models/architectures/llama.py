"""Llama and the families that share its layout.

- Mistral, SmolLM3, Granite, Seed-OSS.
- Qwen2 (with biases) and Qwen3 (with query and key norms).
- ERNIE 4.5 and Helium: RoPE turns neighbours.
- Arcee: there is no gate.

Granite multiplies whole vectors by scalars. These commute with every linear map, so the description leaves them out.
"""

from collections.abc import Mapping
from typing import Any

from gyroquant.models.graph.spec import (
    Architecture,
    Embedding,
    Example,
    Linear,
    Norm,
    Part,
    RopeLayout,
    example,
    register,
)

QKV = (
    Norm("input_layernorm", "residual", "attn_in"),
    Linear("self_attn.q_proj", "attn_in", "q"),
    Linear("self_attn.k_proj", "attn_in", "k"),
    Linear("self_attn.v_proj", "attn_in", "v"),
)
ATTENTION = (
    *QKV,
    Norm("self_attn.q_norm", "q", "q", optional=True),
    Norm("self_attn.k_norm", "k", "k", optional=True),
    Linear("self_attn.o_proj", "attn_out", "residual"),
)
MLP_NORM = (Norm("post_attention_layernorm", "residual", "mlp_in"),)
MLP = (
    Linear("mlp.gate_proj", "mlp_in", "gate"),
    Linear("mlp.up_proj", "mlp_in", "up"),
    Linear("mlp.down_proj", "act", "residual"),
)
UNGATED_MLP = (
    Linear("mlp.up_proj", "mlp_in", "up"),
    Linear("mlp.down_proj", "act", "residual"),
)
OUTER = (
    Embedding("model.embed_tokens"),
    Norm("model.norm", "residual", "final"),
    Linear("lm_head", "final", "logits"),
)


def _register(
    name: str, model_types: tuple[str, ...], mlp: tuple[Part, ...], rope: RopeLayout, examples: Mapping[str, Example]
) -> None:
    block = (*ATTENTION, *MLP_NORM, *mlp)
    register(Architecture(name, model_types, "model.layers", block, OUTER, rope, examples=examples))


_LLAMA = ("llama", "mistral", "smollm3", "granite", "qwen2", "qwen3", "seed_oss")
_IN_WRAPPERS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")  # their positions are 3-D for images only
_GRANITE: dict[str, Any] = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "attention_multiplier": 0.2}
_EXAMPLES = {
    "llama": example("LlamaConfig"),
    "llama_tied": example("LlamaConfig", tie_word_embeddings=True),
    "llama_bias": example("LlamaConfig", attention_bias=True, mlp_bias=True),
    "mistral": example("MistralConfig"),
    "smollm3": example("SmolLM3Config", tie_word_embeddings=True),
    "granite": example("GraniteConfig", **_GRANITE, residual_multiplier=0.4, tie_word_embeddings=True),
    "granite_bias": example("GraniteConfig", residual_multiplier=0.4, mlp_bias=True),
    "seed_oss": example("SeedOssConfig", head_dim=16, attention_bias=True, attention_out_bias=True),
    "qwen2": example("Qwen2Config"),
    "qwen3": example("Qwen3Config", head_dim=32),
}
_INTERLEAVED = {
    "ernie4_5": example("Ernie4_5Config", head_dim=16, use_bias=True),
    "helium": example("HeliumConfig", head_dim=16),
}

_register("llama", (*_LLAMA, *_IN_WRAPPERS), MLP, "half", _EXAMPLES)
_register("llama_interleaved", ("ernie4_5", "helium"), MLP, "interleaved", _INTERLEAVED)
_register("arcee", ("arcee",), UNGATED_MLP, "half", {"arcee": example("ArceeConfig", mlp_bias=True)})
