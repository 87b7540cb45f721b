"""A mixture of experts whose experts are a list of modules: the tiny stacked one, taken apart."""

from __future__ import annotations

import tiny_models
import torch
from torch import nn
from transformers import PreTrainedModel


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


def build(name: str = "qwen3_moe") -> PreTrainedModel:
    """The tiny model of that name with its experts listed."""
    model = tiny_models.build(name)
    for layer in model.model.layers:
        old = layer.mlp.experts
        layer.mlp.experts = _Experts(
            _Expert(old.gate_up_proj[e].data, old.down_proj[e].data, old.act_fn) for e in range(4)
        )
    return model
