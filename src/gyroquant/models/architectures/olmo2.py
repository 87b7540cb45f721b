"""OLMo-2, OLMo-3, EXAONE 4: linear layers read the residual stream as it is, norms stand behind attention and MLP.

Query and key norms run over all heads at once (OLMo) or over each head (EXAONE).
"""

from gyroquant.models.architectures.llama import OUTER
from gyroquant.models.spec import Architecture, Linear, Norm, register

register(
    Architecture(
        name="olmo2",
        model_types=("olmo2", "olmo3", "exaone4"),
        blocks="model.layers",
        block=(
            Linear("self_attn.q_proj", "residual", "q"),
            Linear("self_attn.k_proj", "residual", "k"),
            Linear("self_attn.v_proj", "residual", "v"),
            Norm("self_attn.q_norm", "q", "q"),
            Norm("self_attn.k_norm", "k", "k"),
            Linear("self_attn.o_proj", "attn_out", "attn_post"),
            Norm("post_attention_layernorm", "attn_post", "residual"),
            Linear("mlp.gate_proj", "residual", "gate"),
            Linear("mlp.up_proj", "residual", "up"),
            Linear("mlp.down_proj", "act", "mlp_post"),
            Norm("post_feedforward_layernorm", "mlp_post", "residual"),
        ),
        outer=OUTER,
        rope="half",
    )
)
