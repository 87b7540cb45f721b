"""Builds the graph of a decoder from codes and scales, without tracing, with the operations of any graph format. It
supports Llama and the architectures that share its layout.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from gyroquant.errors import UnsupportedModelError
from gyroquant.formats.operations import Operations
from gyroquant.grids import QuantizedWeight
from gyroquant.maps import Map, Product, Signs
from gyroquant.models.execution.online import OnlineMap
from gyroquant.models.graph.model_graph import Group, NormOp
from gyroquant.models.graph.rope import rope_settings
from gyroquant.models.stores.packed import PackedStore

MODEL_TYPES = ("llama", "mistral", "smollm3", "granite", "seed_oss", "qwen2", "qwen3", "gemma3_text")
POINTS = frozenset({"input", "output", "qk"})
EXPERT_POINTS = frozenset({"experts_in", "experts_act"})
_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
_BUILT_ROPE = ("default", "linear", "llama3", "yarn")
_CHANGING_ROPE = ("dynamic", "longrope")  # angles that change with the length of the text


def impossible_settings(title: str, config: Any) -> Iterable[str]:
    """The settings of a configuration that neither a built nor a traced graph supports, one sentence each."""
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):  # others concern tokens of images
        yield f"{title} does not support attention in both directions (use_bidirectional_attention)"
    for settings in rope_settings(config):
        kind = settings.get("rope_type", "default")
        if kind in _CHANGING_ROPE:
            yield f"{title} does not support RoPE of type {kind}, whose angles change with the length of the text"


def unknown_settings(title: str, config: Any) -> Iterable[str]:
    """The settings of a configuration that `Decoder` does not support, one sentence each."""
    if config is None:
        return
    yield from impossible_settings(title, config)
    for kind in {settings.get("rope_type", "default") for settings in rope_settings(config)} - {*_CHANGING_ROPE}:
        if kind not in _BUILT_ROPE:
            yield f"{title} does not support RoPE of type {kind}; it supports {', '.join(_BUILT_ROPE)}"
    act = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if act not in _ACTIVATIONS:
        yield f"{title} does not support the activation {act}; it supports {' and '.join(_ACTIVATIONS)}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        yield f"{title} does not support capped attention scores (attn_logit_softcapping)"
    if any(settings.get("partial_rotary_factor") not in (None, 1.0) for settings in rope_settings(config)):
        yield f"{title} does not support RoPE that turns only a part of each head (partial_rotary_factor)"


class DecoderOperations(Operations):
    """What a graph format provides for a decoder: the inputs of the graph (token ids and positions, both of shape
    (batch, length), and the attention mask), the keys and values of earlier calls, and the graph itself.
    """

    ids: Any
    """The token ids, an input of the graph."""

    @abstractmethod
    def angles(self, frequencies: Tensor, factor: float) -> Any:
        """Cosine and sine of every position times every frequency, both times `factor`, in the form for `turned`."""

    @abstractmethod
    def by_head(self, x: Any) -> Any:
        """(batch, length, heads, size) in the order that `turned` and `attention` use. The last dimension stays."""

    @abstractmethod
    def turned(self, x: Any, count: int, angles: Any) -> Any:
        """RoPE of `count` heads. The two coordinates of a pair are half a head apart."""

    @abstractmethod
    def attention(self, layer: int, q: Any, k: Any, v: Any, scale: float, window: int | None) -> Any:
        """Attention, (batch, length, heads * size). A token attends to itself and to earlier tokens, those of earlier
        calls included, that the attention mask allows and that are within `window` positions. None: no window.
        """

    @abstractmethod
    def model(self, logits: Any) -> Any:
        """The graph whose output is these logits."""


class Decoder:
    """Builds the graph of one model from the operations of one format."""

    def __init__(self, store: PackedStore, ops: DecoderOperations):
        self.store, self.ops = store, ops
        self.graph, self.config, self.skeleton = store.graph, store.config, store.skeleton()
        self.packed = set(store.description["tensors"])
        self.maps: dict[tuple[str, str], Map] = {
            (op.module, op.hook_point.point): op.map for op in store.online if isinstance(op, OnlineMap)
        }
        self._signs: dict[str, Tensor] = {}  # signs of the rows of layers, see `_take_signs`
        self._mapped: dict[tuple[int, int], Any] = {}
        self._rope_angles: dict[str, Any] = {}
        self._table: Any = None  # what the embedding and a head that is tied to it share: numbers or codes

    def model(self) -> Any:
        """The whole graph."""
        x = self._embedded()
        for index, group in enumerate(self.graph.blocks):
            x = self._block(index, group, x)
        return self.ops.model(self._logits(self._norm(self.graph.outer.norms[-1], x)))

    def _read(self, name: str) -> Tensor:
        return self.store.read([name])[name]

    def _at(self, module: str, point: str, x: Any) -> Any:
        """A module's input or output after the online map at this point, if any. Layers with the same `x` and map share
        the result.
        """
        m = self.maps.get((module, point))
        if m is None:
            return x
        key = (id(x), id(m))
        if key not in self._mapped:
            self._mapped[key] = (self.ops.mapped(m, x), x)  # x is kept, so that no other value gets its id
        return self._mapped[key][0]

    def _embedded(self) -> Any:
        name, ops = self.graph.outer.ops[0].weight, self.ops  # type: ignore[union-attr]
        if name in self.packed:
            self._table = ops.stored_form(self.store.quantized(name))
            x = ops.looked_up(ops.ids, self._table)
        else:
            self._table = ops.numbers(self._read(name))
            x = ops.gathered(self._table, ops.ids)
        module = self.skeleton.get_submodule(name.rpartition(".")[0])
        scale = getattr(module, "scalar_embed_scale", None) or getattr(self.config, "embedding_multiplier", None)
        return self._at(name.rpartition(".")[0], "output", self._times(x, 1.0 if scale is None else scale))

    def _logits(self, x: Any) -> Any:
        head, ops = self.graph.outer.linears[-1], self.ops
        x = self._at(head.module, "input", x)
        if head.weight not in self.graph.tied:
            y = self._linear(head.module, x, entered=True)
        elif isinstance(self._table, QuantizedWeight):
            y = ops.rounded(x, self._table)
        else:
            y = ops.product(x, self._table, transposed=True)
        divisor, cap = (getattr(self.config, name, None) for name in ("logits_scaling", "final_logit_softcapping"))
        if divisor not in (None, 1.0):
            y = ops.divide(y, ops.scalar(float(divisor)))
        if cap is not None:
            y = ops.multiply(ops.tanh(ops.divide(y, ops.scalar(float(cap)))), ops.scalar(float(cap)))
        return y

    def _times(self, x: Any, factor: float) -> Any:
        return x if factor == 1.0 else self.ops.multiply(x, self.ops.scalar(float(factor)))

    def _linear(self, module: str, x: Any, entered: bool = False) -> Any:
        """A linear layer, with the online maps before and after it. With `entered`, `x` is already mapped."""
        x = x if entered else self._at(module, "input", x)
        name = f"{module}.weight"
        if name in self.packed:
            y = self.ops.rounded(x, self._quantized(module))
        else:
            y = self.ops.product(x, self.ops.numbers(self._turned_rows(module, self._read(name))), transposed=True)
        return self._left(module, y)

    def _left(self, module: str, y: Any) -> Any:
        """The result of a product with the bias of its layer and the online map after it."""
        bias = f"{module}.bias"
        if bias in self.graph.shapes:
            y = self.ops.add(y, self.ops.numbers(self._turned_rows(module, self._read(bias))))
        return self._at(module, "output", y)

    def _linears(self, modules: Sequence[str], x: Any) -> list[Any]:
        """Linear layers of one input. Rounded ones behind the same map, of one grid, are one product."""
        inputs = [self._at(module, "input", x) for module in modules]
        if any(y is not inputs[0] for y in inputs) or any(f"{module}.weight" not in self.packed for module in modules):
            return [self._linear(module, y, entered=True) for module, y in zip(modules, inputs, strict=True)]
        ys = self.ops.rounded_together(inputs[0], [self._quantized(module) for module in modules])
        return [self._left(module, y) for module, y in zip(modules, ys, strict=True)]

    def _quantized(self, module: str) -> QuantizedWeight:
        weight = self.store.quantized(f"{module}.weight")
        if module not in self._signs:
            return weight
        params = replace(weight.params, scale=self._turned_rows(module, weight.params.scale))
        return replace(weight, params=params)

    def _turned_rows(self, module: str, rows: Tensor) -> Tensor:
        """Rows of a parameter times the signs that a layer has taken over from the map behind it, if any."""
        signs = self._signs.get(module)
        return rows if signs is None else rows * signs.to(rows.dtype).view(-1, *[1] * (rows.dim() - 1))

    def _norm(self, op: NormOp, x: Any) -> Any:
        """An RMS norm over the last dimension, with the online maps before and after it."""
        x = self._at(op.module, "input", x)
        gain = self._read(op.gain).float() + op.entry.offset
        module = self.skeleton.get_submodule(op.module)
        eps = float(getattr(module, "variance_epsilon", None) or module.eps)
        return self._at(op.module, "output", self.ops.normed(x, gain, eps))

    def _block(self, index: int, group: Group, x: Any) -> Any:
        norms = {op.module.rpartition(".")[2]: op for op in group.norms}
        y = self._attention(index, norms, self._norm(norms["input_layernorm"], x))
        sandwich = "pre_feedforward_layernorm" in norms
        if sandwich:
            y = self._norm(norms["post_attention_layernorm"], y)
        x = self._added(x, y)
        y = self._norm(norms["pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"], x)
        y = self._feed_forward(f"{self.graph.architecture.block_prefix(index)}mlp", y)
        if sandwich:
            y = self._norm(norms["post_feedforward_layernorm"], y)
        return self._added(x, y)

    def _added(self, x: Any, y: Any) -> Any:
        return self.ops.residual(x, self._times(y, self.graph.residual_multiplier))

    def _feed_forward(self, name: str, x: Any) -> Any:
        kind = getattr(self.config, "hidden_act", None) or self.config.hidden_activation
        self._take_signs(f"{name}.up_proj", f"{name}.down_proj")
        gate, up = self._linears([f"{name}.gate_proj", f"{name}.up_proj"], x)
        return self._linear(f"{name}.down_proj", self.ops.multiply(self.ops.activated(kind, gate), up))

    def _take_signs(self, before: str, after: str) -> None:
        """Moves random signs with which the map in front of a layer begins to the rows of the layer whose output is
        multiplied there, exactly.
        """
        m = self.maps.get((after, "input"))
        if isinstance(m, Product) and isinstance(m.parts[0], Signs) and (before, "output") not in self.maps:
            self._signs[before] = m.parts[0].values
            self.maps[after, "input"] = Product(m.parts[1:])

    def _attention(self, index: int, norms: dict[str, NormOp], x: Any) -> Any:
        name = f"{self.graph.architecture.block_prefix(index)}self_attn"
        module, ops = self.skeleton.get_submodule(name), self.ops
        counts = (("q", self.graph.heads), ("k", self.graph.kv_heads), ("v", self.graph.kv_heads))
        parts = self._linears([f"{name}.{p}_proj" for p, _ in counts], x)
        q, k, v = (ops.reshaped(y, 2, n, self.graph.head_dim) for y, (_, n) in zip(parts, counts, strict=True))
        if "q_norm" in norms:
            q, k = self._norm(norms["q_norm"], q), self._norm(norms["k_norm"], k)
        q, k, v = (ops.by_head(y) for y in (q, k, v))
        kinds = getattr(self.config, "layer_types", None)
        if getattr(module, "use_rope", True):
            angles = self._angles(kinds[index] if kinds else "")
            q, k = ops.turned(q, self.graph.heads, angles), ops.turned(k, self.graph.kv_heads, angles)
        r3 = self.maps.get((name, "qk"))
        if r3 is not None and r3.n != self.graph.head_dim:
            raise UnsupportedModelError(
                f"{name} turns every kv head by its own rotation (R3), which this format cannot run: set "
                "transform.R3.per_head=false"
            )
        if r3 is not None:
            q, k = ops.mapped(r3, q), ops.mapped(r3, k)
        window = self._window(module, kinds[index] if kinds else None)
        return self._linear(f"{name}.o_proj", ops.attention(index, q, k, v, float(module.scaling), window))

    def _window(self, module: Any, kind: str | None) -> int | None:
        """The sliding window of a layer in positions, or None."""
        if hasattr(module, "sliding_window"):
            return module.sliding_window
        if kind is not None:
            return self.config.sliding_window if kind == "sliding_attention" else None
        return getattr(self.config, "sliding_window", None)

    def _angles(self, kind: str) -> Any:
        """The angles of RoPE for layers of a kind (`layer_types`)."""
        rotary = type(self.skeleton.model.rotary_emb)(self.config)
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        if prefix not in self._rope_angles:
            frequencies = getattr(rotary, f"{prefix}inv_freq").float().cpu()
            factor = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
            self._rope_angles[prefix] = self.ops.angles(frequencies, factor)
        return self._rope_angles[prefix]
