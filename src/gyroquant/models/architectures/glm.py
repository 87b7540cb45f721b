"""GLM-4: gate and up in one weight, RoPE on neighbours in half of each head.

GLM-4-0414 also has norms after attention and feed-forward.
"""

from gyroquant.models.architectures.llama import MLP_NORM, OUTER, QKV
from gyroquant.models.graph.spec import Architecture, Example, Linear, Norm, Part, example, register

_GATE_UP = Linear("mlp.gate_up_proj", "mlp_in", ("gate", "up"))


def _register(name: str, attention: tuple[Part, ...], mlp: tuple[Part, ...], tiny: Example) -> None:
    block = (*QKV, *attention, *MLP_NORM, _GATE_UP, *mlp)
    register(Architecture(name, (name,), "model.layers", block, OUTER, "interleaved", examples={name: tiny}))


_register(
    "glm",
    (Linear("self_attn.o_proj", "attn_out", "residual"),),
    (Linear("mlp.down_proj", "act", "residual"),),
    example("GlmConfig", head_dim=16),
)
_register(
    "glm4",
    (
        Linear("self_attn.o_proj", "attn_out", "attn_post"),
        Norm("post_self_attn_layernorm", "attn_post", "residual"),
    ),
    (
        Linear("mlp.down_proj", "act", "mlp_post"),
        Norm("post_mlp_layernorm", "mlp_post", "residual"),
    ),
    example("Glm4Config", head_dim=16),
)
