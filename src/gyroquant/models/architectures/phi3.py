"""Phi-3: queries, keys and values in one weight, gate and up in another."""

from gyroquant.models.architectures.llama import MLP_NORM, OUTER
from gyroquant.models.graph.spec import Architecture, Linear, Norm, example, register

register(
    Architecture(
        name="phi3",
        model_types=("phi3",),
        blocks="model.layers",
        block=(
            Norm("input_layernorm", "residual", "attn_in"),
            Linear("self_attn.qkv_proj", "attn_in", ("q", "k", "v")),
            Linear("self_attn.o_proj", "attn_out", "residual"),
            *MLP_NORM,
            Linear("mlp.gate_up_proj", "mlp_in", ("gate", "up")),
            Linear("mlp.down_proj", "act", "residual"),
        ),
        outer=OUTER,
        rope="half",
        examples={"phi3": example("Phi3Config")},
    )
)
