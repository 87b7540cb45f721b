"""Dense bit streams: n-bit codes one after another, least significant bit first, padded only at the end."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from gyroquant.errors import InputError

_PIECE = 1 << 22  # codes at a time; a multiple of 8, so that every piece ends on a byte


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes in 0 .. 2^bits - 1, any shape, uint8 -> a flat uint8 stream in row-major order."""
    flat = codes.reshape(-1).cpu().numpy()
    out = np.empty(packed_bytes(flat.size, bits), dtype=np.uint8)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        planes = np.unpackbits(piece[:, None], axis=1, bitorder="little")[:, :bits]
        stream = np.packbits(planes.reshape(-1), bitorder="little")
        out[start * bits // 8 : start * bits // 8 + stream.size] = stream
    return torch.from_numpy(out)


def unpack(stream: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes that `pack` wrote, uint8. Raises InputError if the stream has a wrong length or is not uint8."""
    if stream.dtype != torch.uint8:
        raise InputError(f"codes must be a stream of bytes (uint8), not {stream.dtype}")
    count = prod(shape)
    if stream.numel() != packed_bytes(count, bits):
        raise InputError(
            f"a stream of {stream.numel()} bytes cannot hold {count} codes of {bits} bits, which take "
            f"{packed_bytes(count, bits)}"
        )
    data = stream.reshape(-1).cpu().numpy()
    out = np.empty(count, dtype=np.uint8)
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        first = start * bits // 8
        planes = np.unpackbits(data[first : first + packed_bytes(size, bits)], bitorder="little")[: size * bits]
        out[start : start + size] = np.packbits(planes.reshape(size, bits), axis=1, bitorder="little")[:, 0]
    return torch.from_numpy(out).reshape(shape)
