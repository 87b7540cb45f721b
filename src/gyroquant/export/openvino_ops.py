"""Pieces of an OpenVINO graph: stored numbers, rounded matrices as compressed constants, and maps.

Imports OpenVINO, which is optional; `gyroquant.export.openvino` imports this file when it writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import Type, opset13
from torch import Tensor

from gyroquant.export.formats import halves
from gyroquant.grids import IntegerGrid, QuantizedWeight
from gyroquant.maps import (
    Across,
    BlockDiagonal,
    Diagonal,
    Hadamard,
    Identity,
    Map,
    Permutation,
    Product,
    Signs,
    Walsh,
    sequency_order,
)

_DTYPES = {torch.float16: Type.f16, torch.bfloat16: Type.bf16, torch.float32: Type.f32}


def shape(*sizes: int) -> Any:
    """A constant shape."""
    return opset13.constant(np.array(sizes, np.int64))


def scalar(value: float) -> Any:
    """A constant number, fp32."""
    return opset13.constant(np.array(value, np.float32))


def numbers(tensor: Tensor) -> Any:
    """A tensor as a constant of its own dtype, seen by what follows as fp32."""
    tensor = tensor.detach().contiguous()
    kind = _DTYPES[tensor.dtype]
    if kind == Type.bf16:  # which NumPy has no dtype for
        return opset13.convert(opset13.constant(tensor.float().numpy(), dtype=kind), np.float32)
    found = opset13.constant(tensor.numpy())
    return found if kind == Type.f32 else opset13.convert(found, np.float32)


@dataclass(frozen=True)
class Matrix:
    """A matrix of shape (out, in) as a graph has it. With `halves`, shape (groups, out), half a step of each group is
    missing from it: the zero point lies between two codes, which the kernels of a runtime do not know.
    """

    node: Any
    halves: Any = None

    def product(self, x: Any) -> Any:
        """``x @ W.T``. What is missing is half a step times the sum of the inputs of each group."""
        y = opset13.matmul(x, self.node, False, True)
        if self.halves is None:
            return y
        groups = self.halves.get_output_shape(0)[0]
        last = opset13.constant(np.array([-1]))
        if groups == 1:
            return opset13.add(y, opset13.multiply(opset13.reduce_sum(x, last, keep_dims=True), self.halves))
        sums = opset13.reduce_sum(split(x, groups), last, keep_dims=False)
        return opset13.add(y, opset13.matmul(sums, self.halves, False, False))


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


def rounded(weight: QuantizedWeight) -> Matrix:
    """Codes, scales and zero points as they are, in the form that plugins run without unpacking it."""
    assert isinstance(weight.grid, IntegerGrid)
    grid, (rows, columns) = weight.grid, weight.codes.shape
    groups = weight.params.scale.shape[1]
    kind, centre = stored_type(grid)
    codes = weight.codes.view(rows, groups, -1).to(torch.int16) - centre
    held = codes.numpy().astype(np.int8 if kind in (Type.i4, Type.i8) else np.uint8)
    found = opset13.convert(opset13.constant(held, dtype=kind), np.float16)
    scale = weight.params.scale.half().numpy()
    if not grid.symmetric:
        zero = weight.params.zero.to(torch.uint8).numpy()
        found = opset13.subtract(found, opset13.convert(opset13.constant(zero, dtype=kind), np.float16))
    elif not centre:  # between two codes is taken as the upper one, see `Matrix`
        middle = np.full((1, 1, 1), 2 ** (grid.bits - 1), np.uint8)
        found = opset13.subtract(found, opset13.convert(opset13.constant(middle, dtype=Type.u8), np.float16))
    found = opset13.multiply(found, opset13.constant(scale))
    found = opset13.convert(opset13.reshape(found, shape(rows, columns), False), np.float32)
    if not halves(grid):
        return Matrix(found)
    return Matrix(found, opset13.constant(np.ascontiguousarray(scale[..., 0].T.astype(np.float32) / 2)))


def rank(x: Any) -> int:
    """How many dimensions there are."""
    return len((x if isinstance(x, ov.Output) else x.output(0)).get_partial_shape())


def split(x: Any, *sizes: int) -> Any:
    """The last dimension as several: `sizes`, and what is left."""
    keep = [0] * (rank(x) - 1)
    return opset13.reshape(x, shape(*keep, *sizes, -1), True)


def joined(x: Any, n: int, dims: int = 2) -> Any:
    """The last dimensions as one of size n."""
    return opset13.reshape(x, shape(*[0] * (rank(x) - dims), n), True)


def swapped(x: Any) -> Any:
    """The last two dimensions the other way round."""
    order = [*range(rank(x) - 2), rank(x) - 1, rank(x) - 2]
    return opset13.transpose(x, shape(*order))


def mapped(m: Map, x: Any) -> Any:
    """``x @ M`` along the last dimension. Maps with structure keep it, others are a product with their matrix."""
    if isinstance(m, Identity):
        return x
    if isinstance(m, Product):
        for part in m.parts:
            x = mapped(part, x)
        return x
    if isinstance(m, Signs | Diagonal):
        return opset13.multiply(x, opset13.constant(m.values.float().numpy()))
    if isinstance(m, Permutation):
        return _taken(x, m.index)
    if isinstance(m, Hadamard):
        return _kronecker(m, x)
    if isinstance(m, Walsh):
        order = sequency_order(m.n)
        if m.transposed:
            return _kronecker(Hadamard(m.n, True), _taken(x, torch.argsort(order)))
        return _taken(_kronecker(Hadamard(m.n), x), order)
    if isinstance(m, Across):
        return joined(swapped(mapped(m.map, swapped(split(x, m.map.n)))), m.n)
    if isinstance(m, BlockDiagonal):
        return _blocks(m, x)
    return opset13.matmul(x, opset13.constant(m.dense().float().numpy()), False, False)


def _taken(x: Any, index: Tensor) -> Any:
    return opset13.gather(x, opset13.constant(index.numpy().astype(np.int64)), opset13.constant(np.array(-1)))


def _kronecker(m: Hadamard, x: Any) -> Any:
    """``A^T X B`` of the vector as a matrix, as `maps.Hadamard` applies itself."""
    a, b = (side.numpy() for side in m.sides())
    if len(a) == 1:
        return opset13.matmul(x, opset13.constant(b), False, False)
    square = opset13.matmul(split(x, len(a)), opset13.constant(b), False, False)
    return joined(opset13.matmul(opset13.constant(a), square, False, False), m.n)


def _blocks(m: BlockDiagonal, x: Any) -> Any:
    inside = x if m.repeat == 1 else split(x, m.repeat)
    if len(m.parts) == 1:
        inside = mapped(m.parts[0], inside)
    else:
        lengths = opset13.constant(np.array([part.n for part in m.parts], np.int64))
        pieces = opset13.variadic_split(inside, opset13.constant(np.array(-1)), lengths).outputs()
        inside = opset13.concat([mapped(part, piece) for part, piece in zip(m.parts, pieces, strict=True)], -1)
    return inside if m.repeat == 1 else joined(inside, m.n)
