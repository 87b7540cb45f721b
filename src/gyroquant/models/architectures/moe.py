"""Mixtures of experts on Llama's layout: Mixtral, Qwen2-MoE (shared expert and its gate), Qwen3-MoE, OLMoE.

Experts are stacked in 3-D parameters, or are separate modules. Some layers of the Qwen families are dense.
"""

from typing import Any

from gyroquant.models.architectures.llama import ATTENTION, MLP, MLP_NORM, OUTER
from gyroquant.models.graph.spec import Architecture, Linear, example, register

_STACKED = (
    Linear("mlp.experts.gate_up_proj", "mlp_in", ("experts.gate", "experts.up"), stacked=True),
    Linear("mlp.experts.down_proj", "experts.act", "residual", stacked=True),
)
_LISTED = (
    Linear("mlp.experts.{e}.gate_proj", "mlp_in", "expert{e}.gate"),
    Linear("mlp.experts.{e}.up_proj", "mlp_in", "expert{e}.up"),
    Linear("mlp.experts.{e}.down_proj", "expert{e}.act", "residual"),
)
_ROUTER = (Linear("mlp.gate", "mlp_in", "fixed", quantize=False),)
_SHARED = (
    Linear("mlp.shared_expert.gate_proj", "mlp_in", "shared.gate"),
    Linear("mlp.shared_expert.up_proj", "mlp_in", "shared.up"),
    Linear("mlp.shared_expert.down_proj", "shared.act", "residual"),
    Linear("mlp.shared_expert_gate", "mlp_in", "fixed", quantize=False),
)


def _refuse(config: Any) -> str | None:
    if getattr(config, "clip_qkv", None) is not None:
        return "it clips queries, keys and values (clip_qkv), and no change of their basis can pass that"
    return None


register(
    Architecture(
        name="moe",
        model_types=("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"),
        blocks="model.layers",
        block=(
            *ATTENTION,
            *MLP_NORM,
            (
                (*_ROUTER, *_STACKED, *_SHARED),
                (*_ROUTER, *_LISTED, *_SHARED),
                (*_ROUTER, *_STACKED),
                (*_ROUTER, *_LISTED),
                MLP,
            ),
        ),
        outer=OUTER,
        rope="half",
        refuse=_refuse,
        examples={
            "qwen2_moe": example(
                "Qwen2MoeConfig",
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=48,
                shared_expert_intermediate_size=80,
                mlp_only_layers=[1],
            ),
            "qwen3_moe": example(
                "Qwen3MoeConfig", head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
            ),
            "mixtral": example("MixtralConfig", num_local_experts=4, num_experts_per_tok=2),
            "olmoe": example("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
        },
    )
)
