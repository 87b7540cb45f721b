"""Microscaling grids: E2M1 elements in small groups whose scales take 8 bits each.

Four Over Six (arXiv 2512.02010; github.com/mit-han-lab/fouroversix) is a way of fitting their scales: each group takes
the better of two, one that makes its largest weight 6 and one that makes it 4. There is no element between 4 and 6, so
numbers just below the largest lose most. Codes and scales are those of the plain formats, and so is what reads them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError
from gyroquant.grids.base import GroupParams, stored
from gyroquant.grids.exact import is_given_back
from gyroquant.grids.floating import E2M1_MAX, SCALINGS, E2M1Grid, largest

# Added to the bits of an fp32 number before its exponent is read. `round`: mantissas from 1.75 on go up. `ceil`: all
# above 1.5 go up.
_CARRY = {"floor": 0, "round": 1 << 21, "ceil": (1 << 22) - 1}


class PowerOfTwoGrid(E2M1Grid):
    """Base class of grids with groups of 32, each with a power of two, stored as its exponent plus 127 (E8M0)."""

    scale_step: ClassVar[float] = 1.0

    group_size: Literal[32] = 32

    @property
    def group_bits(self) -> int:
        return 8

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        near = scale.clamp(2.0**-126, 2.0**127).contiguous()
        return self._params(
            near.view(torch.int32) + (1 << 22), 2
        )  # from 1.5 on, the next power of two is as near or nearer

    def _params(self, extreme: Tensor, shift: int) -> GroupParams:
        # The power of two of the largest magnitude becomes 4, two binades above 1. Exponent 0 would be an fp32
        # subnormal, and 255 is NaN.
        exponents = ((extreme >> 23) - 2 + shift).clamp(1, 254)
        return self.scaled((exponents << 23).view(torch.float32))

    def _stored(self, scale: Tensor) -> dict[str, Tensor]:
        return {"scales": (scale.view(torch.int32) >> 23).to(torch.uint8)}

    def _restored(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return stored(arrays, "scales", shape).view(torch.float8_e8m0fnu).float()

    def _powers(self, groups: Tensor, rounding: str) -> Iterator[GroupParams]:
        """The powers of two that `scale_rounding` allows for groups of shape (..., 32), the usual one first."""
        peak = largest(groups)
        extreme = peak.view(torch.int32)
        if rounding == "mse":
            yield from (self._params(extreme, shift) for shift in (0, 1, -1))
        elif rounding == "four_over_six":
            zero = torch.zeros_like(peak)
            yield from (self.round_params(peak / element, zero) for element in (E2M1_MAX, 4.0))
        else:
            yield self._params(extreme + _CARRY[rounding], 0)


class Mxfp4Grid(PowerOfTwoGrid):
    """MXFP4 (OCP Microscaling Formats 1.0): groups of 32, each with a power of two, stored as its exponent plus 127.

    `scale_rounding` chooses the power of two, for the largest magnitude ``m = 1.f * 2^e`` of a group:

    - `floor`: ``2^(e - 2)``, as in the specification. m lies below 8 steps, and what lies above 6 steps is clipped.
    - `round`: as `floor`, with the exponent of m after rounding m to one mantissa bit. 7 steps or more thus become 4
      steps of twice the size.
    - `ceil`: the smallest power of two that clips nothing.
    - `mse`: the one of ``2^(e - 3)`` to ``2^(e - 1)`` with the least squared error.
    - `four_over_six`: the power of two nearest to m / 6, or that nearest to m / 4 if its squared error is less. The
      choice is ours: the original code has both, rounded up, for all groups alike. Of two powers of two that clip
      nothing, the smaller one never has the larger error.
    """

    grid: Literal["mxfp4"] = "mxfp4"
    scale_rounding: Literal["floor", "round", "ceil", "mse", "four_over_six"] = "floor"

    @classmethod
    def examples(cls) -> list[Self]:
        roundings: tuple[Any, ...] = ("floor", "round", "ceil", "mse", "four_over_six")
        return [cls(scale_rounding=rounding) for rounding in roundings]

    def fit(self, groups: Tensor) -> GroupParams:
        powers = list(self._powers(groups, self.scale_rounding))
        return powers[0] if len(powers) == 1 else self.least_squares(groups, powers)


_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = 448.0
_FOUR_OVER_SIX_MAX = 256.0  # one and a half times as much, 384, is an E4M3 number too
_E4M3_TINY = 2.0**-9
_LEAST = 2.0**-100  # of tensor scales, so that no scale is an fp32 subnormal


def _possible_scales(widest: float, peaks: Tensor, elements: tuple[float, ...]) -> list[float]:
    """The tensor scales at which a weight may already lie on the grid, from the largest magnitudes of its groups.

    The largest weight is an element times a group scale, and so is the largest weight of each group. `widest` is the
    tensor scale for the largest element and the largest group scale. `elements` are the large elements.
    """
    possible = []
    for element in elements:
        for group in (240, *range(256, int(_E4M3_MAX) + 1, 32)):  # one for each mantissa
            scale = widest * (E2M1_MAX * _E4M3_MAX) / (element * group)
            wanted = peaks / scale / torch.tensor(elements, device=peaks.device)
            near = wanted.clamp(max=_E4M3_MAX).to(_E4M3).float()
            if bool((((near - wanted).abs() <= 2.0**-8 * wanted).any(-1) | (peaks[:, 0] == 0)).all()):
                possible.append(scale)
    return possible


class TensorScaleGrid(E2M1Grid):
    """Base class of grids with groups of 16, each with an E4M3 scale, and one fp32 tensor scale.

    A grid must be bound to a weight (`with_tensor_scale`) before it can fit or pack. If it is not bound, `fake` gives
    each row its own tensor scale, so that tokens do not depend on each other. The scales in `GroupParams` are the
    products of group scale and tensor scale. The tensor scale makes the largest weight the largest element of a group
    with the largest scale. With `mse`, it may be another element or group scale, if the weight already lies on the
    grid.
    """

    scale_step: ClassVar[float] = 2.0**-3

    group_size: Literal[16] = 16
    scale: str
    _tensor_scale: float | None = PrivateAttr(default=None)

    @property
    def group_bits(self) -> int:
        return 8

    @property
    def tensor_scale(self) -> float:
        """The tensor scale, an fp32 number. Raises InputError for a grid that is not bound."""
        if self._tensor_scale is None:
            raise InputError(
                f"an {self.grid} grid needs the tensor scale of the whole weight: call with_tensor_scale(weight) first"
            )
        return self._tensor_scale

    @property
    def _largest_scale(self) -> float:
        """The scale of the group of the largest weight, before the tensor scale."""
        return _E4M3_MAX

    @property
    def _large_elements(self) -> tuple[float, ...]:
        """The elements above half the largest one: the largest weight of a group that lies on the grid is one."""
        return (E2M1_MAX, 4.0)

    @abstractmethod
    def _candidates(self, wide: Tensor, tensor_scale: Tensor) -> list[GroupParams]:
        """The parameters that a group may get. At the scale `wide`, its largest weight becomes the largest element."""

    def _whole_scale(self, extreme: Tensor) -> Tensor:
        """The tensor scale at which the largest weight becomes the largest element of the group of largest scale."""
        return (extreme / (E2M1_MAX * self._largest_scale)).clamp(min=_LEAST)

    def _as_tensor(self, device: torch.device) -> Tensor:
        return torch.tensor([self.tensor_scale], dtype=torch.float32, device=device)

    def with_tensor_scale(self, *weights: Tensor) -> Self:
        if self._tensor_scale is not None:
            return self
        widest = max(float(self._whole_scale(largest(weight.float().reshape(1, -1)))) for weight in weights)
        if self.scale == "mse" and widest > _LEAST:
            groups = [weight.detach().float().reshape(-1, self.group_size) for weight in weights]
            peaks = torch.cat([largest(rows) for rows in groups])
            for scale in _possible_scales(widest, peaks, self._large_elements):
                bound = self._with(scale)
                if all(bool(is_given_back(bound, rows, bound.fit(rows)).all()) for rows in groups):
                    return bound
        return self._with(widest)

    def with_stored_scale(self, arrays: dict[str, Tensor]) -> Self:
        return self._with(float(stored(arrays, "global", (1,))))

    def _with(self, tensor_scale: float) -> Self:
        bound = self.model_copy()
        bound._tensor_scale = tensor_scale
        return bound

    @property
    def tensor_bits(self) -> int:
        return 32

    def fit(self, groups: Tensor) -> GroupParams:
        return self._fit(groups, largest(groups), self._as_tensor(groups.device))

    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        tensor_scale = self._as_tensor(scale.device)
        return self._params(scale / tensor_scale, tensor_scale)

    def _fit_rows(self, groups: Tensor) -> GroupParams:
        if self._tensor_scale is not None:
            return self.fit(groups)
        extreme = largest(groups)
        return self._fit(groups, extreme, self._whole_scale(extreme.amax(-2, keepdim=True)))

    def _fit(self, groups: Tensor, extreme: Tensor, tensor_scale: Tensor) -> GroupParams:
        candidates = self._candidates(extreme / E2M1_MAX / tensor_scale, tensor_scale)
        return candidates[0] if len(candidates) == 1 else self.least_squares(groups, candidates)

    def _params(self, wanted: Tensor, tensor_scale: Tensor) -> GroupParams:
        return self.scaled(wanted.clamp(_E4M3_TINY, _E4M3_MAX).to(_E4M3).float() * tensor_scale)

    def _stored(self, scale: Tensor) -> dict[str, Tensor]:
        tensor_scale = self._as_tensor(scale.device)
        return {"scales": (scale / tensor_scale).to(_E4M3).view(torch.uint8), "global": tensor_scale}

    def _restored(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return stored(arrays, "scales", shape).view(_E4M3).float() * stored(arrays, "global", (1,))


_FACTORS = {"minmax": (1.0,), "mse": SCALINGS, "four_over_six": (1.0, E2M1_MAX / 4)}


class Nvfp4Grid(TensorScaleGrid):
    """NVFP4: groups of 16, each with an E4M3 scale, and one fp32 tensor scale (see `TensorScaleGrid`).

    `scale` states how scales are fitted. `minmax` and `mse` are as for fp4. `four_over_six`: the scale at which the
    largest weight of a group becomes 6, or that at which it becomes 4, if its squared error is less. The largest weight
    of all is then 6 * 256 times the tensor scale, and not 6 * 448 times, so that the larger scale is an E4M3 number
    too. This is Four Over Six (arXiv 2512.02010) with the rule `mse`. Its code also has rules for the mean and the
    largest absolute error, and blocks of 16 x 16 weights. We do not.
    """

    fits: ClassVar[tuple[str, ...]] = ("minmax", "mse")

    grid: Literal["nvfp4"] = "nvfp4"
    scale: Literal["minmax", "mse", "four_over_six"] = "mse"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(scale="minmax"), cls(scale="four_over_six")]

    @property
    def _largest_scale(self) -> float:
        return _FOUR_OVER_SIX_MAX if self.scale == "four_over_six" else _E4M3_MAX

    def _candidates(self, wide: Tensor, tensor_scale: Tensor) -> list[GroupParams]:
        return [self._params(wide * factor, tensor_scale) for factor in _FACTORS[self.scale]]
