"""Gemma 2 and Gemma 3 (text): norms before and after attention, and before and after the feed-forward network.

Gains are stored minus one. The norms after attention and feed-forward write to the residual stream, so R1 cannot be
fused. The embedding is scaled by a constant and tied to the head.
"""

from gyroquant.models.graph.spec import Architecture, Embedding, Linear, Norm, example, register

register(
    Architecture(
        name="gemma",
        model_types=("gemma2", "gemma3_text"),
        blocks="model.layers",
        block=(
            Norm("input_layernorm", "residual", "attn_in", offset=1.0),
            Linear("self_attn.q_proj", "attn_in", "q"),
            Linear("self_attn.k_proj", "attn_in", "k"),
            Linear("self_attn.v_proj", "attn_in", "v"),
            Norm("self_attn.q_norm", "q", "q", offset=1.0, optional=True),
            Norm("self_attn.k_norm", "k", "k", offset=1.0, optional=True),
            Linear("self_attn.o_proj", "attn_out", "attn_post"),
            Norm("post_attention_layernorm", "attn_post", "residual", offset=1.0),
            Norm("pre_feedforward_layernorm", "residual", "mlp_in", offset=1.0),
            Linear("mlp.gate_proj", "mlp_in", "gate"),
            Linear("mlp.up_proj", "mlp_in", "up"),
            Linear("mlp.down_proj", "act", "mlp_post"),
            Norm("post_feedforward_layernorm", "mlp_post", "residual", offset=1.0),
        ),
        outer=(
            Embedding("model.embed_tokens"),
            Norm("model.norm", "residual", "final", offset=1.0),
            Linear("lm_head", "final", "logits"),
        ),
        rope="half",
        examples={
            name: example(config, head_dim=32, query_pre_attn_scalar=32, sliding_window=8, tie_word_embeddings=True)
            for name, config in (("gemma2", "Gemma2Config"), ("gemma3", "Gemma3TextConfig"))
        },
    )
)
