"""Cohere and Cohere-2: attention and feed-forward in parallel after one LayerNorm without bias; the head is tied."""

from typing import Any

from gyroquant.models.graph.spec import Architecture, Embedding, Linear, Norm, example, register


def _refuse(config: Any) -> str | None:
    if getattr(config, "use_qk_norm", False):
        return "its query and key norms have a separate gain for every head (use_qk_norm), which is not supported"
    return None


register(
    Architecture(
        name="cohere2",
        model_types=("cohere", "cohere2"),
        blocks="model.layers",
        block=(
            Norm("input_layernorm", "residual", "attn_in", kind="layer"),
            Linear("self_attn.q_proj", "attn_in", "q"),
            Linear("self_attn.k_proj", "attn_in", "k"),
            Linear("self_attn.v_proj", "attn_in", "v"),
            Linear("self_attn.o_proj", "attn_out", "residual"),
            Linear("mlp.gate_proj", "attn_in", "gate"),
            Linear("mlp.up_proj", "attn_in", "up"),
            Linear("mlp.down_proj", "act", "residual"),
        ),
        outer=(
            Embedding("model.embed_tokens"),
            Norm("model.norm", "residual", "final", kind="layer"),
            Linear("lm_head", "final", "logits"),
        ),
        rope="interleaved",
        refuse=_refuse,
        examples={
            "cohere": example("CohereConfig", tie_word_embeddings=True),
            "cohere2": example("Cohere2Config", sliding_window=8, tie_word_embeddings=True, num_hidden_layers=4),
        },
    )
)
