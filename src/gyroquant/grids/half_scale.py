"""Scales in fp16, with a tensor scale for weights whose scales fp16 does not hold."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from pydantic import PrivateAttr
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import Grid, GroupParams, stored
from gyroquant.grids.bitpack import pack, unpack

_TINY = 2.0**-24  # the smallest positive fp16 number
_LARGEST = torch.finfo(torch.float16).max
_ROOM = 13  # the largest group's scale becomes 2^13 to 2^14: it can still grow, and 27 powers of two lie below it
_LEAST_EXPONENT = -110  # of a tensor scale, so that no scale of a group is an fp32 subnormal
_NEGLIGIBLE = 2.0**-24  # of the largest weight: groups whose weights are all below this do not matter


def half(scale: Tensor) -> Tensor:
    """Scales rounded to nonzero fp16 numbers, as fp32. Raises InputError for NaN and for scales too large for fp16."""
    scale = scale.half().float()
    if not bool(scale.isfinite().all()):
        raise InputError("a group of numbers is not finite or too large for an fp16 scale (above 65504)")
    return torch.where(scale.abs() < _TINY, _TINY, scale)


class HalfScaleGrid(Grid):
    """Grids that store an fp16 scale for each group.

    fp16 has no numbers between 0 and 6e-8, few up to 6e-5 and none from 65520 on. For a weight whose groups have such
    scales, `with_tensor_scale` returns a copy of the grid with a tensor scale. It is a power of two, stored as `global`
    (fp32), and the scales are stored divided by it. Products with it are exact, so groups whose scales fp16 holds get
    the same scales as without it. Weights whose scales fp16 holds, which are all ordinary ones, do not get a tensor
    scale. `GroupParams` hold the products.
    """

    _tensor_scale: float | None = PrivateAttr(default=None)

    @property
    def tensor_scale(self) -> float | None:
        """The tensor scale; None if the grid does not have one."""
        return self._tensor_scale

    @property
    def tensor_bits(self) -> int:
        return 0 if self._tensor_scale is None else 32

    @property
    def _may_move(self) -> tuple[float, float]:
        """The largest relative changes of scales by fp16: root mean square over a weight, and of any one group.

        Normal numbers change by 2^-11 at most.
        """
        return 2.0**-9, 2.0**-6

    @abstractmethod
    def _full_scale(self, groups: Tensor) -> Tensor:
        """The scale at which the numbers cover all weights of a group, shape (..., 1), before rounding to fp16."""

    def with_tensor_scale(self, *weights: Tensor) -> Self:
        if self._tensor_scale is not None:
            return self
        scales, peaks = [], []
        for weight in weights:
            groups = self._grouped(weight)
            scales.append(self._full_scale(groups).abs().reshape(-1))
            peaks.append(groups.abs().amax(-1).reshape(-1))
        scale, peak = torch.cat(scales), torch.cat(peaks)
        if not bool(peak.isfinite().all()) or _fp16_suffices(scale, peak, *self._may_move):
            return self
        _, exponent = math.frexp(float(scale.max()))
        return self._with(2.0 ** max(exponent - 1 - _ROOM, _LEAST_EXPONENT))

    def with_stored_scale(self, arrays: dict[str, Tensor]) -> Self:
        return self._with(float(stored(arrays, "global", (1,)))) if "global" in arrays else self

    def _with(self, tensor_scale: float) -> Self:
        bound = self.model_copy()
        bound._tensor_scale = tensor_scale
        return bound

    def _grouped(self, weight: Tensor) -> Tensor:
        columns = weight.shape[-1]
        whole = self.group_size == -1 or columns % self.group_size
        return weight.detach().float().unflatten(-1, (-1, columns if whole else self.group_size))

    def _half(self, scale: Tensor) -> Tensor:
        """Scales rounded to storable values. Raises InputError as `half` does."""
        tensor_scale = self._tensor_scale
        return half(scale) if tensor_scale is None else half(scale / tensor_scale) * tensor_scale

    def _clamped(self, scale: Tensor, low: float) -> Tensor:
        """The nearest storable scales that are not below `low` and not 0."""
        tensor_scale = self._tensor_scale or 1.0
        return self._half(scale.clamp(low, _LARGEST * tensor_scale))

    def _half_arrays(self, scale: Tensor) -> dict[str, Tensor]:
        """The arrays stored for scales from `_half`, shape (rows, groups)."""
        tensor_scale = self._tensor_scale
        if tensor_scale is None:
            return {"scales": scale.half()}
        return {"scales": (scale / tensor_scale).half(), "global": torch.tensor([tensor_scale], dtype=torch.float32)}

    def _half_restored(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        scale = stored(arrays, "scales", shape).float()
        return scale * stored(arrays, "global", (1,)).float() if "global" in arrays else scale


class ScaleOnlyGrid(HalfScaleGrid):
    """Grids that store nothing but codes and an fp16 scale of either sign for each group, and have no number 0."""

    @property
    def holds_zero(self) -> bool:
        return False

    @property
    def group_bits(self) -> int:
        return 16

    def scaled(self, scale: Tensor) -> GroupParams:
        """GroupParams with these scales, rounded to storable values."""
        scale = self._half(scale)
        return GroupParams(scale, torch.zeros_like(scale))

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        return GroupParams(self._clamped(scale, -math.inf), torch.zeros_like(zero))

    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        return {"codes": pack(codes, self.bits)} | self._half_arrays(params.scale.squeeze(-1))

    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        rows, columns = shape
        scale = self._half_restored(arrays, (rows, columns // self.group_of(columns))).unsqueeze(-1)
        return unpack(arrays["codes"], self.bits, shape), GroupParams(scale, torch.zeros_like(scale))


def _fp16_suffices(scale: Tensor, peak: Tensor, mean: float, single: float) -> bool:
    """Whether fp16 changes the scales of groups by no more than `_may_move` allows.

    `peak` is the largest magnitude of each group, `mean` and `single` are the two limits.
    """
    stored_scale = scale.half().float()
    if not bool(stored_scale.isfinite().all()):
        return False
    moved = torch.where(peak > 0, ((stored_scale - scale) / scale).abs(), 0.0)
    largest = peak.max()
    share = (peak / largest.clamp_min(1e-38)).double()  # fp32 does not hold the squares of the smallest
    if bool(((moved > single) & (share > _NEGLIGIBLE)).any()):
        return False
    return float((moved * share).square().sum()) <= mean**2 * float(share.square().sum())
