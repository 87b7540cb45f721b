"""Maps that run with the model: where a nonlinearity stands between two linear layers, or nothing stands to fold into.

An online map is attached to modules of a transformers model as a forward hook, inside its attention function (R3) or
inside the function that runs its stacked experts. Nothing of the modules' code is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gyroquant.errors import UnsupportedModelError
from gyroquant.maps import Map
from gyroquant.models.sites import Insertion

_ATTENTION = "gyroquant_"
_EXPERTS = "gyroquant"


@dataclass(frozen=True)
class OnlineMap:
    """A map and the place where it runs."""

    insertion: Insertion
    map: Map


def run_map(m: Map, x: Tensor) -> Tensor:
    """``x @ M`` along the last dimension; 16-bit activations are transformed in fp32 and rounded once."""
    return m.apply(x.float()).to(x.dtype) if x.dtype in (torch.float16, torch.bfloat16) else m.apply(x)


def _attention(base: str) -> Callable[..., Any]:
    """An attention function that rotates queries and keys, then calls the `base` implementation of the model."""

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        m = module.__dict__.get("_gyroquant_qk")
        if m is not None:
            query, key = run_map(m, query), run_map(m, key)
        if base == "eager":
            inner = sys.modules[type(module).__module__].eager_attention_forward
        else:
            inner = ALL_ATTENTION_FUNCTIONS[base]
        return inner(module, query, key, value, *args, **kwargs)

    return forward


def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Stacked experts one after another, with maps in front of either projection and an observer of their inputs.

    `hidden` has shape (tokens, hidden), the other two (tokens, top_k), as transformers passes them. An observer is a
    function of the parameter's name, the expert and its input, shape (tokens of this expert, features).
    """
    if not module.has_gate or module.has_bias or not module.is_concatenated:
        raise UnsupportedModelError(f"{type(module).__name__} has experts of a layout that is not described")
    maps = module.__dict__.get("_gyroquant_maps", {})
    observe = module.__dict__.get("_gyroquant_observe")
    out = torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        token, position = torch.where(top_k_index == expert)
        if token.numel() == 0:
            continue
        x = hidden[token]
        for name, point in (("gate_up_proj", "experts_in"), ("down_proj", "experts_act")):
            if point in maps:
                x = run_map(maps[point], x)
            if observe is not None:
                observe(name, expert, x)
            weight = getattr(module, name)[expert]
            x = x @ weight if module.is_transposed else nn.functional.linear(x, weight)
            if name == "gate_up_proj":
                x = module._apply_gate(x)
        out.index_add_(0, token, (x * top_k_weights[token, position, None]).to(out.dtype))
    return out


for _base in ("sdpa", "eager"):
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION + _base, _attention(_base))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])
ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, experts_forward)


class _Input:
    """A forward pre-hook; a class so that models with online maps can be copied."""

    def __init__(self, m: Map):
        self.map = m

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (run_map(self.map, args[0]), *args[1:])


class _Output:
    def __init__(self, m: Map):
        self.map = m

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return run_map(self.map, output)


def route_attention(module: Any) -> Callable[[], None]:
    """Sends the attention of the model that `module` belongs to through `_attention`; returns what undoes it."""
    config = module.config
    before = config._attn_implementation
    if before.startswith(_ATTENTION):
        return lambda: None
    if _ATTENTION + before not in ALL_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"R3 needs the attention implementation 'sdpa' or 'eager', not {before!r}; load the model with one of them"
        )
    config._attn_implementation_internal = _ATTENTION + before

    def undo() -> None:
        config._attn_implementation_internal = before

    return undo


def route_experts(module: Any) -> Callable[[], None]:
    """Sends stacked experts through `experts_forward`; returns what undoes it."""
    if not hasattr(module, "_apply_gate"):
        raise UnsupportedModelError(f"{type(module).__name__} cannot run its experts through another function")
    config = module.config
    before = config._experts_implementation_internal
    config._experts_implementation_internal = _EXPERTS

    def undo() -> None:
        config._experts_implementation_internal = before

    return undo


def _attach_one(model: nn.Module, online: OnlineMap) -> list[Callable[[], None]]:
    point, module = online.insertion.point, model.get_submodule(online.insertion.module)
    if point == "input":
        return [module.register_forward_pre_hook(_Input(online.map)).remove]
    if point == "output":
        return [module.register_forward_hook(_Output(online.map)).remove]
    if point == "qk":
        module.__dict__["_gyroquant_qk"] = online.map
        return [route_attention(module), lambda: module.__dict__.pop("_gyroquant_qk", None)]
    maps = module.__dict__.setdefault("_gyroquant_maps", {})
    maps[point] = online.map
    return [route_experts(module), lambda: maps.pop(point, None)]


def attach(model: nn.Module, online: Iterable[OnlineMap]) -> Callable[[], None]:
    """Attaches online maps to the modules of `model`, for good or until the function that it returns is called."""
    undo: list[Callable[[], None]] = []
    for one in online:
        undo += _attach_one(model, one)

    def detach() -> None:
        for step in reversed(undo):
            step()

    return detach


@contextmanager
def attached(model: nn.Module, online: Iterable[OnlineMap]) -> Iterator[None]:
    """Online maps attached to `model` for the duration of a with block."""
    detach = attach(model, online)
    try:
        yield
    finally:
        detach()
