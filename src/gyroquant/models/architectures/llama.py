"""Llama and the families that share its layout: Mistral, SmolLM3, Granite, Seed-OSS, Qwen2 (biases), Qwen3 (query and
key norms); ERNIE 4.5 and Helium, whose RoPE turns neighbours; Arcee, without a gate.

Granite's multipliers are scalars on whole vectors, which commute with every linear map, so they need no mention.
"""

from gyroquant.models.spec import Architecture, Embedding, Linear, Norm, Part, RopeLayout, register

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


def _register(name: str, model_types: tuple[str, ...], mlp: tuple[Part, ...], rope: RopeLayout) -> None:
    block = (*ATTENTION, *MLP_NORM, *mlp)
    register(Architecture(name, model_types, blocks="model.layers", block=block, outer=OUTER, rope=rope))


_LLAMA = ("llama", "mistral", "smollm3", "granite", "qwen2", "qwen3", "seed_oss")
_IN_WRAPPERS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")  # whose positions are 3-D for images alone

_register("llama", (*_LLAMA, *_IN_WRAPPERS), MLP, "half")
_register("llama_interleaved", ("ernie4_5", "helium"), MLP, "interleaved")
_register("arcee", ("arcee",), UNGATED_MLP, "half")
