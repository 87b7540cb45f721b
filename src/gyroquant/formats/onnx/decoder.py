"""A decoder's operations as an ONNX graph, with ONNX Runtime's kernels for language models.

The graph has the inputs and outputs that `onnxruntime_genai` uses:

    input_ids, position_ids              inputs   (batch, length)
    attention_mask                       input    (batch, positions)
    past_key_values.N.key and .value     inputs   (batch, kv heads, past, head_dim), for every layer N
    logits                               output   (batch, length, words)
    present.N.key and .value             outputs  (batch, kv heads, positions, head_dim)

RoPE and attention are separate nodes, so that a map of queries and keys (R3) can run between them.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import torch
from onnx import ModelProto, TensorProto, ValueInfoProto, helper
from torch import Tensor

from gyroquant.formats.decoder import DecoderOperations
from gyroquant.formats.onnx.operations import OnnxOperations, Value
from gyroquant.models.graph.heads import Heads

OPSETS = {"": 23, "com.microsoft": 1}
_IR_VERSION = 11  # of the ONNX release that introduced opset 23
_MASKED = -65504.0  # added to masked scores: the lowest number of fp16


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
        """The inputs of attention that follow from the mask: the bias of scores for padding, (batch, 1, length,
        positions); the index of each sequence's last position, (batch,), which is the same for all, since padding
        counts; and the number of positions.
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
        nodes = self.alive(output.name for output in self.outputs)
        used = {name for node in nodes for name in node.input}
        constants = [constant for constant in self.constants if constant.name in used]
        graph = helper.make_graph(nodes, "gyroquant", self.inputs, self.outputs, constants)
        opsets = [helper.make_opsetid(*opset) for opset in OPSETS.items()]
        return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="gyroquant")

    def angles(self, frequencies: Tensor, factor: float) -> tuple[Value, ...]:
        """Cosine and sine, both of shape (batch, length, half a head)."""
        positions = self.as_kind(self.node("Unsqueeze", [self.positions, self.integers(2)], 3), torch.float32)
        angles = self.multiply(positions, self.numbers(frequencies))
        both = (self.node(kind, [angles], 3) for kind in ("Cos", "Sin"))
        return tuple(x if factor == 1.0 else self.multiply(x, self.scalar(factor)) for x in both)

    def by_head(self, x: Value) -> Value:
        """Unchanged: the kernels take (batch, length, heads * size) and transpose it themselves."""
        return x

    def turned(self, x: Value, count: int, angles: Any) -> Value:
        whole = self.reshaped(x, 2, count * self.heads.size)
        y = self.node("RotaryEmbedding", [whole, *angles], 3, num_heads=count)
        return self.reshaped(y, 2, count, self.heads.size)

    def attention(self, layer: int, q: Value, k: Value, v: Value, scale: float, window: int | None) -> Value:
        heads, kind = self.heads, TensorProto.FLOAT
        counts = (heads.queries, heads.shared, heads.shared)
        q, k, v = (self.reshaped(x, 2, n * heads.size) for x, n in zip((q, k, v), counts, strict=True))
        sizes, new = ("batch", heads.shared, "past", heads.size), ("batch", heads.shared, "positions", heads.size)
        past = [self._input(f"past_key_values.{layer}.{part}", *sizes, kind=kind) for part in ("key", "value")]
        names = [f"present.{layer}.{part}" for part in ("key", "value")]
        self.outputs += [helper.make_tensor_value_info(name, kind, new) for name in names]
        unused = (None,) * 3
        inputs = [q, k, v, *past, self._last, self._total, *unused, self._bias]
        settings = {"num_heads": heads.queries, "kv_num_heads": heads.shared, "scale": scale}
        settings |= {} if window is None else {"local_window_size": window}
        return self.nodes_of("GroupQueryAttention", inputs, (3, 4, 4), names, domain="com.microsoft", **settings)[0]
