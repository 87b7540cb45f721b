"""Operations of OpenVINO graphs: arithmetic, stored numbers, and rounded matrices as compressed constants.

Imports OpenVINO, which is optional; `gyroquant.export.openvino` imports this file when it writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import PartialShape, Type, opset13
from openvino.op.util import Variable, VariableInfo
from torch import Tensor

from gyroquant.export.openvino import held_group
from gyroquant.export.operations import Operations
from gyroquant.grids import IntegerGrid, QuantizedWeight

_DTYPES = {torch.float16: Type.f16, torch.bfloat16: Type.bf16, torch.float32: Type.f32}


def shape(*sizes: int) -> Any:
    """A constant shape."""
    return opset13.constant(np.array(sizes, np.int64))


def scalar(value: float) -> Any:
    """A constant number, fp32."""
    return opset13.constant(np.array(value, np.float32))


def named(given: Any, name: str) -> Any:
    """An input under a name; plugins look inputs up by this name as well as by that of the tensor."""
    given.set_friendly_name(name)
    given.output(0).get_tensor().set_names({name})
    return given


def remembered(name: str, ids: Any, beams: Any, heads: int, size: int) -> tuple[Any, Any]:
    """Keys or values of earlier calls, (batch, heads, length, size), for every beam those of the one that it goes on
    from, and the variable that keeps them.
    """
    first, axis = opset13.constant(np.array([0])), opset13.constant(np.array(0))
    batch = opset13.gather(opset13.shape_of(ids), first, axis)
    info = VariableInfo()
    info.variable_id, info.data_type = name, Type.f32
    info.data_shape = PartialShape([-1, heads, -1, size])
    variable = Variable(info)
    none = opset13.broadcast(scalar(0.0), opset13.concat([batch, shape(heads), shape(0), shape(size)], 0))
    return opset13.gather(opset13.read_value(none, variable), beams, axis), variable


def stored_type(grid: IntegerGrid) -> tuple[Any, int]:
    """The type that holds the codes, and what is taken from them first: signed where zero lies in the middle.

    3 bits go into 4, because the CPU plugin unpacks 3-bit constants to fp32 when it loads them; and there is no signed
    2-bit type.
    """
    centred = grid.symmetric
    if grid.bits <= 2:
        return Type.u2, 0
    if grid.bits <= 4:
        return (Type.i4 if centred else Type.u4), 2 ** (grid.bits - 1) if centred else 0
    return (Type.i8 if centred else Type.u8), 2 ** (grid.bits - 1) if centred else 0


def matrix(weight: QuantizedWeight) -> Any:
    """Codes, scales and zero points as they are, in the form that plugins run without unpacking it, (out, in). Groups
    of a size that they compute wrongly are written as several smaller ones with the same scale and zero point.
    """
    assert isinstance(weight.grid, IntegerGrid)
    grid, (rows, columns) = weight.grid, weight.codes.shape
    group = columns // weight.params.scale.shape[1]
    held = held_group(group, columns)
    scale, zero = (one.repeat_interleave(group // held, 1) for one in (weight.params.scale, weight.params.zero))
    kind, centre = stored_type(grid)
    codes = weight.codes.view(rows, -1, held).to(torch.int16) - centre
    stored = codes.numpy().astype(np.int8 if kind in (Type.i4, Type.i8) else np.uint8)
    found = opset13.convert(opset13.constant(stored, dtype=kind), np.float16)
    if not grid.symmetric:
        zeros = opset13.constant(zero.to(torch.uint8).numpy(), dtype=kind)
        found = opset13.subtract(found, opset13.convert(zeros, np.float16))
    elif not centre:
        middle = np.full((1, 1, 1), 2 ** (grid.bits - 1), np.uint8)
        found = opset13.subtract(found, opset13.convert(opset13.constant(middle, dtype=Type.u8), np.float16))
    found = opset13.multiply(found, opset13.constant(scale.half().numpy()))
    return opset13.convert(opset13.reshape(found, shape(rows, columns), False), np.float32)


class OpenVinoOperations(Operations):
    """Arithmetic of a graph."""

    def rank(self, x: Any) -> int:
        return len((x if isinstance(x, ov.Output) else x.output(0)).get_partial_shape())

    def numbers(self, tensor: Tensor) -> Any:
        tensor = tensor.detach().contiguous()
        kind = _DTYPES[tensor.dtype]
        if kind == Type.bf16:  # which NumPy has no dtype for
            return opset13.convert(opset13.constant(tensor.float().numpy(), dtype=kind), np.float32)
        found = opset13.constant(tensor.numpy())
        return found if kind == Type.f32 else opset13.convert(found, np.float32)

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
        return self.product(x, matrix(weight), transposed=True)

    def normed(self, x: Any, gain: Tensor, eps: float) -> Any:
        squares = opset13.reduce_mean(opset13.power(x, scalar(2.0)), shape(-1), keep_dims=True)
        root = opset13.sqrt(opset13.add(squares, scalar(eps)))
        return opset13.multiply(opset13.multiply(x, opset13.divide(scalar(1.0), root)), self.numbers(gain))
