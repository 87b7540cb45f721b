"""What runs with the model: maps where a nonlinearity leaves nothing to fold into, and rounding of what flows.

Each is attached to a module of a transformers model as a forward hook, inside its attention function (R3, the cache)
or inside the function that runs its stacked experts. Nothing of the modules' code is replaced. On one input, maps run
before rounding.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gyroquant.errors import UnsupportedModelError
from gyroquant.grids import Grid
from gyroquant.maps import Map
from gyroquant.models.sites import Insertion

_ATTENTION = "gyroquant_"
_EXPERTS = "gyroquant"


@dataclass(frozen=True)
class _Inserted:
    insertion: Insertion

    @property
    def module(self) -> str:
        return self.insertion.module


@dataclass(frozen=True)
class OnlineMap(_Inserted):
    """A map and the place where it runs."""

    map: Map


@dataclass(frozen=True)
class InputQuantizer(_Inserted):
    """Rounds what enters a linear layer, with scales found anew for every token: dynamic activation quantization."""

    grid: Grid


@dataclass(frozen=True)
class CacheQuantizer:
    """Rounds the keys and values of an attention module, per token and head, as a quantized KV cache does.

    Keys are rounded after RoPE and R3. `key_mean`, shape (kv heads, head_dim), is taken from the keys before they are
    rounded and added again afterwards. It is a mean over positions, which is why it must be taken after RoPE: an offset
    of the keys before RoPE turns into another one at every position.
    """

    module: str
    keys: Grid
    values: Grid
    key_mean: Tensor | None = None

    def round_keys(self, keys: Tensor) -> Tensor:
        """Keys of shape (batch, kv heads, length, head_dim), rounded."""
        if self.key_mean is None:
            return fake(self.keys, keys)
        mean = self.key_mean[:, None].to(keys)
        return fake(self.keys, keys - mean) + mean


Attachment = OnlineMap | InputQuantizer | CacheQuantizer


def run_map(m: Map, x: Tensor) -> Tensor:
    """``x @ M`` along the last dimension; 16-bit activations are transformed in fp32 and rounded once."""
    return m.apply(x.float()).to(x.dtype) if x.dtype in (torch.float16, torch.bfloat16) else m.apply(x)


class _Switch:
    rounding = True
    growing = False


@contextmanager
def _switched(name: str, value: bool) -> Iterator[None]:
    before = getattr(_Switch, name)
    setattr(_Switch, name, value)
    try:
        yield
    finally:
        setattr(_Switch, name, before)


def unrounded() -> AbstractContextManager[None]:
    """Nothing that flows is rounded for the duration of a with block, whatever is attached."""
    return _switched("rounding", False)


def growing_noise(on: bool) -> AbstractContextManager[None]:
    """What rounding means for gradients within a with block, see `fake`."""
    return _switched("growing", on)


def fake(grid: Grid, x: Tensor) -> Tensor:
    """`x` as the grid would hold it.

    Gradients pass straight through, or, within `growing_noise`, as through the addition of noise whose size goes with
    the span of each group: rounding errors are made of steps, and steps of spans.
    """
    if not _Switch.rounding:
        return x
    if not x.requires_grad:
        return grid.fake(x)
    plain = x.detach()
    if not _Switch.growing:
        return x + (grid.fake(plain) - plain)
    groups = x.unflatten(-1, (-1, grid.group_of(x.shape[-1])))
    span = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    growth = 1 + (span - span.detach()) / span.detach().clamp_min(torch.finfo(x.dtype).tiny)
    return x + ((grid.fake(plain) - plain).view(groups.shape) * growth).view(x.shape)


@dataclass
class AttentionState:
    """What an attention module does to its queries, keys and values after RoPE."""

    map: Map | None = None
    cache: CacheQuantizer | None = None
    observe: Callable[[Tensor], None] | None = None

    def keys(self, keys: Tensor) -> Tensor:
        """Keys as they enter the cache, but for rounding."""
        return keys if self.map is None else run_map(self.map, keys)


_READY = "_gyroquant_ready"  # set on keys that a packed cache has rotated and rounded already


def _attention(base: str) -> Callable[..., Any]:
    """An attention function that rotates and rounds, then calls the `base` implementation of the model."""

    def forward(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        state: AttentionState | None = module.__dict__.get("_gyroquant_attention")
        if state is not None:
            if state.map is not None:
                query = run_map(state.map, query)
            if not getattr(key, _READY, False):
                key = state.keys(key)
                if state.observe is not None:
                    state.observe(key)
                if state.cache is not None:
                    key, value = state.cache.round_keys(key), fake(state.cache.values, value)
        if base == "eager":
            inner = sys.modules[type(module).__module__].eager_attention_forward
        else:
            inner = ALL_ATTENTION_FUNCTIONS[base]
        return inner(module, query, key, value, *args, **kwargs)

    return forward


def mark_ready(keys: Tensor) -> Tensor:
    """Tells the attention function that these keys and their values need nothing done to them any more."""
    setattr(keys, _READY, True)
    return keys


def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Stacked experts one after another, with maps and rounding in front of either projection and an observer.

    `hidden` has shape (tokens, hidden), the other two (tokens, top_k), as transformers passes them. An observer is a
    function of the parameter's name, the expert and its input, shape (tokens of this expert, features).
    """
    if not module.has_gate or module.has_bias or not module.is_concatenated:
        raise UnsupportedModelError(f"{type(module).__name__} has experts of a layout that is not described")
    maps, grids = module.__dict__.get("_gyroquant_maps", {}), module.__dict__.get("_gyroquant_grids", {})
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
            if point in grids:
                x = fake(grids[point], x)
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


