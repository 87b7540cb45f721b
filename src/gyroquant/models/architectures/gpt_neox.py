"""GPT-NeoX and Pythia: LayerNorm with bias, RoPE on a part of each head; one weight has q, k and v, head by head."""

from gyroquant.models.graph.spec import Architecture, Embedding, Linear, Norm, example, register

register(
    Architecture(
        name="gpt_neox",
        model_types=("gpt_neox",),
        blocks="gpt_neox.layers",
        block=(
            Norm("input_layernorm", "residual", "attn_in", kind="layer"),
            Linear("attention.query_key_value", "attn_in", ("q", "k", "v"), per_head=True),
            Linear("attention.dense", "attn_out", "residual"),
            Norm("post_attention_layernorm", "residual", "mlp_in", kind="layer"),
            Linear("mlp.dense_h_to_4h", "mlp_in", "up"),
            Linear("mlp.dense_4h_to_h", "act", "residual"),
        ),
        outer=(
            Embedding("gpt_neox.embed_in"),
            Norm("gpt_neox.final_layer_norm", "residual", "final", kind="layer"),
            Linear("lm_head", "final", "logits"),
        ),
        rope="half",
        examples={
            "gpt_neox": example("GPTNeoXConfig", without=("num_key_value_heads",)),
            "gpt_neox_serial": example("GPTNeoXConfig", without=("num_key_value_heads",), use_parallel_residual=False),
        },
    )
)
