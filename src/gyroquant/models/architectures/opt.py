"""OPT: LayerNorm with bias, learned positions, a tied head. OPT-350M is not supported: its norms are in the stream."""

from typing import Any

from gyroquant.models.graph.spec import Architecture, Embedding, Linear, Norm, example, register


def _refuse(config: Any) -> str | None:
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        return "its norms are inside the residual stream (do_layer_norm_before=False), so its basis cannot change"
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embeddings are projected (word_embed_proj_dim differs from hidden_size), which is not supported"
    if not config.layer_norm_elementwise_affine:
        return "its norms do not have a gain (layer_norm_elementwise_affine=False), which is not supported"
    return None


register(
    Architecture(
        name="opt",
        model_types=("opt",),
        blocks="model.decoder.layers",
        block=(
            Norm("self_attn_layer_norm", "residual", "attn_in", kind="layer"),
            Linear("self_attn.q_proj", "attn_in", "q"),
            Linear("self_attn.k_proj", "attn_in", "k"),
            Linear("self_attn.v_proj", "attn_in", "v"),
            Linear("self_attn.out_proj", "attn_out", "residual"),
            Norm("final_layer_norm", "residual", "mlp_in", kind="layer"),
            Linear("fc1", "mlp_in", "up"),
            Linear("fc2", "act", "residual"),
        ),
        outer=(
            Embedding("model.decoder.embed_tokens"),
            Embedding("model.decoder.embed_positions"),
            Norm("model.decoder.final_layer_norm", "residual", "final", kind="layer"),
            Linear("lm_head", "final", "logits"),
        ),
        rope="none",
        refuse=_refuse,
        examples={
            "opt": example(
                "OPTConfig",
                without=("intermediate_size", "num_key_value_heads"),
                ffn_dim=96,
                word_embed_proj_dim=64,
                tie_word_embeddings=True,
            )
        },
    )
)
