"""GLM-4: gate and up in one weight, RoPE on neighbours in half of each head; GLM-4-0414 has norms behind attention and
feed-forward too.
"""

from gyroquant.models.architectures.llama import MLP_NORM, OUTER, QKV
from gyroquant.models.spec import Architecture, Linear, Norm, Part, register

_GATE_UP = Linear("mlp.gate_up_proj", "mlp_in", ("gate", "up"))


def _register(name: str, attention: tuple[Part, ...], mlp: tuple[Part, ...]) -> None:
    block = (*QKV, *attention, *MLP_NORM, _GATE_UP, *mlp)
    register(Architecture(name, (name,), blocks="model.layers", block=block, outer=OUTER, rope="interleaved"))


_register("glm", (Linear("self_attn.o_proj", "attn_out", "residual"),), (Linear("mlp.down_proj", "act", "residual"),))
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
)
