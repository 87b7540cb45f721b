"""A decoder as an OpenVINO graph, built from codes and scales without tracing: Llama and those that share its layout.

The graph keeps its keys and values itself and takes what `openvino_genai` and `optimum` pass: `input_ids`,
`attention_mask`, `position_ids`, each of shape (batch, length), and `beam_idx`, (batch,). Some operations are spelled
as they are because plugins look for these patterns: RoPE by slices, a multiplication by -1 and a concatenation; heads
repeated by a broadcast in both directions; RMS norms as a division of one by a root. Spelled otherwise they are right
and slow.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import openvino as ov
from openvino import PartialShape, opset13
from openvino.op.util import Variable, VariableInfo
from torch import Tensor

from gyroquant.export.openvino_ops import joined, mapped, numbers, rounded, scalar, shape
from gyroquant.maps import Map
from gyroquant.models.graph import Group, NormOp
from gyroquant.models.online import OnlineMap
from gyroquant.models.packed import PackedStore

_MASKED = -65504.0  # what a masked score is lowered by: the lowest number that fp16 has


@dataclass
class Decoder:
    """Builds the graph of one model."""

    store: PackedStore
    parameters: list[Any] = field(default_factory=list)
    sinks: list[Any] = field(default_factory=list)
    variables: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.graph, self.config, self.skeleton = self.store.graph, self.store.config, self.store.skeleton()
        self.packed = set(self.store.description["tensors"])
        self.maps: dict[tuple[str, str], Map] = {
            (one.module, one.insertion.point): one.map for one in self.store.online if isinstance(one, OnlineMap)
        }
        self._ready: dict[tuple[int, int], Any] = {}
        self._masks: dict[int | None, Any] = {}
        self._turns: dict[str, tuple[Any, Any]] = {}
        self._head: Any = None

    def model(self) -> Any:
        """The whole graph."""
        self.ids, self.attended, self.positions = (
            self._input(name) for name in ("input_ids", "attention_mask", "position_ids")
        )
        self.beams = self._input("beam_idx", [-1], np.int32)
        x = self._embedded()
        for index, group in enumerate(self.graph.blocks):
            x = self._block(index, group, x)
        logits = self._logits(self._norm(self.graph.outer.norms[-1], x))
        result = opset13.result(logits)
        result.get_output_tensor(0).set_names({"logits"})
        made = ov.Model([result], self.sinks, self.parameters, self.variables, "gyroquant")
        made.validate_nodes_and_infer_types()
        return made

    def _input(self, name: str, sizes: list[int] | None = None, kind: Any = np.int64) -> Any:
        found = opset13.parameter(PartialShape(sizes or [-1, -1]), kind)
        found.set_friendly_name(name)  # plugins look inputs up by this name as well as by that of the tensor
        found.get_output_tensor(0).set_names({name})
        self.parameters.append(found)
        return found

    def _read(self, name: str) -> Tensor:
        return self.store.read([name])[name]

    def _around(self, module: str, point: str, x: Any) -> Any:
        """What enters or leaves a module, behind the map that runs there; layers that share it share the result."""
        m = self.maps.get((module, point))
        if m is None:
            return x
        key = (id(x), id(m))
        if key not in self._ready:
            self._ready[key] = (mapped(m, x), x)  # x is kept: its id must not come back
        return self._ready[key][0]

    def _embedded(self) -> Any:
        name = self.graph.outer.ops[0].weight  # type: ignore[union-attr]
        table = numbers(self._read(name))
        if self.graph.tied:
            self._head = table
        x = opset13.gather(table, self.ids, opset13.constant(np.array(0)))
        module = self.skeleton.get_submodule(name.rpartition(".")[0])
        scale = getattr(module, "scalar_embed_scale", None) or getattr(self.config, "embedding_multiplier", None)
        x = x if scale in (None, 1.0) else opset13.multiply(x, scalar(float(scale)))
        return self._around(name.rpartition(".")[0], "output", x)

    def _logits(self, x: Any) -> Any:
        head = self.graph.outer.linears[-1]
        x = self._around(head.module, "input", x)
        if self._head is not None and head.weight in self.graph.tied:
            y = opset13.matmul(x, self._head, False, True)
        else:
            y = self._linear(head.module, x, entered=True)
        divisor, cap = (getattr(self.config, name, None) for name in ("logits_scaling", "final_logit_softcapping"))
        if divisor not in (None, 1.0):
            y = opset13.divide(y, scalar(float(divisor)))
        if cap is not None:
            y = opset13.multiply(opset13.tanh(opset13.divide(y, scalar(float(cap)))), scalar(float(cap)))
        return y

    def _linear(self, module: str, x: Any, entered: bool = False) -> Any:
        """A linear layer, with what runs in front of it and behind it."""
        x = x if entered else self._around(module, "input", x)
        name, bias = f"{module}.weight", f"{module}.bias"
        if name in self.packed:
            y = rounded(self.store.quantized(name)).product(x)
        else:
            y = opset13.matmul(x, numbers(self._read(name)), False, True)
        if bias in self.graph.shapes:
            y = opset13.add(y, numbers(self._read(bias)))
        return self._around(module, "output", y)

    def _norm(self, op: NormOp, x: Any) -> Any:
        """An RMS norm over the last dimension."""
        gain = self._read(op.gain).float() + op.entry.offset
        module = self.skeleton.get_submodule(op.module)
        eps = float(getattr(module, "variance_epsilon", None) or module.eps)
        squares = opset13.reduce_mean(opset13.power(x, scalar(2.0)), opset13.constant(np.array([-1])), keep_dims=True)
        root = opset13.sqrt(opset13.add(squares, scalar(eps)))
        y = opset13.multiply(x, opset13.divide(scalar(1.0), root))
        return self._around(op.module, "output", opset13.multiply(y, opset13.constant(gain.numpy())))

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
        factor = getattr(self.config, "residual_multiplier", 1.0)
        return opset13.add(x, y if factor == 1.0 else opset13.multiply(y, scalar(float(factor))))

    def _feed_forward(self, name: str, x: Any) -> Any:
        kind = getattr(self.config, "hidden_act", None) or self.config.hidden_activation
        gate, up = self._linear(f"{name}.gate_proj", x), self._linear(f"{name}.up_proj", x)
        acted = opset13.swish(gate) if kind == "silu" else opset13.gelu(gate, "TANH")
        return self._linear(f"{name}.down_proj", opset13.multiply(acted, up))

    def _attention(self, index: int, norms: dict[str, NormOp], x: Any) -> Any:
        name = f"{self.graph.architecture.blocks}.{index}.self_attn"
        module = self.skeleton.get_submodule(name)
        heads, kv, size = self.graph.heads, self.graph.kv_heads, self.graph.head_dim
        q, k, v = (self._linear(f"{name}.{one}_proj", x) for one in "qkv")
        q, k, v = split_heads(q, heads, size), split_heads(k, kv, size), split_heads(v, kv, size)
        if "q_norm" in norms:
            q, k = self._norm(norms["q_norm"], q), self._norm(norms["k_norm"], k)
        q, k, v = (opset13.transpose(one, shape(0, 2, 1, 3)) for one in (q, k, v))
        kinds = getattr(self.config, "layer_types", None)
        if getattr(module, "use_rope", True):
            cos, sin = self._rotary(kinds[index] if kinds else "")
            q, k = turned(q, cos, sin, size), turned(k, cos, sin, size)
        turn = self.maps.get((name, "qk"))
        if turn is not None:
            q, k = mapped(turn, q), mapped(turn, k)
        k, v = (self._remembered(f"past_key_values.{index}.{kind}", one) for kind, one in (("key", k), ("value", v)))
        if kv != heads:
            k, v = repeated(k, heads, kv, size), repeated(v, heads, kv, size)
        window = self._window(module, kinds[index] if kinds else None)
        mixed = opset13.scaled_dot_product_attention(q, k, v, self._mask(window), scalar(float(module.scaling)))
        out = joined(opset13.transpose(mixed, shape(0, 2, 1, 3)), heads * size)
        return self._linear(f"{name}.o_proj", out)

    def _window(self, module: Any, kind: str | None) -> int | None:
        """How many positions back a layer sees, or None."""
        if hasattr(module, "sliding_window"):
            return module.sliding_window
        if kind is not None:
            return self.config.sliding_window if kind == "sliding_attention" else None
        return getattr(self.config, "sliding_window", None)

    def _remembered(self, name: str, new: Any) -> Any:
        """Keys or values of all positions, (batch, kv heads, length, head_dim); what is new is kept for later calls."""
        batch = opset13.gather(
            opset13.shape_of(self.ids), opset13.constant(np.array([0])), opset13.constant(np.array(0))
        )
        empty = opset13.concat([batch, shape(self.graph.kv_heads), shape(0), shape(self.graph.head_dim)], 0)
        info = VariableInfo()
        info.variable_id = name
        info.data_type = ov.Type.f32
        info.data_shape = PartialShape([-1, self.graph.kv_heads, -1, self.graph.head_dim])
        variable = Variable(info)
        start = opset13.broadcast(scalar(0.0), empty)
        before = opset13.gather(opset13.read_value(start, variable), self.beams, opset13.constant(np.array(0)))
        everything = opset13.concat([before, new], -2)
        self.variables.append(variable)
        self.sinks.append(opset13.assign(everything, variable))
        return everything

    def _mask(self, window: int | None) -> Any:
        """What is added to scores, (batch, 1, length, positions): tokens see attended ones that are not behind them and
        not further back than a window.
        """
        if window not in self._masks:
            zero, one = opset13.constant(np.array(0, np.int64)), opset13.constant(np.array(1, np.int64))
            new = opset13.gather(opset13.shape_of(self.ids), one, zero)
            total = opset13.gather(opset13.shape_of(self.attended), one, zero)
            rows = opset13.unsqueeze(opset13.range(opset13.subtract(total, new), total, one, "i64"), one)
            columns = opset13.unsqueeze(opset13.range(zero, total, one, "i64"), zero)
            seen = opset13.less_equal(columns, rows)
            if window is not None:
                first = opset13.subtract(rows, opset13.constant(np.array(window, np.int64)))
                seen = opset13.logical_and(seen, opset13.greater(columns, first))
            attended = opset13.not_equal(opset13.unsqueeze(self.attended, shape(1, 2)), zero)
            both = opset13.logical_and(opset13.unsqueeze(seen, shape(0, 1)), attended)
            self._masks[window] = opset13.select(both, scalar(0.0), scalar(_MASKED))
        return self._masks[window]

    def _rotary(self, kind: str) -> tuple[Any, Any]:
        """Cosine and sine of every position's angles, (batch, 1, length, turned coordinates of a head)."""
        rotary = type(self.skeleton.model.rotary_emb)(self.config)
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        if prefix not in self._turns:
            frequencies = getattr(rotary, f"{prefix}inv_freq").float().cpu()
            factor = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
            position = opset13.convert(opset13.unsqueeze(self.positions, shape(1)), np.float32)
            column = opset13.constant(frequencies.view(1, -1, 1).numpy())
            angles = opset13.transpose(opset13.matmul(column, position, False, False), shape(0, 2, 1))
            both = opset13.unsqueeze(opset13.concat([angles, angles], -1), shape(1))
            cos, sin = opset13.cos(both), opset13.sin(both)
            if factor != 1.0:
                cos, sin = opset13.multiply(cos, scalar(factor)), opset13.multiply(sin, scalar(factor))
            self._turns[prefix] = cos, sin
        return self._turns[prefix]


def split_heads(x: Any, heads: int, size: int) -> Any:
    """(batch, length, heads * size) to (batch, length, heads, size)."""
    return opset13.reshape(x, shape(0, 0, heads, size), True)


def turned(x: Any, cos: Any, sin: Any, size: int) -> Any:
    """RoPE of heads of `size` whose pairs lie half a head apart."""
    ends = (shape(0), shape(size // 2), shape(2**62))
    left, right = (opset13.slice(x, start, stop, shape(1), shape(3)) for start, stop in pairwise(ends))
    other = opset13.concat([opset13.multiply(right, scalar(-1.0)), left], -1)
    return opset13.add(opset13.multiply(x, cos), opset13.multiply(other, sin))


def repeated(x: Any, heads: int, kv: int, size: int) -> Any:
    """Every head of keys or values as often as queries share it."""
    wide = opset13.broadcast(
        opset13.unsqueeze(x, shape(2)), shape(1, 1, heads // kv, 1, 1), broadcast_spec="BIDIRECTIONAL"
    )
    return opset13.reshape(wide, shape(0, heads, -1, size), True)


def exact_settings() -> dict[str, str]:
    """What makes the CPU plugin compute in fp32 throughout, to compare with."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "KV_CACHE_PRECISION": "f32",
    }
