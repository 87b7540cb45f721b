"""Types of ik_llama.cpp, a fork of llama.cpp, in GGUF files: their numbers, their sizes, and decoders.

The layouts are those of ``ggml-common.h`` and ``iqk_quantize.cpp`` of the fork.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gyroquant.grids.iq_kt import MIDDLE, point_codes
from gyroquant.grids.iqk import NUMBERS, SHIFT

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


class IkType(NamedTuple):
    """A type of tensors.

    id: its number in GGUF files.
    file_type: the `file_type` of files that consist mostly of it.
    size: bytes in a block of 256 weights.
    row: bytes before the blocks of a row, which hold its number.
    factor: what the fork's kernels multiply the numbers by in products with matrices, on processors and on GPUs. Its
        decoder of rows (``dequantize_row``), which looks up rows of the embedding, does not.
    """

    id: int
    file_type: int
    size: int
    row: int
    factor: float = 1.0


IK_TYPES = {
    "IQ2_K": IkType(137, 138, 76, 0),
    "IQ3_K": IkType(138, 139, 110, 0),
    "IQ4_K": IkType(139, 140, 144, 0),
    "IQ4_KS": IkType(144, 145, 136, 4),
    "IQ2_KS": IkType(145, 147, 70, 2),
    "IQ2_KT": IkType(153, 151, 68, 4, 1.05),
    "IQ3_KT": IkType(154, 152, 100, 4, 1.01),
    "IQ4_KT": IkType(155, 153, 128, 4),
    "IQ3_KS": IkType(156, 154, 102, 2),
}


class _Parts(NamedTuple):
    """The parts of blocks, shape (rows, blocks, ...).

    multiples: of the scales of groups, whole numbers.
    choices: a bit for each group.
    codes: those of weights, or numbers in units of the scale.
    """

    multiples: NDArray[Any]
    choices: NDArray[Any]
    codes: NDArray[Any]


def _fields(data: Bytes, bits: int, length: int) -> Bytes:
    """The codes in bytes: fields of `bits` bits in runs of `length` bytes, those of the lowest fields first."""
    runs = data.reshape(*data.shape[:-1], -1, 1, length)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return np.asarray(runs >> shifts & np.uint8((1 << bits) - 1)).reshape(*data.shape[:-1], -1)


def _cut(blocks: Bytes, *sizes: int) -> list[Bytes]:
    """The parts of blocks that have these numbers of bytes."""
    return [np.ascontiguousarray(part) for part in np.split(blocks, np.cumsum(sizes)[:-1], axis=-1)]


def _signed(codes: NDArray[Any]) -> NDArray[np.int16]:
    return codes.astype(np.int16)


def _iq2_k(blocks: Bytes) -> _Parts:
    extra, scales, codes = _cut(blocks, 2, 8, 64)
    return _Parts(_signed(_fields(scales, 4, 1)) - 8, _fields(extra, 1, 1), _fields(codes, 2, 32))


def _iq2_ks(blocks: Bytes) -> _Parts:
    extra, scales, codes = _cut(blocks, 2, 4, 64)
    bits = _fields(extra, 1, 1)
    multiples = _signed(_fields(scales, 4, 1) | bits[..., 8:] << 4) - 16
    return _Parts(multiples, bits[..., :8], _fields(codes, 2, 32))


def _iq3_k(blocks: Bytes) -> _Parts:
    extra, high, scales, low, top = _cut(blocks, 2, 2, 8, 64, 32)
    sizes, negative = 2 * _signed(_fields(scales, 4, 1)) + 1, _fields(high, 1, 1) > 0
    codes = _fields(low, 2, 32) | _fields(top, 1, 32) << 2
    return _Parts(np.where(negative, -sizes, sizes), _fields(extra, 1, 1), codes)


def _iq3_ks(blocks: Bytes) -> _Parts:
    extra, scales, low, top = _cut(blocks, 2, 4, 64, 32)
    bits = _fields(extra, 1, 1)
    multiples = _signed(_fields(scales, 4, 4) | bits[..., :8] << 4) - 16
    return _Parts(multiples, bits[..., 8:], _fields(low, 2, 32) | _fields(top, 1, 32) << 2)


def _iq4_k(blocks: Bytes) -> _Parts:
    extra, high, scales, codes = _cut(blocks, 2, 4, 8, 128)
    multiples = _signed(_fields(scales, 4, 1) | _fields(high, 2, 1) << 4) - 32
    return _Parts(multiples, _fields(extra, 1, 1), _fields(codes, 4, 16))


def _iq4_ks(blocks: Bytes) -> _Parts:
    scales, codes = _cut(blocks, 8, 128)
    return _Parts(2 * _signed(scales >> 1) - 127, scales & 1, _fields(codes, 4, 16))


def _numbers_of(bits: int, place: NDArray[Any], second: bool = False) -> NDArray[np.int16]:
    """The coordinates of points, shape (..., coordinates of all points)."""
    numbers = _signed(point_codes(bits, second).numpy()) - MIDDLE
    return numbers[place].reshape(*place.shape[:-1], -1)


def _iq2_kt(blocks: Bytes) -> _Parts:
    scales, places = _cut(blocks, 4, 64)
    multiples = np.array(NUMBERS[4], np.int16)[_fields(scales, 4, 4)]
    return _Parts(multiples, np.zeros_like(multiples), _numbers_of(2, places.view("<u2")))


def _iq3_kt(blocks: Bytes) -> _Parts:
    scales, places, signs = _cut(blocks, 4, 64, 32)
    multiples, sizes = _signed(_fields(scales, 4, 4)), _numbers_of(3, places.view("<u2"))
    return _Parts(multiples, np.zeros_like(multiples), np.where(_fields(signs, 1, 32) > 0, -sizes, sizes))


def _iq4_kt(blocks: Bytes) -> _Parts:
    words, low, middle = _cut(blocks, 32, 64, 32)
    word = words.view("<u4")
    high = (word[..., None] >> np.arange(8, 32, 3, dtype=np.uint32) & 7).reshape(low.shape)
    place = low.astype(np.int64) | _fields(middle, 4, 32).astype(np.int64) << 8 | high.astype(np.int64) << 12
    second = np.repeat((word & 1) > 0, 32, axis=-1)
    numbers = np.where(second, _numbers_of(4, place, True), _numbers_of(4, place))
    multiples = (word >> 1 & 127).astype(np.int16) - 64
    return _Parts(multiples, np.zeros_like(multiples), numbers)


_PARTS: Mapping[str, Callable[[Bytes], _Parts]] = {
    "IQ2_K": _iq2_k,
    "IQ3_K": _iq3_k,
    "IQ4_K": _iq4_k,
    "IQ4_KS": _iq4_ks,
    "IQ2_KS": _iq2_ks,
    "IQ2_KT": _iq2_kt,
    "IQ3_KT": _iq3_kt,
    "IQ4_KT": _iq4_kt,
    "IQ3_KS": _iq3_ks,
}


def decode_ik(raw: Bytes, name: str, factor: float = 1.0) -> Floats:
    """The numbers of whole rows, fp32, shape (rows, columns), from their bytes, shape (rows, bytes).

    With `factor` 1, those of the fork's decoder of rows. With that of the type, those of its products with matrices.
    """
    kind, rows = IK_TYPES[name], len(raw)
    number = np.ascontiguousarray(raw[:, : kind.row]).view("<f4" if kind.row == 4 else "<f2")[..., None]
    blocks = raw[:, kind.row :].reshape(rows, -1, kind.size)
    if not kind.row:
        number, blocks = np.ascontiguousarray(blocks[..., :2]).view("<f2"), blocks[..., 2:]
    parts = _PARTS[name](blocks)
    steps = parts.codes
    if not name.endswith("KT"):
        bits = int(name[2])
        steps = np.array(NUMBERS[bits], np.int16)[steps]
        steps = steps + SHIFT[bits] * np.repeat(parts.choices, 256 // parts.choices.shape[-1], -1).astype(np.int16)
    scale = number.astype(np.float32) * np.float32(factor) * parts.multiples.astype(np.float32)
    return (np.repeat(scale, 256 // scale.shape[-1], -1) * steps.astype(np.float32)).reshape(rows, -1)
