"""A small decoder that transformers does not have: odd names, sandwich norms, a gate on attention, shared experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast


class CustomConfig(PreTrainedConfig):
    model_type = "odd_decoder"

    def __init__(
        self,
        vocab_size: int = 96,
        hidden_size: int = 64,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        num_experts: int = 3,
        sandwich: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads, self.num_experts, self.sandwich = num_attention_heads, num_experts, sandwich
        super().__init__(**kwargs)


def custom_config(**values: Any) -> CustomConfig:
    return CustomConfig(**values)


class ScaleNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Expert(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.door, self.lift, self.land = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.land(nn.functional.silu(self.door(x)) * self.lift(x))
        return out


class CustomBlock(nn.Module):
    """Attention with a gate, then experts of which each token takes all, by weight, and one that all tokens share."""

    def __init__(self, config: CustomConfig) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.first, self.second = ScaleNorm(width), ScaleNorm(width)
        self.after = ScaleNorm(width) if config.sandwich else nn.Identity()
        self.last = ScaleNorm(width) if config.sandwich else nn.Identity()
        self.ask, self.key, self.tell = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.valve, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.router = nn.Linear(width, config.num_experts, bias=False)
        self.experts = nn.ModuleList(Expert(width) for _ in range(config.num_experts))
        self.common = Expert(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.ask, self.key, self.tell)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.after(self.out(mixed * self.valve(h).sigmoid()))
        h = self.second(x)
        weights = self.router(h).softmax(-1)
        routed = sum(weights[..., i : i + 1] * expert(h) for i, expert in enumerate(self.experts))
        return x + self.last(routed + self.common(h))


class CustomBackbone(nn.Module):
    def __init__(self, config: CustomConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(CustomBlock(config) for _ in range(config.num_hidden_layers))
        self.final = ScaleNorm(config.hidden_size)


class CustomModel(PreTrainedModel):
    config_class = CustomConfig
    base_model_prefix = "body"

    def __init__(self, config: CustomConfig) -> None:
        super().__init__(config)
        self.body = CustomBackbone(config)
        self.speak = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.body.words

    def get_output_embeddings(self) -> nn.Module:
        return self.speak

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        x = self.body.words(input_ids)
        for block in self.body.stack:
            x = block(x)
        return CausalLMOutputWithPast(logits=self.speak(self.body.final(x)))
