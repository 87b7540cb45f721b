"""A decoder's operations as an ONNX graph, on the kernels that ONNX Runtime has for language models.

It takes and gives what `onnxruntime_genai` passes: `input_ids` and `position_ids`, (batch, length), `attention_mask`,
(batch, positions), and for every layer `past_key_values.N.key` and `.value`, (batch, kv heads, past, head_dim), which
come back longer as `present.N.key` and `.value`. RoPE and attention are nodes of their own, so that a map of queries
and keys (R3) runs between them.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

from gyroquant.export.decoder import DecoderOperations, Heads
from gyroquant.export.onnx_ops import OnnxOperations, Value

OPSETS = {"": 23, "com.microsoft": 1}
_IR_VERSION = 11  # of the release that introduced opset 23
_MASKED = -65504.0  # what a masked score is lowered by: the lowest number that fp16 has


class OnnxDecoder(OnnxOperations, DecoderOperations):
    """Builds one graph."""

    def __init__(self, heads: Heads, data: BinaryIO | None = None):
        super().__init__(data)
        self.heads = heads
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.ids = self._input("input_ids", "batch", "length")
        self.attended = self._input("attention_mask", "batch", "positions")
        self.positions = self._input("position_ids", "batch", "length")
        self._bias, self._last, self._total = self._lengths()

    def _input(self, name: str, *sizes: str | int, kind: int = TensorProto.INT64) -> Value:
        self.inputs.append(helper.make_tensor_value_info(name, kind, sizes))
        return Value(name, len(sizes))

    def _lengths(self) -> tuple[Value, Value, Value]:
        """What attention is told of its inputs: what is added to scores for the sake of padding, (batch, 1, length,
        positions); the number of each sequence's last position, which is the same for all as padding counts, (batch,);
        and how many positions there are.
        """
        batch, length = (self.node("Shape", [self.ids], 1, start=i, end=i + 1) for i in (0, 1))
        positions = self.node("Shape", [self.attended], 1, start=1, end=2)
        absent = self.node("Sub", [self.scalar(1.0), self.as_kind(self.attended, torch.float32)], 2)
        lowered = self.multiply(self.node("Unsqueeze", [absent, self.integers(1, 2)], 4), self.scalar(_MASKED))
        sizes = self.node("Concat", [batch, self.integers(1), length, positions], 1, axis=0)
        total = self.as_kind(positions, torch.int32)
        one = self.constant(torch.tensor([1], dtype=torch.int32))
        last = self.node("Expand", [self.node("Sub", [total, one], 1), batch], 1)
        return self.node("Expand", [lowered, sizes], 4), last, self.node("Squeeze", [total], 0)

    def model(self, logits: Value) -> ModelProto:
        self.nodes_of("Identity", [logits], [3], ["logits"])
        self.outputs.insert(0, helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "length", "words"]))
        nodes = self.alive(one.name for one in self.outputs)
        used = {name for node in nodes for name in node.input}
        constants = [one for one in self.constants if one.name in used]
        graph = helper.make_graph(nodes, "gyroquant", self.inputs, self.outputs, constants)
        opsets = [helper.make_opsetid(*one) for one in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="gyroquant")

    def embedded(self, table: Value) -> Value:
        rows = self.node("Gather", [Value(table.name, 2), self.ids], 3, axis=0)
        return self.as_kind(rows, torch.float32) if table.stored else rows

    def angles(self, frequencies: Tensor, factor: float) -> tuple[Value, ...]:
        """Both of shape (batch, length, half a head)."""
        places = self.as_kind(self.node("Unsqueeze", [self.positions, self.integers(2)], 3), torch.float32)
        angles = self.multiply(places, self.numbers(frequencies))
        both = (self.node(kind, [angles], 3) for kind in ("Cos", "Sin"))
        return tuple(one if factor == 1.0 else self.multiply(one, self.scalar(factor)) for one in both)

    def by_head(self, x: Value) -> Value:
        """As it is: the kernels take (batch, length, heads * size) and turn it round themselves."""
        return x

    def turned(self, x: Value, count: int, angles: Any) -> Value:
        whole = self.reshaped(x, 2, count * self.heads.size)
        y = self.node("RotaryEmbedding", [whole, *angles], 3, num_heads=count)
        return self.reshaped(y, 2, count, self.heads.size)

    def attention(self, layer: int, q: Value, k: Value, v: Value, scale: float, window: int | None) -> Value:
        heads, kind = self.heads, TensorProto.FLOAT
        counts = (heads.queries, heads.shared, heads.shared)
        q, k, v = (self.reshaped(one, 2, n * heads.size) for one, n in zip((q, k, v), counts, strict=True))
        sizes, new = ("batch", heads.shared, "past", heads.size), ("batch", heads.shared, "positions", heads.size)
        past = [self._input(f"past_key_values.{layer}.{one}", *sizes, kind=kind) for one in ("key", "value")]
        names = [f"present.{layer}.{one}" for one in ("key", "value")]
        self.outputs += [helper.make_tensor_value_info(name, kind, new) for name in names]
        unused = (None,) * 3
        given = [q, k, v, *past, self._last, self._total, *unused, self._bias]
        settings = {"num_heads": heads.queries, "kv_num_heads": heads.shared, "scale": scale}
        settings |= {} if window is None else {"local_window_size": window}
        return self.nodes_of("GroupQueryAttention", given, (3, 4, 4), names, domain="com.microsoft", **settings)[0]
