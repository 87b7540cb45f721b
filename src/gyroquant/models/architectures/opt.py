"""OPT: LayerNorm with bias, learned positions, a tied head. Not its 350M variant, whose norms stand in the stream."""

from typing import Any

from gyroquant.models.spec import Architecture, Embedding, Linear, Norm, register


def _refuse(config: Any) -> str | None:
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        return "its norms stand inside the residual stream (do_layer_norm_before=False), so no basis of it can change"
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embeddings are projected (word_embed_proj_dim differs from hidden_size)"
    if not config.layer_norm_elementwise_affine:
        return "its norms have no gain (layer_norm_elementwise_affine=False)"
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
    )
)
