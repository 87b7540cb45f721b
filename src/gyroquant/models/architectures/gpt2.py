"""GPT-2: Conv1D weights stored as (in, out), LayerNorm with bias, learned positions, a tied head."""

from typing import Any

from gyroquant.models.graph.spec import Architecture, Embedding, Linear, Norm, example, register


def _refuse(config: Any) -> str | None:
    return "its cross-attention (add_cross_attention) is not supported" if config.add_cross_attention else None


register(
    Architecture(
        name="gpt2",
        model_types=("gpt2",),
        blocks="transformer.h",
        block=(
            Norm("ln_1", "residual", "attn_in", kind="layer"),
            Linear("attn.c_attn", "attn_in", ("q", "k", "v"), transposed=True),
            Linear("attn.c_proj", "attn_out", "residual", transposed=True),
            Norm("ln_2", "residual", "mlp_in", kind="layer"),
            Linear("mlp.c_fc", "mlp_in", "up", transposed=True),
            Linear("mlp.c_proj", "act", "residual", transposed=True),
        ),
        outer=(
            Embedding("transformer.wte"),
            Embedding("transformer.wpe"),
            Norm("transformer.ln_f", "residual", "final", kind="layer"),
            Linear("lm_head", "final", "logits"),
        ),
        rope="none",
        refuse=_refuse,
        examples={
            "gpt2": example(
                "GPT2Config", without=("num_key_value_heads", "intermediate_size"), tie_word_embeddings=True
            )
        },
    )
)
