"""Scales in fp16, and a scale of the whole weight where fp16 does not hold them."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from pydantic import PrivateAttr
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import Grid, stored

_TINY = 2.0**-24  # the smallest positive fp16 number
_LARGEST = torch.finfo(torch.float16).max
_ROOM = 13  # the largest group's scale becomes 2^13 to 2^14: above it there is room to grow, below it 27 powers of two
_LEAST_EXPONENT = -110  # of a tensor scale, so that no group's scale is an fp32 subnormal
_NOTHING = 2.0**-24  # of the largest weight: groups below are as good as zero beside it


def half(scale: Tensor) -> Tensor:
    """Scales as fp16 holds them, as fp32, none of them 0. Raises InputError for NaN and for what fp16 cannot hold."""
    scale = scale.half().float()
    if not bool(scale.isfinite().all()):
        raise InputError("a group of numbers is not finite or too large for an fp16 scale (above 65504)")
    return torch.where(scale.abs() < _TINY, _TINY, scale)


class HalfScaleGrid(Grid):
    """Grids that store an fp16 scale for each group.

    fp16 has no numbers between 0 and 6e-8, few up to 6e-5 and none from 65520 on. For a weight whose groups have such
    scales `with_tensor_scale` gives a copy of the grid that stores them over a scale of the whole weight, a power of
    two, as `global` (fp32). Products with it are exact, so groups that fp16 holds come out as they would without it.
    Weights that fp16 serves, all ordinary ones, have none. `params` hold the products.
    """

    _tensor_scale: float | None = PrivateAttr(default=None)

    @property
    def tensor_scale(self) -> float | None:
        """The scale of the whole weight, None where there is none."""
        return self._tensor_scale

    @property
    def tensor_bits(self) -> int:
        return 0 if self._tensor_scale is None else 32

    @property
    def _may_move(self) -> tuple[float, float]:
        """How far fp16 may move scales, as a share of them: those of a weight, root of the mean square (normal numbers
        are moved by 2^-11 at most), and that of any one group.
        """
        return 2.0**-9, 2.0**-6

    @abstractmethod
    def _full_scale(self, groups: Tensor) -> Tensor:
        """The scale with which the numbers span all weights of a group, shape (..., 1), before it is stored."""

    def with_tensor_scale(self, *weights: Tensor) -> Self:
        if self._tensor_scale is not None:
            return self
        scales, peaks = [], []
        for weight in weights:
            groups = self._grouped(weight)
            scales.append(self._full_scale(groups).abs().reshape(-1))
            peaks.append(groups.abs().amax(-1).reshape(-1))
        scale, peak = torch.cat(scales), torch.cat(peaks)
        if not bool(peak.isfinite().all()) or _served(scale, peak, *self._may_move):
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
        """Scales as they can be stored. Raises InputError as `half` does."""
        known = self._tensor_scale
        return half(scale) if known is None else half(scale / known) * known

    def _clamped(self, scale: Tensor, low: float) -> Tensor:
        """The nearest scale to each that can be stored, from `low` on, none of them 0."""
        known = self._tensor_scale or 1.0
        return self._half(scale.clamp(low, _LARGEST * known))

    def _half_arrays(self, scale: Tensor) -> dict[str, Tensor]:
        """What is stored for scales that `_half` gave, of shape (rows, groups)."""
        known = self._tensor_scale
        if known is None:
            return {"scales": scale.half()}
        return {"scales": (scale / known).half(), "global": torch.tensor([known], dtype=torch.float32)}

    def _half_restored(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        scale = stored(arrays, "scales", shape).float()
        return scale * stored(arrays, "global", (1,)).float() if "global" in arrays else scale


def _served(scale: Tensor, peak: Tensor, mean: float, one: float) -> bool:
    """Whether fp16 holds the scales of groups without moving them by more; `peak` is the largest magnitude of each."""
    stored_scale = scale.half().float()
    if not bool(stored_scale.isfinite().all()):
        return False
    moved = torch.where(peak > 0, ((stored_scale - scale) / scale).abs(), 0.0)
    largest = peak.max()
    share = (peak / largest.clamp_min(1e-38)).double()  # fp32 has no squares of the smallest
    if bool(((moved > one) & (share > _NOTHING)).any()):
        return False
    return float((moved * share).square().sum()) <= mean**2 * float(share.square().sum())
