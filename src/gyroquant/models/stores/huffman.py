"""Stored arrays as Huffman codes of their bytes, without loss: an archive holds codes and scales in this way.

The codes are those of DEFLATE (RFC 1951) without its search for repetitions, which rounded weights do not have. zlib,
which is part of Python, writes and reads them. An array is taken apart so that each byte has one meaning:

- numbers of several bytes become one stream a byte: all low bytes, then all high ones. The low byte of a scale is
  nearly random, the high one is not.
- codes of 3, 5, 6 or 7 bits, which a bit stream spreads over bytes, get bytes of their own: two of 3 bits share one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.grids.bitpack import pack, packed_bytes, unpack

DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32, "int8": torch.int8}
"""The dtypes of arrays that are stored in this way, by name."""
_BITS_A_SYMBOL = 8  # a Huffman code has at least one bit, so a stream holds at most this many bytes a byte


@dataclass(frozen=True)
class HuffmanArray:
    """How an array was taken apart.

    bits: the size of the codes that were given bytes of their own. 8: the array's own bytes were coded.
    dtype, shape: those of the array.
    """

    bits: int
    dtype: str
    shape: tuple[int, ...]

    def describe(self) -> dict[str, Any]:
        """As plain data; `HuffmanArray(**data)` gives it back, with a list as shape."""
        return {"bits": self.bits, "dtype": self.dtype, "shape": list(self.shape)}


def encode(array: Tensor, bits: int) -> tuple[Tensor, HuffmanArray] | None:
    """An array as a stream of bytes, uint8, and how to read it. None if the stream is not smaller than the array.

    bits: the size of the codes in the array, if it is a bit stream. The array's own bytes are tried too.
    """
    name = str(array.dtype).removeprefix("torch.")
    if name not in DTYPES:
        return None
    size, best = array.numel() * array.element_size(), None
    for width in (8, bits) if name == "uint8" and 8 % bits else (8,):
        stream = b"".join(_deflated(plane) for plane in _planes(array, width))
        if len(stream) < size and (best is None or len(stream) < len(best[0])):
            best = stream, HuffmanArray(width, name, tuple(array.shape))
    return None if best is None else (torch.frombuffer(bytearray(best[0]), dtype=torch.uint8), best[1])


def decode(stream: Tensor, how: HuffmanArray) -> Tensor:
    """The array that `encode` was given, bit by bit. Raises InputError for a stream that is damaged."""
    dtype, count = DTYPES[how.dtype], prod(how.shape)
    size = count * dtype.itemsize
    planes, each = (1, _codes(size, how.bits)[1]) if how.bits < 8 else (dtype.itemsize, count)
    data = stream.reshape(-1).numpy().tobytes()
    if stream.dtype != torch.uint8 or planes * each > _BITS_A_SYMBOL * len(data):
        raise InputError(f"{len(data)} bytes of Huffman codes cannot hold an array of {size} bytes")
    parts = []
    for _ in range(planes):
        plane, data = _inflated(data, each)
        parts.append(np.frombuffer(plane, dtype=np.uint8))
    if data:
        raise InputError(f"{len(data)} bytes follow after an array of Huffman codes")
    if how.bits < 8:
        return _joined(parts[0], how.bits, size).view(dtype).reshape(how.shape)
    raw = np.ascontiguousarray(np.stack(parts, axis=1)) if planes > 1 else parts[0].copy()
    return torch.from_numpy(raw).reshape(-1).view(dtype).reshape(how.shape)


def restored(described: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of a parameter as a grid packs them, from those of an archive.

    described: the `HuffmanArray` of each coded array, as plain data, by its part. Arrays that are not in it stay as
    they are. Raises KeyError if one is missing, and InputError if one is damaged.
    """
    decoded = {part: decode(arrays[part], HuffmanArray(**how)) for part, how in described.items()}
    return {**arrays, **decoded}


def _planes(array: Tensor, bits: int) -> list[bytes]:
    """The bytes to code, one string for each byte of a number."""
    raw = array.contiguous().reshape(-1).view(torch.uint8)
    if bits == 8:
        planes = raw.numpy().reshape(-1, array.element_size())
        return [np.ascontiguousarray(planes[:, i]).tobytes() for i in range(planes.shape[1])]
    count, rows = _codes(raw.numel(), bits)
    padded = torch.zeros(packed_bytes(count, bits), dtype=torch.uint8)
    padded[: raw.numel()] = raw
    each = 8 // bits
    codes = np.zeros(rows * each, dtype=np.uint8)
    codes[:count] = unpack(padded, bits, (count,)).numpy()
    columns = codes.reshape(rows, each)
    return [sum((columns[:, i] << (bits * i) for i in range(1, each)), columns[:, 0]).tobytes()]


def _codes(size: int, bits: int) -> tuple[int, int]:
    """The number of codes in a bit stream of `size` bytes, and that of the bytes that hold whole ones."""
    count = -(-8 * size // bits)
    return count, -(-count // (8 // bits))


def _joined(plane: np.ndarray, bits: int, size: int) -> Tensor:
    """The bit stream of `size` bytes whose codes `_planes` gave bytes of their own."""
    columns = [(plane >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)]
    codes = np.stack(columns, axis=1).reshape(-1)[: _codes(size, bits)[0]]
    return pack(torch.from_numpy(np.ascontiguousarray(codes)), bits)[:size]


def _deflated(plane: bytes) -> bytes:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(plane) + coder.flush()


def _inflated(data: bytes, size: int) -> tuple[bytes, bytes]:
    """The first `size` bytes that a stream holds, and what follows after the stream."""
    decoder = zlib.decompressobj(-15)
    try:
        plane = decoder.decompress(data, size) if size else b""
        beyond = decoder.decompress(decoder.unconsumed_tail if size else data, 1)  # reads the mark of the end
    except zlib.error as error:
        raise InputError(f"its Huffman codes are damaged ({error})") from error
    if len(plane) != size or beyond or not decoder.eof:
        raise InputError(f"its Huffman codes do not hold {size} bytes")
    return plane, decoder.unused_data
