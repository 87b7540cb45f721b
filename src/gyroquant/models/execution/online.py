"""Online operations: maps that cannot be folded into parameters, low-rank branches of layers, and rounding of
activations and of the KV cache.

Each operation is attached to a module of a transformers model, in one of three places: a forward hook, the attention
function (R3 and the cache), or the function that runs stacked experts. The code of the modules is not replaced. On one
input, maps run first, then low-rank branches read it, then it is rounded.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gyroquant.errors import UnsupportedModelError
from gyroquant.grids import Grid
from gyroquant.maps import Map
from gyroquant.models.execution.exact_tokens import ALL_ROUNDED, ExactTokens, read_both
from gyroquant.models.execution.low_rank import LowRankBranch, attach_branch
from gyroquant.models.execution.products import intercept
from gyroquant.models.execution.switches import Switch
from gyroquant.models.graph.sites import HookPoint

_ATTENTION = "gyroquant_"
_EXPERTS = "gyroquant"
_ROUNDING = "_gyroquant_rounding"  # an attribute of modules: a function that sees their inputs rounded


@dataclass(frozen=True)
class _Hooked:
    hook_point: HookPoint

    @property
    def module(self) -> str:
        return self.hook_point.module


@dataclass(frozen=True)
class OnlineMap(_Hooked):
    """A map and the hook point where it runs."""

    map: Map


@dataclass(frozen=True)
class InputQuantizer(_Hooked):
    """Rounds the input of a linear layer with new scales for every token: dynamic activation quantization."""

    grid: Grid


@dataclass(frozen=True)
class CacheQuantizer:
    """Rounds the keys and values of an attention module, per token and head, as a quantized KV cache does.

    Keys are rounded after RoPE and R3. `key_mean`, shape (kv heads, head_dim), is subtracted from the keys before
    rounding and added again afterwards. It is a mean over positions, so it must be measured after RoPE: RoPE turns an
    offset of the keys into a different one at every position.

    `exact` are the tokens that stay unrounded.
    """

    module: str
    keys: Grid
    values: Grid
    key_mean: Tensor | None = None
    exact: ExactTokens = ALL_ROUNDED

    def round_keys(self, keys: Tensor) -> Tensor:
        """Keys of shape (batch, kv heads, length, head_dim), rounded."""
        if self.key_mean is None:
            return fake(self.keys, keys)
        mean = self.key_mean[:, None].to(keys)
        return fake(self.keys, keys - mean) + mean


OnlineOp = OnlineMap | InputQuantizer | CacheQuantizer | LowRankBranch


def run_map(m: Map, x: Tensor) -> Tensor:
    """``x @ M`` along the last dimension. 16-bit activations are multiplied in fp32 and converted back once."""
    return m.apply(x.float()).to(x.dtype) if x.dtype in (torch.float16, torch.bfloat16) else m.apply(x)


def run_on_heads(m: Map, x: Tensor) -> Tensor:
    """As `run_map` on queries or keys, shape (batch, heads, length, n), with one map or one for each kv head.

    In the second case, m has the order of all kv heads, and consecutive query heads share one.
    """
    if m.n == x.shape[-1]:
        return run_map(m, x)
    grouped = x.unflatten(1, (m.n // x.shape[-1], -1)).movedim(1, -2)  # (batch, sharing, length, kv heads, n)
    turned = run_map(m, grouped.flatten(-2)).unflatten(-1, grouped.shape[-2:])
    return turned.movedim(-2, 1).flatten(1, 2)


def fake(grid: Grid, x: Tensor) -> Tensor:
    """`x` rounded to the grid and decoded.

    Gradients pass straight through. Within `scaled_ste` they pass as if noise were added that grows with the range of
    each group: a rounding error is a fraction of a step, and a step is a fraction of the range.
    """
    if not Switch.rounding:
        return x
    if not x.requires_grad:
        return grid.fake(x)
    plain = x.detach()
    if not Switch.scaled_ste:
        return x + (grid.fake(plain) - plain)
    groups = x.unflatten(-1, (-1, grid.group_of(x.shape[-1])))
    width = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)
    growth = 1 + (width - width.detach()) / width.detach().clamp_min(torch.finfo(x.dtype).tiny)
    return x + ((grid.fake(plain) - plain).view(groups.shape) * growth).view(x.shape)


@dataclass
class AttentionState:
    """The online operations of an attention module after RoPE.

    - map: multiplies queries and keys (R3).
    - cache: rounds keys and values.
    - observe: is called with queries, keys and values, after the map and before rounding.

    The map may have the order of a head, or that of all kv heads: then it holds one for each of them.
    """

    map: Map | None = None
    cache: CacheQuantizer | None = None
    observe: Callable[[Tensor, Tensor, Tensor], None] | None = None

    def keys(self, keys: Tensor) -> Tensor:
        """Keys as they enter the cache, before rounding."""
        return keys if self.map is None else run_on_heads(self.map, keys)


class CachedTokens(Protocol):
    """What a cache has rotated and rounded already, and how attention reads it."""

    def attend(self, base: str, query: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor | None:
        """The output of attention, shape (batch, queries, heads, head_dim); None if it is left to the model's own."""

    def read(self, queries: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and the mask for the model's own attention."""


_READY = "_gyroquant_ready"  # an attribute of keys: true if they are rotated and rounded, or what they stand for


def _attention(base: str) -> Callable[..., Any]:
    """An attention function that runs the map and the rounding, then the implementation `base` of the model."""

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        state: AttentionState | None = module.__dict__.get("_gyroquant_attention")
        mask = attention_mask
        if state is not None:
            if state.map is not None:
                query = run_on_heads(state.map, query)
            cached: CachedTokens | bool = getattr(key, _READY, False)
            if not isinstance(cached, bool):
                out = cached.attend(base, query, mask, **kwargs) if not args else None
                if out is not None:
                    return out, None
                key, value, mask = cached.read(query.shape[2], mask)
            elif not cached:
                key, value, mask = _rounded(state, module, query, key, value, mask)
        if base == "eager":
            inner = sys.modules[type(module).__module__].eager_attention_forward
        else:
            inner = ALL_ATTENTION_FUNCTIONS[base]
        return inner(module, query, key, value, mask, *args, **kwargs)

    return forward


def _rounded(
    state: AttentionState, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys after R3 and values, rounded as a quantized cache does, and the mask with which attention reads them."""
    key = state.keys(key)
    if state.observe is not None:
        state.observe(query, key, value)
    if state.cache is None or not Switch.rounding:
        return key, value, mask
    rounded = state.cache.round_keys(key), fake(state.cache.values, value)
    exact = state.cache.exact.at(module)
    return read_both(query.shape[2], (key, value), rounded, mask, exact) if exact else (*rounded, mask)


def mark_ready(keys: Tensor, cached: CachedTokens | None = None) -> Tensor:
    """Marks keys, so that the attention function neither rotates nor rounds them and their values. Returns the keys.

    With `cached`, it reads that in place of them.
    """
    setattr(keys, _READY, True if cached is None else cached)
    return keys


def experts_forward(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Runs stacked experts one after another, with maps, rounding and an observer before each of the two projections.

    `hidden` has shape (tokens, hidden). The other two arguments have shape (tokens, top_k), as transformers passes
    them. An observer is a function of the parameter's name, the expert and its input, shape (tokens of this expert,
    features).
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    nonlinearity = module._apply_gate if module.has_gate else module.act_fn
    maps, grids = module.__dict__.get("_gyroquant_maps", {}), module.__dict__.get("_gyroquant_grids", {})
    observe = module.__dict__.get("_gyroquant_observe")
    out = torch.zeros_like(hidden)
    everyone = Switch.all_experts and observe is not None
    for expert in range(module.num_experts):
        token, position = torch.where(top_k_index == expert)
        if token.numel() == 0 and not everyone:
            continue
        x = hidden if everyone else hidden[token]
        for name, point in ((first, "experts_in"), ("down_proj", "experts_act")):
            if point in maps:
                x = run_map(maps[point], x)
            if point in grids:
                x = fake(grids[point], x)
            if observe is not None:
                observe(name, expert, x)
            weight = getattr(module, name)[expert]
            x = x @ weight if module.is_transposed else nn.functional.linear(x, weight)
            if module.has_bias:
                x = x + getattr(module, f"{name}_bias")[expert]
            if name == first:
                x = nonlinearity(x)
        if module.has_post_expert_norm:
            x = module.post_expert_norm(x)
        x = x[token] if everyone else x
        out.index_add_(0, token, (x * top_k_weights[token, position, None]).to(out.dtype))
    return out


for _base in ("sdpa", "eager"):
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION + _base, _attention(_base))
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION + _base, ALL_MASK_ATTENTION_FUNCTIONS[_base])
ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, experts_forward)


class _MapInput:
    """A forward pre-hook that runs a map. It is a class so that models with online maps can be copied."""

    def __init__(self, m: Map):
        self.map = m

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (run_map(self.map, args[0]), *args[1:])


class _QuantizeInput:
    """A forward pre-hook that rounds. Layers that read the same tensor share the last result in `last`."""

    def __init__(self, grid: Grid, last: _LastRounded):
        self.grid, self.last = grid, last

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        rounded = self.last.rounded(self.grid, args[0])
        observe: Callable[[Tensor, Tensor], None] | None = module.__dict__.get(_ROUNDING)
        if observe is not None and Switch.rounding:
            observe(args[0], rounded)
        return (rounded, *args[1:])


@contextmanager
def observing_rounding(module: nn.Module, observe: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `observe` with the input of a layer before and after its rounding, for the duration of a with block.

    An `InputQuantizer` must be attached to the module. Both tensors have shape (..., features).
    """
    module.__dict__[_ROUNDING] = observe
    try:
        yield
    finally:
        del module.__dict__[_ROUNDING]


@dataclass
class _LastRounded:
    """The tensor that was rounded last, with its version and grid, and the result."""

    seen: Callable[[], Tensor | None] = lambda: None
    version: int = -1
    grid: Grid | None = None
    result: Tensor | None = None

    def rounded(self, grid: Grid, x: Tensor) -> Tensor:
        if not Switch.rounding:
            return x
        version = -1 if x.is_inference() else x._version  # inference tensors do not have a version
        if self.seen() is not x or self.version != version or self.grid != grid or self.result is None:
            self.seen, self.version, self.grid, self.result = weakref.ref(x), version, grid, fake(grid, x)
        return self.result

    def __deepcopy__(self, memo: dict[int, Any]) -> _LastRounded:
        return _LastRounded()


class _MapOutput:
    """A forward hook that runs a map on the output."""

    def __init__(self, m: Map):
        self.map = m

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return run_map(self.map, output)


def route_attention(module: Any) -> Callable[[], None]:
    """Sends the attention of the module's model through `_attention`. Returns a function that undoes it.

    Raises UnsupportedModelError for attention implementations other than 'sdpa' and 'eager'.
    """
    config = module.config
    previous = config._attn_implementation
    if previous.startswith(_ATTENTION):
        return lambda: None
    if _ATTENTION + previous not in ALL_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"R3 and a quantized KV cache need the attention implementation 'sdpa' or 'eager', not {previous!r}; load "
            "the model with one of them"
        )
    config._attn_implementation_internal = _ATTENTION + previous

    def undo() -> None:
        config._attn_implementation_internal = previous

    return undo


def route_experts(module: Any) -> Callable[[], None]:
    """Sends stacked experts through `experts_forward`. Returns a function that undoes it.

    Raises UnsupportedModelError if the module cannot run another function.
    """
    if not hasattr(module, "_apply_gate"):
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot run its experts through another function; run no map online at its "
            "experts and do not round their inputs"
        )
    config = module.config
    previous = config._experts_implementation_internal
    config._experts_implementation_internal = _EXPERTS

    def undo() -> None:
        config._experts_implementation_internal = previous

    return undo


