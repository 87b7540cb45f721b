"""Llama's layout with LayerNorms and without a gate: StarCoder2 and Nemotron. Nemotron stores gains minus one."""

from gyroquant.models.architectures.llama import UNGATED_MLP
from gyroquant.models.graph.spec import Architecture, Embedding, Linear, Norm, Part, example, register


def _block(offset: float, mlp: tuple[Part, ...]) -> tuple[Part, ...]:
    return (
        Norm("input_layernorm", "residual", "attn_in", kind="layer", offset=offset),
        Linear("self_attn.q_proj", "attn_in", "q"),
        Linear("self_attn.k_proj", "attn_in", "k"),
        Linear("self_attn.v_proj", "attn_in", "v"),
        Linear("self_attn.o_proj", "attn_out", "residual"),
        Norm("post_attention_layernorm", "residual", "mlp_in", kind="layer", offset=offset),
        *mlp,
    )


def _outer(offset: float) -> tuple[Part, ...]:
    return (
        Embedding("model.embed_tokens"),
        Norm("model.norm", "residual", "final", kind="layer", offset=offset),
        Linear("lm_head", "final", "logits"),
    )


register(
    Architecture(
        name="starcoder2",
        model_types=("starcoder2",),
        blocks="model.layers",
        block=_block(0.0, (Linear("mlp.c_fc", "mlp_in", "up"), Linear("mlp.c_proj", "act", "residual"))),
        outer=_outer(0.0),
        rope="half",
        examples={"starcoder2": example("Starcoder2Config", tie_word_embeddings=True)},
    )
)
register(
    Architecture(
        name="nemotron",
        model_types=("nemotron",),
        blocks="model.layers",
        block=_block(1.0, UNGATED_MLP),
        outer=_outer(1.0),
        rope="half",
        examples={"nemotron": example("NemotronConfig", head_dim=16)},
    )
)
