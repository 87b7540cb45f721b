"""Integer grids whose zero point is a fraction: evenly spaced numbers that need not contain 0."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import GroupParams, GroupSize
from gyroquant.grids.bitpack import pack, unpack
from gyroquant.grids.even import EvenGrid

_ZERO_CODES = 255  # a zero point is one of 256 numbers from 0 to the last code


class RealZeroGrid(EvenGrid):
    """Codes 0 .. 2^bits - 1 that stand for ``(code - zero) * scale``, with an fp16 scale and an 8-bit zero point.

    The range is from the smallest to the largest number of a group, always contains 0, and both ends are multiplied by
    `clip`. The zero point is a multiple of ``(2^bits - 1) / 255`` and so, unlike that of the integer grid, not a code.
    At 2 bits the integer grid has four zero points to choose from, and moves its numbers by up to a sixth of the range
    to put 0 on one of them. This grid follows the range to 1/255 of it, as HQQ's real zero points do. It takes
    `8 - bits` bits a group more than the integer grid, and 8 fewer than `FloatZeroGrid`, whose search is too slow for
    activations.

    It suits activations and the KV cache, where 0 is a number like others. Source: the rounding of KV caches in KIVI
    (arXiv 2402.02750) and OSCAR (arXiv 2605.17757), which store the smallest number of a group in 16 bits.
    """

    has_bit_widths: ClassVar[bool] = True
    real_zeros: ClassVar[bool] = True

    grid: Literal["real_zero"] = "real_zero"
    bits: Annotated[int, Field(ge=1, le=8)] = 2
    group_size: GroupSize = -1
    clip: Annotated[float, Field(gt=0, le=1)] = 1.0

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(bits=4, group_size=64, clip=0.9), *(cls(bits=bits, group_size=32) for bits in range(1, 9))]

    @property
    def holds_zero(self) -> bool:
        return False

    @property
    def group_bits(self) -> int:
        return 24

    @property
    def zero_step(self) -> float:
        """The distance of neighbouring zero points, in codes."""
        return self._levels / _ZERO_CODES

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(groups, dim=-1, keepdim=True)
        return low.clamp(max=0) * self.clip, high.clamp(min=0) * self.clip

    def _zero(self, zero: Tensor) -> Tensor:
        """The nearest zero points that can be stored."""
        return torch.round(zero / self.zero_step).clamp(0, _ZERO_CODES) * self.zero_step

    def _full_scale(self, groups: Tensor) -> Tensor:
        low, high = self._range(groups)
        return (high - low) / self._levels

    def fit(self, groups: Tensor) -> GroupParams:
        low, high = self._range(groups)
        scale = self._half((high - low) / self._levels)
        return GroupParams(scale, self._zero(-low / scale))

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        return GroupParams(self._clamped(scale, 0), self._zero(zero))

    def rescale(self, params: GroupParams, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        below = params.zero * low
        steps = (below + (self._levels - params.zero) * high) / self._levels  # the length of a new step in old steps
        return params.scale * steps, below / steps

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        zeros = torch.round(params.zero.squeeze(-1) / self.zero_step).to(torch.uint8)
        return {"codes": pack(codes, self.bits), "zeros": zeros} | self._half_arrays(params.scale.squeeze(-1))

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        rows, columns = shape
        groups = columns // self.group_of(columns)
        scale = self._half_restored(arrays, (rows, groups)).unsqueeze(-1)
        if "zeros" not in arrays or arrays["zeros"].numel() != rows * groups:
            raise InputError("the array of zeros of a rounded weight is missing or has a wrong size")
        zero = arrays["zeros"].reshape(rows, groups, 1).float() * self.zero_step
        return unpack(arrays["codes"], self.bits, shape), GroupParams(scale, zero)
