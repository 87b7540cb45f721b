"""Operations of OpenVINO graphs: arithmetic, stored numbers, and rounded matrices as compressed constants.

This file imports OpenVINO, which is optional. So `gyroquant.formats.openvino.writer` imports it only to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import PartialShape, Type, opset13, opset15
from openvino.op.util import Variable, VariableInfo
from torch import Tensor

from gyroquant.formats.base import halves, kind_of
from gyroquant.formats.openvino.layout import held_group, stored_bits
from gyroquant.formats.operations import Operations, left_out, replaced_zero
from gyroquant.grids import EvenGrid, GroupParams, QuantizedWeight
from gyroquant.models.graph.model_graph import LinearOp

_SHIFTS = np.array([0, 2, 4, 6], np.uint8)  # of the four codes of a byte
_DTYPES = {torch.float16: Type.f16, torch.bfloat16: Type.bf16, torch.float32: Type.f32}


def shape(*sizes: int) -> Any:
    """A constant shape."""
    return opset13.constant(np.array(sizes, np.int64))


def scalar(value: float) -> Any:
    """A constant number, fp32."""
    return opset13.constant(np.array(value, np.float32))


def named(node: Any, name: str) -> Any:
    """Names an input, both the node and its tensor, because plugins search for inputs by either name."""
    node.set_friendly_name(name)
    node.output(0).get_tensor().set_names({name})
    return node


def remembered(name: str, ids: Any, beams: Any, heads: int, size: int) -> tuple[Any, Any]:
    """Keys or values of earlier calls, (batch, heads, length, size), and the variable that stores them. Every beam gets
    those of the beam that it continues.
    """
    first, axis = opset13.constant(np.array([0])), opset13.constant(np.array(0))
    batch = opset13.gather(opset13.shape_of(ids), first, axis)
    info = VariableInfo()
    info.variable_id, info.data_type = name, Type.f32
    info.data_shape = PartialShape([-1, heads, -1, size])
    variable = Variable(info)
    empty = opset13.broadcast(scalar(0.0), opset13.concat([batch, shape(heads), shape(0), shape(size)], 0))
    return opset13.gather(opset13.read_value(empty, variable), beams, axis), variable


def stored_type(bits: int, signed: bool) -> tuple[Any, int]:
    """The type that holds codes of this width, and the number that is subtracted from them first. `signed` asks for a
    signed type.

    Codes of 3 bits are stored in 4 bits, because the CPU plugin unpacks 3-bit constants to fp32 when it loads them.
    There is no signed 2-bit type.
    """
    if bits <= 2:
        return Type.u2, 0
    if bits <= 4:
        return (Type.i4 if signed else Type.u4), 2 ** (bits - 1) if signed else 0
    return (Type.i8 if signed else Type.u8), 2 ** (bits - 1) if signed else 0


def matrix(weight: QuantizedWeight, replaced: bool, experts: int = 0) -> Any:
    """A matrix, (out, in), of exact codes, scales and zero points, in the form that plugins run without unpacking.
    Groups of a size that plugins compute wrongly become several smaller ones with the same scale and zero point.

    replaced: whether `replaced_zero` takes the place of zero points that are no codes.
    experts: the number of matrices, one after another. The result has shape (experts, out, in) then. 0: one matrix.
    """
    assert isinstance(weight.grid, EvenGrid)
    (rows, columns), zeros = weight.codes.shape, kind_of(weight.grid)
    group = columns // weight.params.scale.shape[1]
    held = held_group(group, columns)
    scale, zero = (x.repeat_interleave(group // held, 1) for x in (weight.params.scale, weight.params.zero))
    numbers = zeros in ("midrise", "float_zero") and not replaced
    kind, centre = stored_type(weight.grid.bits, zeros != "asymmetric" and not numbers)
    codes = weight.codes.view(rows, -1, held).to(torch.int16) - centre
    stored = codes.numpy().astype(np.int8 if kind in (Type.i4, Type.i8) else np.uint8)
    sizes = (experts, rows // experts) if experts else (rows,)
    result = opset13.convert(opset13.constant(stored.reshape(*sizes, -1, held), dtype=kind), np.float16)
    each, single = (*sizes, -1, 1), [1] * (len(sizes) + 2)
    if zeros == "asymmetric":
        zero_kind, zero_dtype = (Type.i4, np.int8) if kind == Type.u2 else (kind, np.uint8)
        codes_of_zeros = opset13.constant(zero.reshape(each).numpy().astype(zero_dtype), dtype=zero_kind)
        result = opset13.subtract(result, opset13.convert(codes_of_zeros, np.float16))
    elif numbers:
        points = zero.reshape(each) if zeros == "float_zero" else zero[:1, :1].reshape(single)
        result = opset13.subtract(result, opset13.constant(points.half().numpy()))
    elif not centre:
        middle = np.full(single, replaced_zero(weight.grid), np.int8)
        result = opset13.subtract(result, opset13.convert(opset13.constant(middle), np.float16))
    result = opset13.multiply(result, opset13.constant(scale.half().reshape(each).numpy()))
    return opset13.convert(opset13.reshape(result, shape(*sizes, columns), False), np.float32)


def _part(weight: QuantizedWeight, experts: int, part: tuple[int, int]) -> QuantizedWeight:
    """A part of the rows of each expert; see `OpenVinoOperations.rounded_experts`."""

    def chosen(x: Tensor) -> Tensor:
        return x.unflatten(0, (experts, part[1], -1))[:, part[0]].flatten(0, 1)

    params = GroupParams(chosen(weight.params.scale), chosen(weight.params.zero))
    return replace(weight, codes=chosen(weight.codes), params=params)


class OpenVinoOperations(Operations):
    """The operations of a graph. Products of 2 bits have zero points that are no codes as they are, as numbers of fp16;
    at 4 and 8 bits, the plugin would not round activations then, which its fast kernels do.
    """

    _table: tuple[QuantizedWeight | None, Any] = None, None
    """A rounded table and its matrix, which a tied head shares."""

    def bits_in_file(self, grid: EvenGrid, columns: int) -> int:
        return stored_bits(grid.bits)

    def corrected(self, grid: EvenGrid) -> bool:
        return super().corrected(grid) and grid.bits > 2

    def rank(self, x: Any) -> int:
        return len((x if isinstance(x, ov.Output) else x.output(0)).get_partial_shape())

    def numbers(self, tensor: Tensor) -> Any:
        tensor = tensor.detach().contiguous()
        kind = _DTYPES[tensor.dtype]
        if kind == Type.bf16:  # NumPy does not have this dtype
            return opset13.convert(opset13.constant(tensor.float().numpy(), dtype=kind), np.float32)
        constant = opset13.constant(tensor.numpy())
        return constant if kind == Type.f32 else opset13.convert(constant, np.float32)

    def scalar(self, value: float) -> Any:
        return scalar(value)

    def add(self, x: Any, y: Any) -> Any:
        return opset13.add(x, y)

    def multiply(self, x: Any, y: Any) -> Any:
        return opset13.multiply(x, y)

    def divide(self, x: Any, y: Any) -> Any:
        return opset13.divide(x, y)

    def tanh(self, x: Any) -> Any:
        return opset13.tanh(x)

    def activated(self, kind: str, x: Any) -> Any:
        return opset13.swish(x) if kind == "silu" else opset13.gelu(x, "TANH")

    def product(self, x: Any, y: Any, transposed: bool = False) -> Any:
        return opset13.matmul(x, y, False, transposed)

    def reshaped(self, x: Any, keep: int, *sizes: int) -> Any:
        return opset13.reshape(x, shape(*[0] * keep, *sizes), True)

    def transposed(self, x: Any, *order: int) -> Any:
        return opset13.transpose(x, shape(*order))

    def taken(self, x: Any, index: Tensor) -> Any:
        return opset13.gather(x, opset13.constant(index.numpy().astype(np.int64)), opset13.constant(np.array(-1)))

    def cut(self, x: Any, lengths: Sequence[int]) -> list[Any]:
        return list(opset13.variadic_split(x, opset13.constant(np.array(-1)), shape(*lengths)).outputs())

    def concatenated(self, parts: list[Any]) -> Any:
        return opset13.concat(parts, -1)

    def summed(self, x: Any, keep: bool) -> Any:
        return opset13.reduce_sum(x, shape(-1), keep_dims=keep)

    def coded(self, x: Any, weight: QuantizedWeight) -> Any:
        table, shared = self._table
        return self.product(x, shared if table is weight else self._matrix(weight), transposed=True)

    def _matrix(self, weight: QuantizedWeight) -> Any:
        assert isinstance(weight.grid, EvenGrid)
        return matrix(weight, self.corrected(weight.grid))

    def gathered(self, table: Any, ids: Any) -> Any:
        return opset13.gather(table, ids, opset13.constant(np.array(0)))

    def coded_rows(self, ids: Any, weight: QuantizedWeight) -> Any:
        if weight.grid.bits <= 2:
            return self._rows_from_bytes(ids, weight)
        self._table = weight, self._matrix(weight)
        return self.gathered(self._table[1], ids)

    def _rows_from_bytes(self, ids: Any, weight: QuantizedWeight) -> Any:
        """The same for codes of 2 bits. The CPU plugin looks up constants of type u2 in fp32, and then also decodes a
        product that shares them. So the table is a constant of bytes, of which the chosen rows are unpacked. The bytes
        are those of the u2 constant of a tied head, and the file has them once.
        """
        assert isinstance(weight.grid, EvenGrid)
        zeros_are, (_, columns) = kind_of(weight.grid), weight.codes.shape
        scale, zero = (x[..., 0] for x in (weight.params.scale.half(), weight.params.zero))
        codes = self._unpacked(ids, weight.codes)
        if zeros_are == "asymmetric":
            zeros: Any = opset13.unsqueeze(self._unpacked(ids, zero), shape(-1))
        elif zeros_are == "float_zero":
            zeros = opset13.unsqueeze(self.gathered(self.numbers(zero.half()), ids), shape(-1))
        else:
            zeros = scalar(replaced_zero(weight.grid) - halves(weight.grid) / 2)
        centred = opset13.subtract(self.split(codes, scale.shape[1]), zeros)
        steps = opset13.unsqueeze(self.gathered(self.numbers(scale), ids), shape(-1))
        return self.joined(opset13.multiply(centred, steps), columns)

    def _unpacked(self, ids: Any, codes: Tensor) -> Any:
        """The rows of codes of 2 bits, which are stored four a byte, lowest bits first, at token ids, as numbers."""
        columns = codes.shape[1]
        four = torch.nn.functional.pad(codes.to(torch.uint8), (0, -columns % 4)).unflatten(1, (-1, 4)).numpy()
        held = np.bitwise_or.reduce(four << _SHIFTS, axis=-1)
        chosen = opset13.convert(self.gathered(opset13.constant(held), ids), np.int32)
        chosen = opset13.unsqueeze(chosen, shape(-1))
        shifted = opset15.bitwise_right_shift(chosen, opset13.constant(_SHIFTS.astype(np.int32)))
        low = opset13.bitwise_and(shifted, opset13.constant(np.array(3, np.int32)))
        every = self.joined(opset13.convert(low, np.float32), four.size // len(four))
        return every if columns % 4 == 0 else self.taken(every, torch.arange(columns))

    def rounded_experts(self, x: Any, weight: QuantizedWeight, experts: int, part: tuple[int, int]) -> Any:
        """``x @ W.T`` for every expert, x of shape (experts, tokens, in). `part` is the number of a part of the rows of
        each expert, and the number of equal parts. The matrix is rounded in its own basis.
        """
        chosen = _part(self.stored_form(weight), experts, part)
        y = self.product(x, matrix(chosen, True, experts), transposed=True)
        assert isinstance(chosen.grid, EvenGrid)
        if not super().corrected(chosen.grid):
            return y
        steps = left_out(chosen).reshape(experts, -1, chosen.params.scale.shape[1])
        sums = self.summed(self.split(x, steps.shape[-1]), False)
        return self.add(y, self.product(sums, self.numbers(steps), transposed=True))

    def parameter(self, weight: QuantizedWeight, op: LinearOp) -> Any:
        """A rounded parameter in its stored shape, for code that reads it. Rounded in its own basis."""
        weight = self.stored_form(weight)
        values = self._matrix(weight)
        assert isinstance(weight.grid, EvenGrid)
        if self.corrected(weight.grid):
            steps = left_out(weight)
            groups, (rows, columns) = steps.shape[1], op.matrix_shape
            split = opset13.reshape(values, shape(rows, groups, columns // groups), False)
            values = opset13.add(split, self.numbers(steps[..., None]))
        sizes = op.shape
        if not op.entry.transposed:
            return opset13.reshape(values, shape(*sizes), False)
        turned = opset13.reshape(values, shape(*sizes[:-2], sizes[-1], sizes[-2]), False)
        return self.swapped(turned)

    def normed(self, x: Any, gain: Tensor, eps: float) -> Any:
        squares = opset13.reduce_mean(opset13.power(x, scalar(2.0)), shape(-1), keep_dims=True)
        root = opset13.sqrt(opset13.add(squares, scalar(eps)))
        return opset13.multiply(opset13.multiply(x, opset13.divide(scalar(1.0), root)), self.numbers(gain))