def attention_state(module: nn.Module) -> AttentionState:
    """The state of an attention module. The first call creates it."""
    state: AttentionState = module.__dict__.setdefault("_gyroquant_attention", AttentionState())
    return state


def _attach_attention(module: nn.Module, name: str, value: Any) -> list[Callable[[], None]]:
    setattr(attention_state(module), name, value)
    return [route_attention(module), lambda: setattr(attention_state(module), name, None)]


def _attach_experts(module: nn.Module, table: str, point: str, value: Any) -> list[Callable[[], None]]:
    entries = module.__dict__.setdefault(table, {})
    entries[point] = value
    return [route_experts(module), lambda: entries.pop(point, None)]


def _attach_parameter(model: nn.Module, op: OnlineMap | InputQuantizer) -> list[Callable[[], None]]:
    owner, _, name = op.module.rpartition(".")
    state, release = intercept(model.get_submodule(owner), name)
    if isinstance(op, OnlineMap):
        state.map = partial(run_map, op.map)
        return [release, lambda: setattr(state, "map", None)]
    state.quantizer = partial(fake, op.grid)
    return [release, lambda: setattr(state, "quantizer", None)]


def _attach_op(model: nn.Module, op: OnlineOp, last: _LastRounded) -> list[Callable[[], None]]:
    if isinstance(op, LowRankBranch):
        return attach_branch(model.get_submodule(op.module), op)
    if not isinstance(op, CacheQuantizer) and op.hook_point.point == "parameter":
        return _attach_parameter(model, op)
    module = model.get_submodule(op.module)
    if isinstance(op, CacheQuantizer):
        return _attach_attention(module, "cache", op)
    point = op.hook_point.point
    if isinstance(op, InputQuantizer):
        if point != "input":
            return _attach_experts(module, "_gyroquant_grids", point, op.grid)
        return [module.register_forward_pre_hook(_QuantizeInput(op.grid, last)).remove]
    if point == "input":
        return [module.register_forward_pre_hook(_MapInput(op.map)).remove]
    if point == "output":
        return [module.register_forward_hook(_MapOutput(op.map)).remove]
    if point == "qk":
        return _attach_attention(module, "map", op.map)
    return _attach_experts(module, "_gyroquant_maps", point, op.map)