class _Rounded:
    """A forward pre-hook that rounds. Layers that read one tensor share what was rounded last (`memory`)."""

    def __init__(self, grid: Grid, memory: _Memory):
        self.grid, self.memory = grid, memory

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.memory.rounded(self.grid, args[0]), *args[1:])


@dataclass
class _Memory:
    seen: Callable[[], Tensor | None] = lambda: None
    version: int = -1
    grid: Grid | None = None
    result: Tensor | None = None

    def rounded(self, grid: Grid, x: Tensor) -> Tensor:
        if not _Switch.rounding:
            return x
        version = -1 if x.is_inference() else x._version  # inference tensors do not count their changes
        if self.seen() is not x or self.version != version or self.grid != grid or self.result is None:
            self.seen, self.version, self.grid, self.result = weakref.ref(x), version, grid, fake(grid, x)
        return self.result

    def __deepcopy__(self, memo: dict[int, Any]) -> _Memory:
        return _Memory()


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


def attention_state(module: nn.Module) -> AttentionState:
    """The state of an attention module, made when there is none."""
    state: AttentionState = module.__dict__.setdefault("_gyroquant_attention", AttentionState())
    return state


def _attach_attention(module: nn.Module, name: str, value: Any) -> list[Callable[[], None]]:
    setattr(attention_state(module), name, value)
    return [route_attention(module), lambda: setattr(attention_state(module), name, None)]


def _attach_experts(module: nn.Module, table: str, point: str, value: Any) -> list[Callable[[], None]]:
    entries = module.__dict__.setdefault(table, {})
    entries[point] = value
    return [route_experts(module), lambda: entries.pop(point, None)]


def _attach_one(model: nn.Module, one: Attachment, memory: _Memory) -> list[Callable[[], None]]:
    module = model.get_submodule(one.module)
    if isinstance(one, CacheQuantizer):
        return _attach_attention(module, "cache", one)
    point = one.insertion.point
    if isinstance(one, InputQuantizer):
        if point != "input":
            return _attach_experts(module, "_gyroquant_grids", point, one.grid)
        return [module.register_forward_pre_hook(_Rounded(one.grid, memory)).remove]
    if point == "input":
        return [module.register_forward_pre_hook(_Input(one.map)).remove]
    if point == "output":
        return [module.register_forward_hook(_Output(one.map)).remove]
    if point == "qk":
        return _attach_attention(module, "map", one.map)
    return _attach_experts(module, "_gyroquant_maps", point, one.map)


def attach(model: nn.Module, online: Iterable[Attachment]) -> Callable[[], None]:
    """Attaches what runs with the modules of `model`, for good or until the function that it returns is called."""
    undo: list[Callable[[], None]] = []
    memory = _Memory()
    for one in online:
        undo += _attach_one(model, one, memory)

    def detach() -> None:
        for step in reversed(undo):
            step()

    return detach


@contextmanager
def attached(model: nn.Module, online: Iterable[Attachment]) -> Iterator[None]:
    """What runs with the modules of `model`, attached for the duration of a with block."""
    detach = attach(model, online)
    try:
        yield
    finally:
        detach()


@contextmanager
def observing_keys(model: nn.Module, module: str, observe: Callable[[Tensor], None]) -> Iterator[None]:
    """Shows `observe` the keys of an attention module, (batch, kv heads, length, head_dim), after RoPE and R3."""
    undo = _attach_attention(model.get_submodule(module), "observe", observe)
    try:
        yield
    finally:
        for step in reversed(undo):
            step()
