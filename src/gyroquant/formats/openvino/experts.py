"""Stacked experts without a loop: every expert runs on all tokens, and the router's weights, zero for experts that a
token does not use, mix the results. A trace cannot hold the loops of transformers, whose length depends on the tokens.

OpenVINO's plugins recognize this form if gate and up are products of their own, and then run the chosen experts only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from gyroquant.models.execution.online import run_map

_NAME = "gyroquant_all"
_PRODUCTS = "gyroquant_products"


class Product(nn.Module):
    """``x @ W.T`` for all experts, x of shape (experts, tokens, inputs).

    parameter: the name of the parameter.
    part: which part of the outputs, and the number of equal parts, such as (1, 2) for up in gate and up.
    """

    def __init__(self, owner: Any, parameter: str, part: tuple[int, int]):
        super().__init__()
        self.__dict__["_owner"] = owner  # not a submodule of its own submodule
        self.parameter, self.part = parameter, part
        shape = getattr(owner, parameter).shape
        self.experts, self.outputs = int(shape[0]), int(shape[2 if owner.is_transposed else 1]) // part[1]

    def forward(self, x: Tensor) -> Tensor:
        owner = self.__dict__["_owner"]
        weight = getattr(owner, self.parameter)
        columns = weight if owner.is_transposed else weight.transpose(1, 2)
        return torch.matmul(x, columns.chunk(self.part[1], dim=2)[self.part[0]])


def run_all_experts(model: nn.Module) -> dict[str, list[Product]]:
    """Changes a model so that its stacked experts run without a loop. Returns their products by the name of the
    parameter. Experts with other code than that of transformers' `use_experts_implementation` stay as they are.
    """
    found: dict[str, list[Product]] = {}
    for path, module in list(model.named_modules()):
        if not hasattr(module, "_apply_gate"):
            continue
        first = "gate_up_proj" if module.has_gate else "up_proj"
        parts = 2 if _plain_gate(module) else 1
        products = [Product(module, first, (part, parts)) for part in range(parts)]
        products.append(Product(module, "down_proj", (0, 1)))
        module.add_module(_PRODUCTS, nn.ModuleList(products))
        config: Any = module.config
        config._experts_implementation_internal = _NAME
        for product in products:
            found.setdefault(f"{path}.{product.parameter}", []).append(product)
    return found


def _plain_gate(module: Any) -> bool:
    """Whether the experts compute ``act(gate) * up`` from gate and up after each other, without biases."""
    usual = type(module)._apply_gate is _default_apply_gate and module.is_concatenated
    return bool(usual and module.has_gate and not module.has_bias)


def _all_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The mixture of the experts' outputs for each token, with the arguments that transformers passes."""
    *firsts, last = getattr(module, _PRODUCTS)
    maps = module.__dict__.get("_gyroquant_maps", {})
    x = hidden.reshape(-1, hidden.shape[-1])
    x = x.repeat(last.experts, 1).reshape(last.experts, -1, hidden.shape[-1])
    if "experts_in" in maps:
        x = run_map(maps["experts_in"], x)
    if len(firsts) == 2:
        gate, up = (product(x) for product in firsts)
        x = module.act_fn(gate) * up
    else:
        x = _with_bias(module, firsts[0], firsts[0](x))
        flat = x.reshape(-1, x.shape[-1])
        flat = module._apply_gate(flat) if module.has_gate else module.act_fn(flat)
        x = flat.reshape(last.experts, -1, flat.shape[-1])
    if "experts_act" in maps:
        x = run_map(maps["experts_act"], x)
    x = _with_bias(module, last, last(x))
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    shares = torch.zeros(top_k_weights.shape[0], last.experts, dtype=top_k_weights.dtype)
    shares = shares.scatter(1, top_k_index, top_k_weights).transpose(0, 1).reshape(last.experts, -1)[..., None]
    x = x.reshape(last.experts, -1, last.outputs)
    return (x * shares).sum(0).to(hidden.dtype)


def _with_bias(module: Any, product: Product, x: Tensor) -> Tensor:
    return x + getattr(module, f"{product.parameter}_bias")[:, None] if module.has_bias else x


ALL_EXPERTS_FUNCTIONS.register(_NAME, _all_experts)
