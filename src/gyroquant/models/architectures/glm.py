"""GLM-4: gate and up in one weight, RoPE on neighbours in half of each head; GLM-4-0414 has norms behind attention and
feed-forward too.
"""

from gyroquant.models.architectures.llama import MLP_NORM, OUTER
from gyroquant.models.spec import Architecture, Linear, Norm, register

_ATTENTION = (
    Norm("input_layernorm", "residual", "attn_in"),
    Linear("self_attn.q_proj", "attn_in", "q"),
    Linear("self_attn.k_proj", "attn_in", "k"),
    Linear("self_attn.v_proj", "attn_in", "v"),
)
_GATE_UP = Linear("mlp.gate_up_proj", "mlp_in", ("gate", "up"))

register(
    Architecture(
        name="glm",
        model_types=("glm",),
        blocks="model.layers",
        block=(
            *_ATTENTION,
            Linear("self_attn.o_proj", "attn_out", "residual"),
            *MLP_NORM,
            _GATE_UP,
            Linear("mlp.down_proj", "act", "residual"),
        ),
        outer=OUTER,
        rope="interleaved",
    )
)
register(
    Architecture(
        name="glm4",
        model_types=("glm4",),
        blocks="model.layers",
        block=(
            *_ATTENTION,
            Linear("self_attn.o_proj", "attn_out", "attn_post"),
            Norm("post_self_attn_layernorm", "attn_post", "residual"),
            *MLP_NORM,
            _GATE_UP,
            Linear("mlp.down_proj", "act", "mlp_post"),
            Norm("post_mlp_layernorm", "mlp_post", "residual"),
        ),
        outer=OUTER,
        rope="interleaved",
    )
)
