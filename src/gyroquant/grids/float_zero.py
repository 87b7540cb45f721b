"""Integer codes with a zero point that is any number, so that every group has a free offset."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids.base import GroupParams, GroupSize, stored
from gyroquant.grids.bitpack import pack, unpack
from gyroquant.grids.even import EvenGrid
from gyroquant.grids.exact import prefer_exact
from gyroquant.grids.zero_search import search

_FINEST = 2.0**-10  # the smallest scale as a share of the largest weight of a group: fp16 zero points are no finer


class FloatZeroGrid(EvenGrid):
    """Codes 0 .. 2^bits - 1 that stand for ``(code - zero) * scale``, with scale and zero point in fp16.

    The range of a group need not contain 0, and no number need be 0. NeUQI (arXiv 2505.17595) rounds in this way. At 2
    bits and equal group size, the squared error of normal weights is a sixth lower than with a zero point that is a
    code; the offset costs ``16 - bits`` bits a group more. The zero point is stored in steps, not as the offset
    ``-zero * scale``: so OpenVINO and ONNX Runtime take it as it is. MLX stores the offset, rounded to fp16.

    `scale`: `minmax` puts the ends of the group's range on the outermost codes. `mse` searches scale and zero point for
    the least squared error, see `gyroquant.grids.zero_search`. `mse` also finds the numbers of a group that already
    lies on such a grid.
    """

    has_bit_widths: ClassVar[bool] = True
    float_zero: ClassVar[bool] = True
    fits: ClassVar[tuple[str, ...]] = ("minmax", "mse")

    grid: Literal["float_zero"] = "float_zero"
    bits: Annotated[int, Field(ge=1, le=8)] = 2
    group_size: GroupSize = 64
    scale: Literal["minmax", "mse"] = "mse"

    _quick: bool = PrivateAttr(default=False)

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(bits=2, group_size=64),
            cls(bits=3, group_size=-1),
            cls(bits=4, group_size=32, scale="minmax"),
            *(
                cls(bits=bits, group_size=size, scale=scale)
                for bits in range(1, 9)
                for size, scale in ((32, "minmax"), (64, "mse"), (-1, "mse"))
            ),
        ]

    @property
    def holds_zero(self) -> bool:
        return False

    @property
    def group_bits(self) -> int:
        return 32

    @property
    def quick(self) -> Self:
        if self._quick:
            return self
        quick = self.model_copy()
        quick._quick = True
        return quick

    def _full_scale(self, groups: Tensor) -> Tensor:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        finest = torch.maximum(high, -low) * _FINEST
        return torch.maximum(high / self._levels - low / self._levels, finest)

    def fit(self, groups: Tensor) -> GroupParams:
        low, full = groups.amin(-1, keepdim=True), self._half(self._full_scale(groups))
        whole = GroupParams(full, _storable(-low / full))
        if self.scale == "minmax":
            return whole
        found = search(groups.reshape(-1, groups.shape[-1]), self._levels, self._quick)
        scale, zero = (x.view(low.shape) for x in found)
        # Coarser where fp16 could not hold the zero point: the middle of the codes stays where it was.
        storable = self._half(torch.maximum(scale, groups.abs().amax(-1, keepdim=True) * _FINEST))
        middle = self._levels / 2
        zero = middle - (middle - zero) * (scale / storable)
        params = self.least_squares(groups, (whole, GroupParams(storable, _storable(zero))))
        return prefer_exact(self, groups, params, self._on_whole_steps(groups))

    def _on_whole_steps(self, groups: Tensor) -> GroupParams:
        """Parameters that put the ends of each group's range on numbers, coarse steps first: (..., candidates)."""
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = (high - low) / torch.arange(1, self._levels + 1, device=low.device)
        return GroupParams(scale, (-low / scale).nan_to_num(0, 0, 0))

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        return GroupParams(self._clamped(scale, 0), _storable(zero))

    def rescale(self, params: GroupParams, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point after the distances of both ends from the middle of the range are multiplied by these
        factors. Relative to 0, as on other grids, the ends of a range without 0 could change places.
        """
        half = self._levels / 2
        steps = (low + high) / 2  # the length of a new step in old ones
        return params.scale * steps, (params.zero - half + half * low) / steps

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        arrays = {"codes": pack(codes, self.bits)} | self._half_arrays(params.scale.squeeze(-1))
        return arrays | {"zeros": params.zero.squeeze(-1).half()}

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        rows, columns = shape
        groups = (rows, columns // self.group_of(columns))
        scale = self._half_restored(arrays, groups).unsqueeze(-1)
        zero = stored(arrays, "zeros", groups).float().unsqueeze(-1)
        return unpack(arrays["codes"], self.bits, shape), GroupParams(scale, zero)


def _storable(zero: Tensor) -> Tensor:
    """The nearest fp16 numbers, as fp32."""
    largest = torch.finfo(torch.float16).max
    return zero.clamp(-largest, largest).half().float()
