"""OLMo-2, OLMo-3, EXAONE 4: linear layers read the residual stream directly, with norms after attention and MLP.

Query and key norms normalize all heads together (OLMo) or each head (EXAONE).
"""

from gyroquant.models.architectures.llama import OUTER
from gyroquant.models.graph.spec import Architecture, Linear, Norm, example, register

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
        examples={
            "olmo2": example("Olmo2Config"),
            "olmo3": example("Olmo3Config", sliding_window=8, num_hidden_layers=4),
            "exaone4": example("Exaone4Config", head_dim=16, sliding_window=8, num_hidden_layers=4),
        },
    )
)
