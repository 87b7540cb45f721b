"""Integer grids: evenly spaced numbers, one scale and one zero point a group."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids.base import GroupParams, GroupSize
from gyroquant.grids.bitpack import pack, unpack
from gyroquant.grids.even import EvenGrid
from gyroquant.grids.exact import prefer_exact

_SHRINK = tuple(1.0 - 0.02 * i for i in range(41))  # clipping factors that the MSE search tries


class IntegerGrid(EvenGrid):
    """Codes 0 .. 2^bits - 1 that stand for ``(code - zero) * scale``, with the scale stored in fp16.

    Asymmetric: the range is from the smallest to the largest weight of a group and always contains 0. The zero point is
    an integer of `bits` bits.

    Symmetric: the full range is used, as in llama.cpp and auto-round. The weight of largest magnitude becomes code 0,
    i.e. -2^(bits-1) steps. The scale may therefore be negative. No zero point is stored. One symmetric bit is +-scale/2
    with the scale of least squared error.

    `midrise` (symmetric only): the numbers lie at odd multiples of half a step, equally many on both sides and none at
    zero. At 2 bits this is 0.4 to 0.8 dB better for Gaussian weights than any grid that holds zero. QuIP (arXiv
    2307.13304) rounds in this way.

    `scale`: `minmax` takes the range of the group with both ends multiplied by `clip`. `mse` takes the clipped range
    with the least squared error. `mse` also finds the scale of a group that already lies on such numbers.
    """

    has_bit_widths: ClassVar[bool] = True
    plain_integers: ClassVar[bool] = True
    fits: ClassVar[tuple[str, ...]] = ("minmax", "mse")

    grid: Literal["integer"] = "integer"
    bits: Annotated[int, Field(ge=1, le=8)] = 4
    group_size: GroupSize = 128
    symmetric: bool = False
    midrise: bool = False
    scale: Literal["minmax", "mse"] = "mse"
    clip: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> IntegerGrid:
        if self.scale == "mse" and self.clip != 1:
            raise ValueError("scale: mse searches for the clipping itself; clip needs scale: minmax")
        if self.midrise and not self.symmetric:
            raise ValueError("midrise: true puts equally many numbers on both sides of zero; it needs symmetric: true")
        return self

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(bits=2, group_size=64),
            cls(bits=3, group_size=-1),
            cls(bits=4, group_size=32, symmetric=True),
            *(
                cls(bits=bits, group_size=size, symmetric=symmetric, scale=scale)
                for bits in range(1, 9)
                for size, symmetric, scale in (
                    (16, False, "minmax"),
                    (64, True, "mse"),
                    (-1, False, "mse"),
                    (32, True, "minmax"),
                )
            ),
            cls(bits=4, group_size=64, scale="minmax", clip=0.9),
            *(cls(bits=bits, group_size=-1, symmetric=True, midrise=True) for bits in (1, 2, 3)),
        ]

    @property
    def holds_zero(self) -> bool:
        return not (self.symmetric and (self.midrise or self.bits == 1))

    @property
    def group_bits(self) -> int:
        return 16 if self.symmetric else 16 + self.bits

    @property
    def _middle(self) -> float:
        return self._levels / 2 if self.midrise or self.bits == 1 else float(2 ** (self.bits - 1))

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of each group's range: (lowest, highest), or (extreme, 0) for symmetric grids."""
        if self.symmetric and self.bits == 1:
            extreme = -groups.abs().mean(
                -1, keepdim=True
            )  # least squares; the largest weight would give far too wide a range
            return extreme, torch.zeros_like(extreme)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if self.symmetric:
            return torch.where(-low > high, low, high), torch.zeros_like(low)
        return low.clamp(max=0), high.clamp(min=0)

    def _params(self, low: Tensor, high: Tensor) -> GroupParams:
        if self.symmetric:
            return GroupParams(self._half(-low / self._middle), torch.full_like(low, self._middle))
        scale = self._half((high - low) / self._levels)
        return GroupParams(scale, torch.round(-low / scale).clamp(0, self._levels))

    def fit(self, groups: Tensor) -> GroupParams:
        low, high = self._range(groups)
        if self.scale == "minmax":
            return self._params(low * self.clip, high * self.clip)
        factors = torch.tensor(_SHRINK, device=low.device)
        params = self.least_squares_of(groups, self._params(low * factors, high * factors))
        return prefer_exact(self, groups, params, self._on_whole_steps(low, high))

    def _on_whole_steps(self, low: Tensor, high: Tensor) -> GroupParams:
        """Parameters that put the ends of each group's range on numbers, coarse steps first: (..., candidates)."""
        if self.symmetric:
            outermost = max(1, 2 ** (self.bits - 1))
            number = torch.arange(1, outermost + 1, device=low.device) - (self._middle % 1)
            scale = -low / number
            return GroupParams(scale, torch.full_like(scale, self._middle))
        scale = (high - low) / torch.arange(1, self._levels + 1, device=low.device)
        return GroupParams(scale, torch.round(-low / scale).nan_to_num(0).clamp(0, self._levels))

    def _full_scale(self, groups: Tensor) -> Tensor:
        low, high = self._range(groups)
        return low / self._middle if self.symmetric else (high - low) / self._levels

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        if self.symmetric:
            return GroupParams(self._clamped(scale, -float("inf")), torch.full_like(zero, self._middle))
        return GroupParams(self._clamped(scale, 0), torch.round(zero).clamp(0, self._levels))

    def rescale(self, params: GroupParams, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            return super().rescale(params, low, high)
        below = params.zero * low
        steps = (below + (self._levels - params.zero) * high) / self._levels  # the length of a new step in old steps
        return params.scale * steps, below / steps

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        arrays = {"codes": pack(codes, self.bits)} | self._half_arrays(params.scale.squeeze(-1))
        if not self.symmetric:
            arrays["zeros"] = pack(params.zero.to(torch.uint8), self.bits)
        return arrays

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        rows, columns = shape
        groups = columns // self.group_of(columns)
        scale = self._half_restored(arrays, (rows, groups)).unsqueeze(-1)
        codes = unpack(arrays["codes"], self.bits, shape)
        if self.symmetric:
            return codes, GroupParams(scale, torch.full_like(scale, self._middle))
        zero = unpack(arrays["zeros"], self.bits, (rows, groups, 1)).float()
        return codes, GroupParams(scale, zero)
