"""The walk through a decoder that builds its graph from codes and scales, without tracing: Llama and those that share
its layout, of the operations of any format.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gyroquant.export.operations import Operations
from gyroquant.maps import Map
from gyroquant.models.graph import Group, NormOp
from gyroquant.models.online import OnlineMap
from gyroquant.models.packed import PackedStore

MODEL_TYPES = ("llama", "mistral", "smollm3", "granite", "seed_oss", "qwen2", "qwen3", "gemma3_text")
POINTS = frozenset({"input", "output", "qk"})
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # angles that do not change with the length of the text


@dataclass(frozen=True)
class Heads:
    """The heads of an attention: how many of queries, how many of keys and values, and their size."""

    queries: int
    shared: int
    size: int


def impossible_settings(title: str, config: Any) -> Iterable[str]:
    """What a configuration asks for that a graph cannot do, however it comes to be."""
    if getattr(config, "use_bidirectional_attention", None):
        yield f"{title} is not written for attention in both directions (use_bidirectional_attention)"
    for one in _ropes(config):
        kind = one.get("rope_type", "default")
        if kind not in _FIXED_ROPE:
            yield f"{title} is written for RoPE of the kinds {', '.join(_FIXED_ROPE)}, not {kind}"


def _ropes(config: Any) -> Iterable[Mapping[str, Any]]:
    """The settings of RoPE, one for each kind of layer."""
    settings = getattr(config, "rope_parameters", None) or {}
    return [value for value in settings.values() if isinstance(value, Mapping)] or [settings]


def unknown_settings(title: str, config: Any) -> Iterable[str]:
    """What a configuration asks for that the walk has no operation for."""
    if config is None:
        return
    yield from impossible_settings(title, config)
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if act not in _ACTIVATIONS:
        yield f"{title} is written for the activations {' and '.join(_ACTIVATIONS)}, not {act}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        yield f"{title} is not written for attention whose scores are capped (attn_logit_softcapping)"
    if any(one.get("partial_rotary_factor") not in (None, 1.0) for one in _ropes(config)):
        yield f"{title} is not written for RoPE that turns only a part of each head (partial_rotary_factor)"


def heads_of(store: PackedStore) -> Heads:
    """The heads of a model."""
    return Heads(store.graph.heads, store.graph.kv_heads, store.graph.head_dim)


class DecoderOperations(Operations):
    """What a graph format provides for a decoder: inputs, (batch, length), that name tokens and positions, and which of
    all tokens are attended to; the keys and values of earlier calls; and the graph itself.
    """

    @abstractmethod
    def embedded(self, table: Any) -> Any:
        """The rows of a table of numbers that the token ids name, (batch, length, row)."""

    @abstractmethod
    def angles(self, frequencies: Tensor, factor: float) -> Any:
        """Cosine and sine, times a factor, of every position times every frequency, in the form that `turned` takes."""

    @abstractmethod
    def by_head(self, x: Any) -> Any:
        """(batch, length, heads, size) in the order in which `turned` and `attention` take it; size stays the last."""

    @abstractmethod
    def turned(self, x: Any, count: int, angles: Any) -> Any:
        """RoPE of `count` heads whose pairs lie half a head apart."""

    @abstractmethod
    def attention(self, layer: int, q: Any, k: Any, v: Any, scale: float, window: int | None) -> Any:
        """Attention of every token to those that are attended to, not behind it and no further back than a window,
        earlier calls included; (batch, length, heads * size).
        """

    @abstractmethod
    def model(self, logits: Any) -> Any:
        """The graph that gives these logits."""


class Decoder:
    """Builds the graph of one model of the operations of one format."""

    def __init__(self, store: PackedStore, ops: DecoderOperations):
        self.store, self.ops = store, ops
        self.graph, self.config, self.skeleton = store.graph, store.config, store.skeleton()
        self.packed = set(store.description["tensors"])
        self.maps: dict[tuple[str, str], Map] = {
            (one.module, one.insertion.point): one.map for one in store.online if isinstance(one, OnlineMap)
        }
        self._ready: dict[tuple[int, int], Any] = {}
        self._turns: dict[str, Any] = {}
        self._head: Any = None

    def model(self) -> Any:
        """The whole graph."""
        x = self._embedded()
        for index, group in enumerate(self.graph.blocks):
            x = self._block(index, group, x)
        return self.ops.model(self._logits(self._norm(self.graph.outer.norms[-1], x)))

    def _read(self, name: str) -> Tensor:
        return self.store.read([name])[name]

    def _around(self, module: str, point: str, x: Any) -> Any:
        """What enters or leaves a module, behind the map that runs there; layers that share it share the result."""
        m = self.maps.get((module, point))
        if m is None:
            return x
        key = (id(x), id(m))
        if key not in self._ready:
            self._ready[key] = (self.ops.mapped(m, x), x)  # x is kept: its id must not come back
        return self._ready[key][0]

    def _embedded(self) -> Any:
        name = self.graph.outer.ops[0].weight  # type: ignore[union-attr]
        table = self.ops.numbers(self._read(name))
        if self.graph.tied:
            self._head = table
        x = self.ops.embedded(table)
        module = self.skeleton.get_submodule(name.rpartition(".")[0])
        scale = getattr(module, "scalar_embed_scale", None) or getattr(self.config, "embedding_multiplier", None)
        return self._around(name.rpartition(".")[0], "output", self._times(x, 1.0 if scale is None else scale))

    def _logits(self, x: Any) -> Any:
        head, ops = self.graph.outer.linears[-1], self.ops
        x = self._around(head.module, "input", x)
        if self._head is not None and head.weight in self.graph.tied:
            y = ops.product(x, self._head, transposed=True)
        else:
            y = self._linear(head.module, x, entered=True)
        divisor, cap = (getattr(self.config, name, None) for name in ("logits_scaling", "final_logit_softcapping"))
        if divisor not in (None, 1.0):
            y = ops.divide(y, ops.scalar(float(divisor)))
        if cap is not None:
            y = ops.multiply(ops.tanh(ops.divide(y, ops.scalar(float(cap)))), ops.scalar(float(cap)))
        return y

    def _times(self, x: Any, factor: float) -> Any:
        return x if factor == 1.0 else self.ops.multiply(x, self.ops.scalar(float(factor)))

    def _linear(self, module: str, x: Any, entered: bool = False) -> Any:
        """A linear layer, with what runs in front of it and behind it."""
        x = x if entered else self._around(module, "input", x)
        name, bias = f"{module}.weight", f"{module}.bias"
        if name in self.packed:
            y = self.ops.rounded(x, self.store.quantized(name))
        else:
            y = self.ops.product(x, self.ops.numbers(self._read(name)), transposed=True)
        if bias in self.graph.shapes:
            y = self.ops.add(y, self.ops.numbers(self._read(bias)))
        return self._around(module, "output", y)

    def _norm(self, op: NormOp, x: Any) -> Any:
        """An RMS norm over the last dimension."""
        gain = self._read(op.gain).float() + op.entry.offset
        module = self.skeleton.get_submodule(op.module)
        eps = float(getattr(module, "variance_epsilon", None) or module.eps)
        return self._around(op.module, "output", self.ops.normed(x, gain, eps))

    def _block(self, index: int, group: Group, x: Any) -> Any:
        norms = {op.module.rpartition(".")[2]: op for op in group.norms}
        y = self._attention(index, norms, self._norm(norms["input_layernorm"], x))
        sandwich = "pre_feedforward_layernorm" in norms
        if sandwich:
            y = self._norm(norms["post_attention_layernorm"], y)
        x = self._added(x, y)
        y = self._norm(norms["pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"], x)
        y = self._feed_forward(f"{self.graph.architecture.blocks}.{index}.mlp", y)
        if sandwich:
            y = self._norm(norms["post_feedforward_layernorm"], y)
        return self._added(x, y)

    def _added(self, x: Any, y: Any) -> Any:
        return self.ops.add(x, self._times(y, getattr(self.config, "residual_multiplier", 1.0)))

    def _feed_forward(self, name: str, x: Any) -> Any:
        kind = getattr(self.config, "hidden_act", None) or self.config.hidden_activation
        gate, up = self._linear(f"{name}.gate_proj", x), self._linear(f"{name}.up_proj", x)
        return self._linear(f"{name}.down_proj", self.ops.multiply(self.ops.activated(kind, gate), up))

    def _attention(self, index: int, norms: dict[str, NormOp], x: Any) -> Any:
        name = f"{self.graph.architecture.blocks}.{index}.self_attn"
        module, ops = self.skeleton.get_submodule(name), self.ops
        counts = (("q", self.graph.heads), ("k", self.graph.kv_heads), ("v", self.graph.kv_heads))
        q, k, v = (ops.reshaped(self._linear(f"{name}.{one}_proj", x), 2, n, self.graph.head_dim) for one, n in counts)
        if "q_norm" in norms:
            q, k = self._norm(norms["q_norm"], q), self._norm(norms["k_norm"], k)
        q, k, v = (ops.by_head(one) for one in (q, k, v))
        kinds = getattr(self.config, "layer_types", None)
        if getattr(module, "use_rope", True):
            angles = self._angles(kinds[index] if kinds else "")
            q, k = ops.turned(q, self.graph.heads, angles), ops.turned(k, self.graph.kv_heads, angles)
        turn = self.maps.get((name, "qk"))
        if turn is not None:
            q, k = ops.mapped(turn, q), ops.mapped(turn, k)
        window = self._window(module, kinds[index] if kinds else None)
        return self._linear(f"{name}.o_proj", ops.attention(index, q, k, v, float(module.scaling), window))

    def _window(self, module: Any, kind: str | None) -> int | None:
        """How many positions back a layer sees, or None."""
        if hasattr(module, "sliding_window"):
            return module.sliding_window
        if kind is not None:
            return self.config.sliding_window if kind == "sliding_attention" else None
        return getattr(self.config, "sliding_window", None)

    def _angles(self, kind: str) -> Any:
        """The angles of RoPE for layers of a kind."""
        rotary = type(self.skeleton.model.rotary_emb)(self.config)
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        if prefix not in self._turns:
            frequencies = getattr(rotary, f"{prefix}inv_freq").float().cpu()
            factor = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
            self._turns[prefix] = self.ops.angles(frequencies, factor)
        return self._turns[prefix]
