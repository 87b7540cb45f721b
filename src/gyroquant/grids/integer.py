"""Integer grids: evenly spaced numbers, one scale and one zero point a group."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.grids.base import Grid, GroupParams
from gyroquant.grids.bitpack import pack, unpack

_TINY = 2.0**-24  # the smallest positive fp16 number
_SHRINK = tuple(1.0 - 0.02 * i for i in range(41))  # clipping factors that the MSE search tries


def _group_size(value: int) -> int:
    if value == -1 or 16 <= value <= 256:
        return value
    raise ValueError("group_size is -1 (one group a row) or between 16 and 256")


class IntegerGrid(Grid):
    """Codes 0 .. 2^bits - 1 that stand for ``(code - zero) * scale``, with the scale stored in fp16.

    Asymmetric grids span the smallest to the largest weight of a group, always holding 0, with an integer zero point
    of `bits` bits. Symmetric grids use their full range as llama.cpp and auto-round do: the weight of largest
    magnitude becomes code 0, i.e. -2^(bits-1) steps, by a scale that may be negative, and no zero point is stored. One
    symmetric bit is +-scale/2 with the scale that fits best. `scale` chooses between the range of the group (`minmax`)
    and the clipped range with the least squared error (`mse`).
    """

    grid: Literal["integer"] = "integer"
    bits: Annotated[int, Field(ge=1, le=8)] = 4
    group_size: Annotated[int, AfterValidator(_group_size)] = 128
    symmetric: bool = False
    scale: Literal["minmax", "mse"] = "mse"

    @property
    def _levels(self) -> int:
        return int(2**self.bits - 1)

    @property
    def _middle(self) -> float:
        return 0.5 if self.bits == 1 else float(2 ** (self.bits - 1))

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The ends of each group's range: (lowest, highest), or for symmetric grids (extreme, 0)."""
        if self.symmetric and self.bits == 1:
            extreme = -groups.abs().mean(-1, keepdim=True)  # least squares; the largest would be far too wide
            return extreme, torch.zeros_like(extreme)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if self.symmetric:
            return torch.where(-low > high, low, high), torch.zeros_like(low)
        return low.clamp(max=0), high.clamp(min=0)

    def _params(self, low: Tensor, high: Tensor) -> GroupParams:
        if self.symmetric:
            zero = torch.full_like(low, self._middle)
            scale = -low / self._middle
        else:
            zero = torch.zeros_like(low)
            scale = (high - low) / self._levels
        scale = scale.half().float()
        if not bool(scale.isfinite().all()):
            raise InputError("a group of weights is too large for an fp16 scale (above 65504)")
        scale = torch.where(scale.abs() < _TINY, torch.full_like(scale, _TINY), scale)
        if not self.symmetric:
            zero = torch.round(-low / scale).clamp(0, self._levels)
        return GroupParams(scale, zero)

    def fit(self, groups: Tensor) -> GroupParams:
        low, high = self._range(groups)
        best = self._params(low, high)
        if self.scale == "minmax":
            return best
        error = self._error(groups, best)
        for factor in _SHRINK[1:]:
            tried = self._params(low * factor, high * factor)
            tried_error = self._error(groups, tried)
            better = tried_error < error
            error = torch.where(better, tried_error, error)
            best = GroupParams(torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero))
        return best

    def _error(self, groups: Tensor, params: GroupParams) -> Tensor:
        return (self.decode(self.encode(groups, params), params) - groups).square().sum(-1, keepdim=True)

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        return torch.round(weights / params.scale + params.zero).clamp(0, self._levels).to(torch.uint8)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        return (codes.float() - params.zero) * params.scale

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        arrays = {"codes": pack(codes, self.bits), "scales": params.scale.squeeze(-1).half()}
        if not self.symmetric:
            arrays["zeros"] = pack(params.zero.to(torch.uint8), self.bits)
        return arrays

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        rows, columns = shape
        groups = columns // self.group_of(columns)
        if tuple(arrays["scales"].shape) != (rows, groups):
            raise InputError(f"scales of shape {tuple(arrays['scales'].shape)} where ({rows}, {groups}) is expected")
        codes = unpack(arrays["codes"], self.bits, shape)
        scale = arrays["scales"].float().unsqueeze(-1)
        if self.symmetric:
            return codes, GroupParams(scale, torch.full_like(scale, self._middle))
        zero = unpack(arrays["zeros"], self.bits, (rows, groups, 1)).float()
        return codes, GroupParams(scale, zero)
