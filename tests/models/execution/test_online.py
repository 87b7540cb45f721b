"""Online operations in stacked experts of all kinds, and what is left when one cannot be attached."""

from __future__ import annotations

import pytest
import torch

from gyroquant.calibration.observers import SecondMoments, observing
from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import Identity
from gyroquant.models.deriving.tiny import default_config, tiny_model, tiny_tokens
from gyroquant.models.execution.online import OnlineMap, attach, attached
from gyroquant.models.execution.switches import all_experts
from gyroquant.models.graph.sites import HookPoint
from gyroquant.models.stores.base import ModuleStore


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


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_every_expert_can_see_every_token(model_type: str) -> None:
    model = tiny_model(default_config(model_type))
    ids = tiny_tokens(model)
    store = ModuleStore(model)
    counts, logits = {}, {}
    for every in (False, True):
        group = store.graph.blocks[0]
        with all_experts(every), observing(model, group, [], SecondMoments) as observed, torch.no_grad():
            logits[every] = model(input_ids=ids, use_cache=False).logits
        counts[every] = [moments.count for (name, _), moments in observed.items() if "experts" in name]
    assert torch.allclose(logits[True], logits[False], atol=1e-5)
    assert min(counts[False]) < ids.numel()
    experts = model.config.num_local_experts
    assert counts[True] == [ids.numel()] * 2 * experts