def _turn(op: OnlineOp) -> int:
    return 0 if isinstance(op, OnlineMap) else 1 if isinstance(op, LowRankBranch) else 2


def attach(model: nn.Module, online: Iterable[OnlineOp]) -> Callable[[], None]:
    """Attaches online operations to the modules of `model`. Returns a function that detaches them.

    Operations on one input run in the order of their kinds, whatever their order here: maps, branches, rounding.
    """
    undo: list[Callable[[], None]] = []
    last = _LastRounded()

    def detach() -> None:
        for step in reversed(undo):
            step()

    try:
        for op in sorted(online, key=_turn):
            undo += _attach_op(model, op, last)
    except Exception:
        detach()
        raise
    return detach


@contextmanager
def attached(model: nn.Module, online: Iterable[OnlineOp]) -> Iterator[None]:
    """Attaches online operations to the modules of `model` for the duration of a with block."""
    detach = attach(model, online)
    try:
        yield
    finally:
        detach()


def observing_attention(
    model: nn.Module, module: str, observe: Callable[[Tensor, Tensor, Tensor], None]
) -> list[Callable[[], None]]:
    """Calls `observe` with the queries, keys and values of an attention module, after RoPE and R3.

    They have shape (batch, heads, length, head_dim). Returns the steps that undo it, to be run from the last.
    """
    return _attach_attention(model.get_submodule(module), "observe", observe)


@contextmanager
def observing_keys(model: nn.Module, module: str, observe: Callable[[Tensor], None]) -> Iterator[None]:
    """Calls `observe` with the keys of an attention module, after RoPE and R3, for the duration of a with block.

    The keys have shape (batch, kv heads, length, head_dim).
    """
    undo = observing_attention(model, module, lambda queries, keys, values: observe(keys))
    try:
        yield
    finally:
        for step in reversed(undo):
            step()
