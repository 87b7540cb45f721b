"""Decoding that several formats share: bit streams, 4-bit elements, powers of two, scales of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from gyroquant.errors import InputError

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of `bits` bits (1 to 8) in each row: integer words (..., words) -> uint8 (..., count).

    Codes follow one another without gaps, least significant bit first, across words. Raises InputError if the words are
    not integers or hold too few codes.
    """
    if words.is_floating_point() or not 1 <= bits <= 8:
        raise InputError(f"codes of {bits} bits in {words.dtype} cannot be unpacked")
    data = words.contiguous().view(torch.uint8)
    if data.shape[-1] * 8 < count * bits:
        raise InputError(f"{data.shape[-1]} bytes a row cannot hold {count} codes of {bits} bits")
    lanes = -(-count // 8)  # groups of eight codes, which begin and end on a byte
    data = torch.nn.functional.pad(data[..., : lanes * bits], (0, max(0, lanes * bits - data.shape[-1])))
    data = data.reshape(*data.shape[:-1], lanes, bits)
    out = torch.empty(*data.shape[:-1], 8, dtype=torch.uint8)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        code = data[..., byte] >> shift
        if shift + bits > 8:
            code |= data[..., byte + 1] << (8 - shift)
        out[..., lane] = code & ((1 << bits) - 1)
    return out.flatten(-2)[..., :count]


def unpack_padded(words: Tensor, bits: int, count: int) -> Tensor:
    """As `unpack`, for int32 words that hold 32 // bits whole codes each. Their highest bits are unused."""
    per_word = 32 // bits
    if words.dtype != torch.int32 or words.shape[-1] * per_word < count:
        raise InputError(f"{words.shape[-1]} words of {words.dtype} cannot hold {count} codes of {bits} bits")
    shifts = torch.arange(per_word, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :count]


def e2m1(data: Tensor) -> Tensor:
    """4-bit elements (E2M1), two in a byte, the lower half first: (..., n) bytes -> fp32 (..., 2 n)."""
    data = data.contiguous().view(torch.uint8)
    pairs = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
    return _E2M1[pairs.int()]


def e8m0(exponents: Tensor) -> Tensor:
    """Powers of two from their exponent plus 127: uint8 or float8_e8m0fnu -> fp32. 255 is NaN."""
    return exponents.contiguous().view(torch.float8_e8m0fnu).float()


def scale_blocks(values: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiplies fp32 values (..., rows, columns) by the scale of their block, in place, and returns them.

    `scales` has the shape (..., ceil(rows / block[0]), ceil(columns / block[1])): the last blocks may be incomplete.
    Raises InputError for any other shape.
    """
    rows, columns = values.shape[-2:]
    high, wide = min(block[0], rows), min(block[1], columns)
    if tuple(scales.shape[-2:]) != (-(-rows // high), -(-columns // wide)):
        raise InputError(f"scales of shape {tuple(scales.shape)} do not fit blocks of {block} in {tuple(values.shape)}")
    scales = scales.float()
    if high == 1 and columns % wide == 0:
        values.unflatten(-1, (-1, wide)).mul_(scales.unsqueeze(-1))
        return values
    for number, start in enumerate(range(0, rows, high)):
        along = scales[..., number, :].repeat_interleave(wide, -1)[..., :columns]
        values[..., start : start + high, :] *= along.unsqueeze(-2)
    return values
