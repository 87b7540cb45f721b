"""Operations of ONNX graphs: arithmetic, stored numbers, and rounded matrices for `com.microsoft.MatMulNBits` and
`com.microsoft.GatherBlockQuantized`.

This file imports the onnx package, which is optional. So `gyroquant.formats.onnx.writer` imports it only to write.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from typing import Any, BinaryIO

import torch
from onnx import NodeProto, TensorProto, helper
from torch import Tensor

from gyroquant.formats.base import kind_of
from gyroquant.formats.onnx.layout import ACCURACY, DATA, block_of, held_bits
from gyroquant.formats.operations import Operations, replaced_zero, stored_scale
from gyroquant.grids import EvenGrid, QuantizedWeight

_KINDS = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
}
_INLINE = 1024  # bytes; constants of this size or more go into the separate data file
_ALIGNED = 64  # bytes


@dataclass(frozen=True, eq=False)
class Value:
    """The output of a node, or a constant. A `stored` value is a constant of another dtype than fp32, which is cast to
    fp32 where it is used.
    """

    name: str
    rank: int
    stored: bool = False


@dataclass(frozen=True)
class _Held:
    """A rounded matrix as constants: its codes, (rows, blocks, bytes), its scales and zero points, and the settings of
    the kernels that read them.
    """

    codes: Value
    params: list[Value]
    settings: dict[str, int]


def packed(codes: Tensor, bits: int) -> Tensor:
    """Packs codes along the last dimension into bytes, lowest bits first. The last byte is padded with zeros."""
    each = 8 // bits
    codes = torch.nn.functional.pad(codes.to(torch.int16), (0, -codes.shape[-1] % each))
    return torch.stack([codes[..., i::each] << bits * i for i in range(each)]).sum(0, dtype=torch.uint8)


class OnnxOperations(Operations):
    """The operations of a graph. Large constants are written to `data` as soon as they are made."""

    def __init__(self, data: BinaryIO | None = None):
        super().__init__()
        self.nodes: list[NodeProto] = []
        self.constants: list[TensorProto] = []
        self._data = data
        self._places: dict[bytes, int] = {}  # in the data file, by a digest of the bytes
        self._table: tuple[QuantizedWeight, _Held] | None = None
        self._casts: dict[str, str] = {}
        self._added: tuple[Value, ...] = (Value("", 0),)  # the last `residual` and its terms
        self._shaped: dict[
            str, tuple[Value, int]
        ] = {}  # its source, and the number of leading dimensions that are unchanged

    def constant(self, tensor: Tensor) -> Value:
        """A constant in the dtype of the tensor."""
        tensor = tensor.detach().contiguous()
        constant = TensorProto(name=f"c{len(self.constants)}", data_type=_KINDS[tensor.dtype], dims=tensor.shape)
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        if self._data is None or raw.nbytes < _INLINE:
            constant.raw_data = raw.tobytes()
        else:
            constant.data_location = TensorProto.EXTERNAL
            for key, value in (("location", DATA), ("offset", self._place(raw.data)), ("length", raw.nbytes)):
                constant.external_data.add(key=key, value=str(value))
        self.constants.append(constant)
        return Value(constant.name, tensor.dim(), tensor.dtype.is_floating_point and tensor.dtype != torch.float32)

    def _place(self, raw: memoryview) -> int:
        """Where these bytes are in the data file. Equal bytes, as the scales of a product and of its correction, are
        written once.
        """
        assert self._data is not None
        digest = blake2b(raw, digest_size=16).digest()
        if digest not in self._places:
            self._data.write(bytes(-self._data.tell() % _ALIGNED))
            self._places[digest] = self._data.tell()
            self._data.write(raw)
        return self._places[digest]

    def in_rows(self, value: Value) -> Value:
        """A constant that has the bytes of another one, as a matrix with as many rows. It takes no room in the data
        file. A Reshape would cost memory: ONNX Runtime copies its result when it opens the file.
        """
        constant = TensorProto()
        constant.CopyFrom(next(stored for stored in self.constants if stored.name == value.name))
        rows, *others = constant.dims
        del constant.dims[:]
        constant.dims.extend([rows, prod(others)])
        constant.name = f"c{len(self.constants)}"
        self.constants.append(constant)
        return Value(constant.name, 2, value.stored)

    def integers(self, *numbers: int) -> Value:
        """A constant of int64, such as a shape or axes."""
        return self.constant(torch.tensor(numbers))

    def node(self, kind: str, inputs: Sequence[Value | None], rank: int, **attributes: Any) -> Value:
        """The output of an operation. None stands for an input that is left out."""
        return self.nodes_of(kind, inputs, [rank], **attributes)[0]

    def nodes_of(
        self,
        kind: str,
        inputs: Sequence[Value | None],
        ranks: Sequence[int],
        names: Sequence[str] = (),
        **attributes: Any,
    ) -> list[Value]:
        """The outputs of an operation, with these `ranks`. `names` are the names of the last outputs."""
        input_names = [self._cast(x) for x in inputs]
        label = f"{kind}_{len(self.nodes)}"
        outputs = [f"{label}_{i}" for i in range(len(ranks) - len(names))] + list(names)
        self.nodes.append(helper.make_node(kind, input_names, outputs, name=label, **attributes))
        return [Value(name, rank) for name, rank in zip(outputs, ranks, strict=True)]

    def _cast(self, x: Value | None) -> str:
        if x is None or not x.stored:
            return "" if x is None else x.name
        if x.name not in self._casts:
            self._casts[x.name] = self.as_kind(Value(x.name, x.rank), torch.float32).name
        return self._casts[x.name]

    def as_kind(self, x: Value, dtype: torch.dtype) -> Value:
        """A value cast to another dtype."""
        return self.node("Cast", [x], x.rank, to=_KINDS[dtype])

    def alive(self, outputs: Iterable[str]) -> list[NodeProto]:
        """The nodes on which these outputs depend, in their order."""
        needed, nodes = set(outputs), list[NodeProto]()
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                nodes.append(node)
        return nodes[::-1]

    def bits_in_file(self, grid: EvenGrid, columns: int) -> int:
        return held_bits(grid, columns)

    def rank(self, x: Value) -> int:
        return x.rank

    def numbers(self, tensor: Tensor) -> Value:
        return self.constant(tensor)

    def scalar(self, value: float) -> Value:
        return self.constant(torch.tensor(value))

    def add(self, x: Value, y: Value) -> Value:
        return self.node("Add", [x, y], max(x.rank, y.rank))

    def residual(self, x: Value, y: Value) -> Value:
        total = self.add(x, y)
        self._added = total, x, y
        return total

    def multiply(self, x: Value, y: Value) -> Value:
        return self.node("Mul", [x, y], max(x.rank, y.rank))

    def divide(self, x: Value, y: Value) -> Value:
        return self.node("Div", [x, y], max(x.rank, y.rank))

    def tanh(self, x: Value) -> Value:
        return self.node("Tanh", [x], x.rank)

    def activated(self, kind: str, x: Value) -> Value:
        if kind == "silu":
            return self.multiply(x, self.node("Sigmoid", [x], x.rank))
        return self.node("Gelu", [x], x.rank, approximate="tanh")

    def product(self, x: Value, y: Value, transposed: bool = False) -> Value:
        return self.node("MatMul", [x, self.swapped(y) if transposed else y], max(x.rank, y.rank))

    def reshaped(self, x: Value, keep: int, *sizes: int) -> Value:
        source, same = self._shaped.get(x.name, (x, keep))
        source = source if keep <= same else x
        if len(sizes) == 1 and source.rank == keep + 1:
            return source
        y = self.node("Reshape", [source, self.integers(*[0] * keep, *sizes)], keep + len(sizes))
        self._shaped[y.name] = source, keep
        return y

    def transposed(self, x: Value, *order: int) -> Value:
        return self.node("Transpose", [x], x.rank, perm=order)

    def taken(self, x: Value, index: Tensor) -> Value:
        return self.node("Gather", [x, self.constant(index.long())], x.rank, axis=-1)

    def cut(self, x: Value, lengths: Sequence[int]) -> list[Value]:
        return self.nodes_of("Split", [x, self.integers(*lengths)], [x.rank] * len(lengths), axis=-1)

    def concatenated(self, parts: list[Value]) -> Value:
        return self.node("Concat", parts, parts[0].rank, axis=-1)

    def summed(self, x: Value, keep: bool) -> Value:
        return self.node("ReduceSum", [x, self.integers(-1)], x.rank if keep else x.rank - 1, keepdims=int(keep))

    def normed(self, x: Value, gain: Tensor, eps: float) -> Value:
        total, *parts = self._added
        if total is x and self.nodes[-1].output[0] == x.name:
            self.nodes.pop()  # one node adds and norms; the sum keeps its name
            inputs, names = [*parts, self.numbers(gain)], ["", "", x.name]
            settings = {"domain": "com.microsoft", "epsilon": eps}
            return self.nodes_of("SkipSimplifiedLayerNormalization", inputs, [3] * 4, names, **settings)[0]
        return self.node("RMSNormalization", [x, self.numbers(gain)], x.rank, axis=-1, epsilon=eps)

    def coded(self, x: Value, weight: QuantizedWeight) -> Value:
        (rows, columns), held = weight.codes.shape, self._held(weight)
        settings = held.settings | {"K": columns, "N": rows, "accuracy_level": ACCURACY}
        inputs = [x, held.codes, *held.params]
        return self.node("MatMulNBits", inputs, x.rank, domain="com.microsoft", **settings)

    def gathered(self, table: Value, ids: Value) -> Value:
        rows = self.node("Gather", [Value(table.name, table.rank), ids], ids.rank + 1, axis=0)
        return self.as_kind(rows, torch.float32) if table.stored else rows

    def coded_rows(self, ids: Value, weight: QuantizedWeight) -> Value:
        held = self._held(weight)
        self._table = weight, held
        settings = held.settings | {"gather_axis": 0, "quantize_axis": 1}
        inputs = [self.in_rows(held.codes), ids, *held.params]
        return self.node("GatherBlockQuantized", inputs, ids.rank + 1, domain="com.microsoft", **settings)

    def _held(self, weight: QuantizedWeight) -> _Held:
        """A matrix as constants. Those of a table are made once, for its lookup and a head that is tied to it."""
        if self._table is not None and self._table[0] is weight:
            return self._table[1]
        assert isinstance(weight.grid, EvenGrid)
        grid, (rows, columns) = weight.grid, weight.codes.shape
        group = columns // weight.params.scale.shape[1]
        bits, block = held_bits(grid, columns), block_of(group)
        codes = weight.codes.view(rows, columns // block, block).to(torch.int16)
        zeros = []
        if kind_of(grid) != "asymmetric":  # move codes to the zero point that the kernels use by default
            codes = codes - int(replaced_zero(grid)) + 2 ** (bits - 1)
        else:
            zero = weight.params.zero[..., 0].repeat_interleave(group // block, 1)
            zeros = [self.constant(packed(zero, bits))]
        params = [self._scales(weight, group // block), *zeros]
        return _Held(self.constant(packed(codes, bits)), params, {"bits": bits, "block_size": block})

    def _scales(self, weight: QuantizedWeight, repeat: int) -> Value:
        """The scale of every block, (rows, blocks). It is stored once for each group. The graph repeats it when the
        file is opened.
        """
        scale = stored_scale(weight)
        if repeat == 1:
            return self.constant(scale[..., 0])
        rows, groups, _ = scale.shape
        wide = self.node("Expand", [self.constant(scale), self.integers(rows, groups, repeat)], 3)
        return self.reshaped(wide, 1, groups * repeat)
