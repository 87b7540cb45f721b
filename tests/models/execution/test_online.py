"""Online operations in stacked experts of all kinds, and what is left when one cannot be attached."""

from __future__ import annotations

import pytest
import torch

from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import Identity
from gyroquant.models.deriving.tiny import default_config, tiny_model, tiny_tokens
from gyroquant.models.execution.online import OnlineMap, attach, attached
from gyroquant.models.graph.sites import HookPoint


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "qwen3_moe", "aria_text"])
def test_experts_of_all_kinds_run_one_after_another(model_type: str) -> None:
    """With biases and interleaved, without a gate, transposed: the same numbers as transformers' own function."""
    model = tiny_model(default_config(model_type))
    ids = tiny_tokens(model)
    modules = [name for name, module in model.named_modules() if hasattr(module, "_apply_gate")]
    assert modules
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        with attached(model, [OnlineMap(HookPoint("experts_in", name), Identity(64)) for name in modules]):
            logits = model(input_ids=ids, use_cache=False).logits
    assert float((logits - expected).norm() / expected.norm()) < 1e-5


def test_nothing_stays_attached_when_one_operation_fails() -> None:
    model = tiny_model(default_config("llama"))
    first = OnlineMap(HookPoint("input", "model.layers.0.mlp.down_proj"), Identity(96))
    second = OnlineMap(HookPoint("experts_in", "model.layers.0.mlp"), Identity(64))
    with pytest.raises(UnsupportedModelError, match="LlamaMLP"):
        attach(model, [first, second])
    assert not model.model.layers[0].mlp.down_proj._forward_pre_hooks
