"""A decoder's operations as an OpenVINO graph, which keeps keys and values as its state.

The graph has the inputs that `openvino_genai` and `optimum` pass: `input_ids`, `attention_mask`, `position_ids`, each
of shape (batch, length), and `beam_idx`, (batch,).

Some operations are written in the patterns that plugins search for. In another form they are correct but slow:

- RoPE: slices, a multiplication by -1 and a concatenation.
- Repeated heads: a broadcast in both directions.
- RMS norms: one divided by a root.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import openvino as ov
from openvino import PartialShape, opset13
from torch import Tensor

from gyroquant.formats.decoder import DecoderOperations
from gyroquant.formats.openvino.operations import OpenVinoOperations, named, remembered, scalar, shape
from gyroquant.models.graph.heads import Heads

_MASKED = -65504.0  # added to masked scores: the lowest number of fp16


class OpenVinoDecoder(OpenVinoOperations, DecoderOperations):
    """Builds one graph."""

    def __init__(self, heads: Heads):
        super().__init__()
        self.heads = heads
        self.parameters: list[Any] = []
        self.sinks: list[Any] = []
        self.variables: list[Any] = []
        self._masks: dict[int | None, Any] = {}
        self.ids, self.attended, self.positions = (
            self._input(name) for name in ("input_ids", "attention_mask", "position_ids")
        )
        self.beams = self._input("beam_idx", [-1], np.int32)

    def _input(self, name: str, sizes: list[int] | None = None, kind: Any = np.int64) -> Any:
        parameter = named(opset13.parameter(PartialShape(sizes or [-1, -1]), kind), name)
        self.parameters.append(parameter)
        return parameter

    def model(self, logits: Any) -> Any:
        result = opset13.result(logits)
        result.get_output_tensor(0).set_names({"logits"})
        model = ov.Model([result], self.sinks, self.parameters, self.variables, "gyroquant")
        model.validate_nodes_and_infer_types()
        return model

    def angles(self, frequencies: Tensor, factor: float) -> Any:
        """Cosine and sine, both of shape (batch, 1, length, turned coordinates of a head)."""
        position = opset13.convert(opset13.unsqueeze(self.positions, shape(1)), np.float32)
        column = opset13.constant(frequencies.view(1, -1, 1).numpy())
        angles = opset13.transpose(opset13.matmul(column, position, False, False), shape(0, 2, 1))
        both = opset13.unsqueeze(opset13.concat([angles, angles], -1), shape(1))
        cos, sin = opset13.cos(both), opset13.sin(both)
        if factor != 1.0:
            cos, sin = opset13.multiply(cos, scalar(factor)), opset13.multiply(sin, scalar(factor))
        return cos, sin

    def by_head(self, x: Any) -> Any:
        """(batch, heads, length, size)."""
        return opset13.transpose(x, shape(0, 2, 1, 3))

    def turned(self, x: Any, count: int, angles: Any) -> Any:
        cos, sin = angles
        ends = (shape(0), shape(self.heads.size // 2), shape(2**62))
        left, right = (opset13.slice(x, start, stop, shape(1), shape(3)) for start, stop in pairwise(ends))
        other = opset13.concat([opset13.multiply(right, scalar(-1.0)), left], -1)
        return opset13.add(opset13.multiply(x, cos), opset13.multiply(other, sin))

    def attention(self, layer: int, q: Any, k: Any, v: Any, scale: float, window: int | None) -> Any:
        names = (f"past_key_values.{layer}.{kind}" for kind in ("key", "value"))
        k, v = (self._repeated(self._cached(name, x)) for name, x in zip(names, (k, v), strict=True))
        mixed = opset13.scaled_dot_product_attention(q, k, v, self._mask(window), scalar(scale))
        return self.joined(self.by_head(mixed), self.heads.queries * self.heads.size)

    def _repeated(self, x: Any) -> Any:
        """Keys or values with every head repeated for each query head that shares it."""
        count, shared, size = self.heads.queries, self.heads.shared, self.heads.size
        if shared == count:
            return x
        wide = opset13.broadcast(
            opset13.unsqueeze(x, shape(2)), shape(1, 1, count // shared, 1, 1), broadcast_spec="BIDIRECTIONAL"
        )
        return opset13.reshape(wide, shape(0, count, -1, size), True)

    def _cached(self, name: str, new: Any) -> Any:
        """Keys or values of all positions, (batch, kv heads, length, head_dim). Stores them for later calls."""
        before, variable = remembered(name, self.ids, self.beams, self.heads.shared, self.heads.size)
        everything = opset13.concat([before, new], -2)
        self.variables.append(variable)
        self.sinks.append(opset13.assign(everything, variable))
        return everything

    def _mask(self, window: int | None) -> Any:
        """The bias of scores, (batch, 1, length, positions). A token attends to itself and to earlier tokens that the
        attention mask allows and that are within the window.
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
