"""The bytes of llama.cpp's K-quants, IQ types and ternary types: blocks of 256 weights.

The layouts are those of ``ggml-common.h``. Q2_K and Q3_K take codes in steps of 32 inside each half of a block, the
other K-quants in steps of 32 or 64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gyroquant.grids import IqGrid, KQuantGrid, QuantizedWeight, TernaryGrid
from gyroquant.grids.super_block import SUPER_BLOCK
from gyroquant.grids.ternary import to_trits

Bytes = NDArray[Any]
"""Unsigned bytes, shape (rows, super-blocks, ...)."""


def encode_k_quant(weight: QuantizedWeight) -> Bytes:
    """The bytes of a matrix on a `KQuantGrid`, shape (rows, bytes)."""
    grid = weight.grid
    assert isinstance(grid, KQuantGrid)
    numbers, multiples = (values.numpy() for values in grid.stored_params(weight.params))
    half = numbers.astype("<f2").view(np.uint8)
    codes = weight.codes.numpy().reshape(len(weight.codes), -1, SUPER_BLOCK)
    blocks = np.concatenate(_PARTS[grid.type_name](codes, multiples.astype(np.uint8), half), -1)
    return np.ascontiguousarray(blocks.reshape(len(codes), -1))


def encode_iq(weight: QuantizedWeight) -> Bytes:
    """The bytes of a matrix on an `IqGrid`, shape (rows, bytes)."""
    grid = weight.grid
    assert isinstance(grid, IqGrid)
    numbers, multiples = (values.numpy() for values in grid.stored_params(weight.params))
    half = numbers.astype("<f2")[..., None].view(np.uint8)
    rows, blocks = numbers.shape
    index, signs = (words.numpy().reshape(rows, blocks, -1) for words in grid.words(weight.codes))
    parts = _IQ_PARTS[grid.type_name](index, signs, multiples.astype(np.uint8))
    return np.ascontiguousarray(np.concatenate([half, *parts], -1).reshape(rows, -1))


def encode_ternary(weight: QuantizedWeight) -> Bytes:
    """The bytes of a matrix on a `TernaryGrid`, shape (rows, bytes)."""
    assert isinstance(weight.grid, TernaryGrid)
    half = weight.params.scale.numpy().astype("<f2").view(np.uint8)
    codes = weight.codes.numpy().reshape(*half.shape[:2], SUPER_BLOCK)
    if weight.grid.kind == "TQ1_0":
        packed = to_trits(codes.reshape(-1, SUPER_BLOCK)).reshape(*half.shape[:2], -1)
    else:
        packed = bit_fields(codes, 32, 2, 4)
    return np.ascontiguousarray(np.concatenate([packed, half], -1).reshape(len(codes), -1))


def words(numbers: Bytes, dtype: str) -> Bytes:
    """Whole numbers, shape (..., numbers), as the bytes of words of a numpy dtype such as ``<u2``: (..., bytes)."""
    return np.ascontiguousarray(numbers.astype(dtype)).view(np.uint8).reshape(*numbers.shape[:-1], -1)


def _signs_and_scales(signs: Bytes, multiples: Bytes) -> Bytes:
    """Words of 32 bits: four times seven signs, then the multiple of the scale."""
    four = (signs & 127).astype(np.uint32).reshape(*multiples.shape, 4)
    shifted = sum(four[..., i] << 7 * i for i in range(4))
    return np.asarray(shifted | multiples.astype(np.uint32) << 28)


def _iq2_xxs(index: Bytes, signs: Bytes, multiples: Bytes) -> list[Bytes]:
    points = index.astype(np.uint8).reshape(*multiples.shape, 4)
    words = _signs_and_scales(signs, multiples)[..., None].astype("<u4").view(np.uint8)
    return [np.concatenate([points, words], -1).reshape(*index.shape[:-1], -1)]


def _iq2_xs(index: Bytes, signs: Bytes, multiples: Bytes) -> list[Bytes]:
    return [words(index | (signs.astype(np.int64) & 127) << 9, "<u2"), bit_fields(multiples, 1, 4, 2)]


def _iq2_s(index: Bytes, signs: Bytes, multiples: Bytes) -> list[Bytes]:
    low, high = index.astype(np.uint8), (index >> 8).astype(np.uint8)
    return [low, signs, bit_fields(high, 1, 2, 4), bit_fields(multiples, 1, 4, 2)]


def _iq3_xxs(index: Bytes, signs: Bytes, multiples: Bytes) -> list[Bytes]:
    return [index.astype(np.uint8), words(_signs_and_scales(signs, multiples), "<u4")]


def _iq3_s(index: Bytes, signs: Bytes, multiples: Bytes) -> list[Bytes]:
    low, high = index.astype(np.uint8), (index >> 8).astype(np.uint8)
    return [low, bit_fields(high, 1, 1, 8), signs, bit_fields(multiples, 1, 4, 2)]


def bit_fields(codes: Bytes, length: int, shift: int, count: int) -> Bytes:
    """`count` neighbouring runs of `length` codes as fields of `shift` bits: the first run in the lowest bits."""
    runs = codes.reshape(*codes.shape[:-1], -1, count, length)
    fields = sum(runs[..., i, :] << shift * i for i in range(count))
    return np.asarray(fields, np.uint8).reshape(*codes.shape[:-1], -1)


def _q2_k(codes: Bytes, multiples: Bytes, half: Bytes) -> list[Bytes]:
    return [multiples[..., 0] | multiples[..., 1] << 4, bit_fields(codes, 32, 2, 4), half]


def _q3_k(codes: Bytes, multiples: Bytes, half: Bytes) -> list[Bytes]:
    scale = multiples[..., 0]
    low = bit_fields(scale & 15, 8, 4, 2)
    high = bit_fields(scale >> 4, 4, 2, 4)
    return [bit_fields(codes >> 2, 32, 1, 8), bit_fields(codes & 3, 32, 2, 4), low, high, half]


def _six_bits(multiples: Bytes) -> Bytes:
    """Scales and offsets of 8 groups, 6 bits each, in 12 bytes."""
    scale, offset = multiples[..., 0], multiples[..., 1]
    first = scale[..., :4] | scale[..., 4:] >> 4 << 6
    second = offset[..., :4] | offset[..., 4:] >> 4 << 6
    return np.concatenate([first, second, scale[..., 4:] & 15 | (offset[..., 4:] & 15) << 4], -1)


def _q4_k(codes: Bytes, multiples: Bytes, half: Bytes) -> list[Bytes]:
    return [half, _six_bits(multiples), bit_fields(codes, 32, 4, 2)]


def _q5_k(codes: Bytes, multiples: Bytes, half: Bytes) -> list[Bytes]:
    return [half, _six_bits(multiples), bit_fields(codes >> 4, 32, 1, 8), bit_fields(codes & 15, 32, 4, 2)]


def _q6_k(codes: Bytes, multiples: Bytes, half: Bytes) -> list[Bytes]:
    signed = multiples[..., 0] - np.uint8(128)  # modulo 256: two's complement
    return [bit_fields(codes & 15, 64, 4, 2), bit_fields(codes >> 4, 32, 2, 4), signed, half]


def _iq4_xs(codes: Bytes, multiples: Bytes, half: Bytes) -> list[Bytes]:
    scale = multiples[..., 0]
    pairs = scale.reshape(*scale.shape[:-1], 4, 2) & 15
    return [half, bit_fields(scale >> 4, 1, 2, 4), pairs[..., 0] | pairs[..., 1] << 4, bit_fields(codes, 16, 4, 2)]


_IQ_PARTS = {"IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs, "IQ3_S": _iq3_s}
_PARTS = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_XS": _iq4_xs}
