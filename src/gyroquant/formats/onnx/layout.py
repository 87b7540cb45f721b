"""The names of the files of the ONNX format, and how they hold codes. Does not need the onnx package."""

from __future__ import annotations

from gyroquant.formats.base import Layer, WeightType
from gyroquant.grids import EvenGrid

MODEL = "model.onnx"
DATA = "model.onnx.data"
ACCURACY = 4  # rounds activations to 8-bit integers, block by block: the usual choice, 50 times faster at 2 bits
TYPES = {  # by the bits of stored codes; 2 bits are slow in blocks of 16
    2: WeightType("MatMulNBits of 2 bits", (1, 2), midrise=True, float_zero=True, block=32),
    4: WeightType("MatMulNBits of 4 bits", (1, 2, 3, 4), midrise=True, float_zero=True, block=16),
    8: WeightType("MatMulNBits of 8 bits", (5, 6, 7, 8), midrise=True, float_zero=True, block=16),
}
_LARGEST_BLOCK = 128  # 2 bits are slow in larger blocks


def held_bits(grid: EvenGrid, columns: int) -> int:
    """The number of bits in which the codes of a matrix are stored."""
    return next(bits for bits, kind in TYPES.items() if kind.holds(Layer("", grid, columns)))


def block_of(group: int) -> int:
    """The largest block that divides a group, among the sizes with fast kernels."""
    return min(group & -group, _LARGEST_BLOCK)
