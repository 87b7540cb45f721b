"""The bytes of ik_llama.cpp's types: blocks of 256 weights, in some types after one number for the whole row.

The layouts are those of ``ggml-common.h`` of ik_llama.cpp, a fork of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gyroquant.formats.gguf.k_quants import Bytes, bit_fields, words
from gyroquant.grids import IqkGrid, KtGrid, QuantizedWeight
from gyroquant.grids.super_block import SUPER_BLOCK
from gyroquant.models.stores.gguf.ik_types import IK_TYPES


class _Block(NamedTuple):
    """What blocks hold, each part as unsigned bytes of shape (rows, super-blocks, ...).

    half: the fp16 number of the block; empty in types that have it for a whole row.
    scales: the codes of the multiples of groups.
    choices: a bit for each group.
    codes: those of single weights, or the places of points.
    signs: a byte for 8 weights, of types of points.
    """

    half: Bytes
    scales: Bytes
    choices: Bytes
    codes: Bytes
    signs: Bytes


def encode_ik(weight: QuantizedWeight) -> Bytes:
    """The bytes of a matrix on an `IqkGrid` or a `KtGrid`, shape (rows, bytes).

    ik_llama.cpp multiplies by the matrix itself: the number of a row is divided by the factor that its kernels have.
    """
    grid, rows = weight.grid, len(weight.codes)
    assert isinstance(grid, IqkGrid | KtGrid)
    numbers, *scales = (values.numpy() for values in grid.stored_scales(weight.params))
    if isinstance(grid, KtGrid):
        codes, signs = (part.numpy() for part in grid.words(weight.codes, weight.params))
    else:
        codes, signs = weight.codes.numpy(), np.empty((rows, 0), np.uint8)
    stored = numbers / np.float32(IK_TYPES[grid.type_name].factor)
    number = stored[..., None].astype("<f4" if grid.row_bits == 32 else "<f2").view(np.uint8)
    blocks = weight.codes.shape[1] // SUPER_BLOCK
    parts = [part.reshape(rows, blocks, -1) for part in (*scales, codes, signs)]
    half = np.empty((rows, blocks, 0), np.uint8) if grid.row_bits else number
    encoded = np.concatenate(_PARTS[grid.type_name](_Block(half, *parts)), -1).reshape(rows, -1)
    return np.ascontiguousarray(np.concatenate([number.reshape(rows, -1), encoded], -1) if grid.row_bits else encoded)


def ik_deviation(weight: QuantizedWeight) -> float:
    """The largest error of a row's number in the file, relative to the number: by how much a factor rounds it."""
    grid = weight.grid
    assert isinstance(grid, IqkGrid | KtGrid)
    factor = np.float32(IK_TYPES[grid.type_name].factor)
    numbers = grid.stored_scales(weight.params)[0].numpy()
    return float(np.abs(numbers / factor * factor / numbers - 1).max())


def _bits16(bits: Bytes) -> Bytes:
    """16 bits as two bytes, the first bit lowest."""
    return bit_fields(bits, 1, 1, 8)


def _iq2_k(block: _Block) -> list[Bytes]:
    scales = bit_fields(block.scales, 1, 4, 2)
    return [block.half, _bits16(block.choices), scales, bit_fields(block.codes, 32, 2, 4)]


def _iq2_ks(block: _Block) -> list[Bytes]:
    extra = _bits16(np.concatenate([block.choices, block.scales >> 4], -1))
    return [extra, bit_fields(block.scales & 15, 1, 4, 2), bit_fields(block.codes, 32, 2, 4)]


def _low_and_high(codes: Bytes) -> list[Bytes]:
    """Codes of three bits: the two low ones in bytes of four, the high ones in bytes of eight."""
    return [bit_fields(codes & 3, 32, 2, 4), bit_fields(codes >> 2, 32, 1, 8)]


def _iq3_k(block: _Block) -> list[Bytes]:
    scales = [_bits16(block.scales >> 4), bit_fields(block.scales & 15, 1, 4, 2)]
    return [block.half, _bits16(block.choices), *scales, *_low_and_high(block.codes)]


def _iq3_ks(block: _Block) -> list[Bytes]:
    extra = _bits16(np.concatenate([block.scales >> 4, block.choices], -1))
    return [extra, bit_fields(block.scales & 15, 4, 4, 2), *_low_and_high(block.codes)]


def _iq4_k(block: _Block) -> list[Bytes]:
    high, low = bit_fields(block.scales >> 4, 1, 2, 4), bit_fields(block.scales & 15, 1, 4, 2)
    return [block.half, _bits16(block.choices), high, low, bit_fields(block.codes, 16, 4, 2)]


def _iq4_ks(block: _Block) -> list[Bytes]:
    return [block.scales << 1 | block.choices, bit_fields(block.codes, 16, 4, 2)]


def _iq2_kt(block: _Block) -> list[Bytes]:
    return [bit_fields(block.scales, 4, 4, 2), words(block.codes, "<u2")]


def _iq3_kt(block: _Block) -> list[Bytes]:
    negative = np.unpackbits(block.signs, axis=-1, bitorder="little")
    return [bit_fields(block.scales, 4, 4, 2), words(block.codes, "<u2"), bit_fields(negative, 32, 1, 8)]


def _iq4_kt(block: _Block) -> list[Bytes]:
    """A word for each group: its choice, its scale, the three high bits of the places of its 8 points."""
    highest = (block.codes >> 12).astype(np.uint32).reshape(*block.scales.shape, 8)
    word = sum(highest[..., i] << (8 + 3 * i) for i in range(8))
    word = word | block.scales.astype(np.uint32) << 1 | block.choices
    middle = (block.codes >> 8 & 15).astype(np.uint8)
    return [words(np.asarray(word), "<u4"), block.codes.astype(np.uint8), bit_fields(middle, 32, 4, 2)]


_PARTS: dict[str, Callable[[_Block], list[Bytes]]] = {
    "IQ2_K": _iq2_k,
    "IQ2_KS": _iq2_ks,
    "IQ3_K": _iq3_k,
    "IQ3_KS": _iq3_ks,
    "IQ4_K": _iq4_k,
    "IQ4_KS": _iq4_ks,
    "IQ2_KT": _iq2_kt,
    "IQ3_KT": _iq3_kt,
    "IQ4_KT": _iq4_kt,
}
