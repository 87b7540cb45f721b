"""Experts as a list of modules fold like stacked ones; the model is a real one with its experts taken apart."""

import tiny
import torch
from torch import nn

from gyroquant import maps
from gyroquant.models.fold import FoldPlan
from gyroquant.models.prove import prove
from gyroquant.models.runner import BlockRunner
from gyroquant.models.sites import find_sites
from gyroquant.models.source import open_model


class _Expert(nn.Module):
    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act: nn.Module):
        super().__init__()
        gate, up = gate_up.chunk(2)
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.clone())
            setattr(self, name, linear)
        self.act = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class _Experts(nn.ModuleList):
    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            token, position = torch.where(index == number)
            out.index_add_(0, token, expert(hidden[token]) * weights[token, position, None])
        return out


def test_listed_experts_fold_exactly() -> None:
    model = tiny.build("qwen3_moe")
    ids = tiny.tokens(model)
    before = model(ids).logits
    for layer in model.model.layers:
        old = layer.mlp.experts
        layer.mlp.experts = _Experts(
            _Expert(old.gate_up_proj[e].data, old.down_proj[e].data, old.act_fn) for e in range(4)
        )
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    store = open_model(model)
    plan = FoldPlan(store.graph)
    for name in ("R1", "R2", "R4"):
        for site in find_sites(store.graph, name):
            plan.add(site, maps.hadamard(site.n))
    assert len(plan.online) == 8
    prove(store, plan, BlockRunner(model, store.graph), ids, 5e-6)
