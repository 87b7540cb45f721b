"""Microscaling grids: E2M1 elements in small groups whose scales take 8 bits each."""

from __future__ import annotations

from typing import ClassVar, Literal

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


class Mxfp4Grid(E2M1Grid):
    """MXFP4 (OCP Microscaling Formats 1.0): groups of 32, each with a power of two, stored as its exponent plus 127.

    `scale_rounding` chooses the power of two, for the largest magnitude ``m = 1.f * 2^e`` of a group:

    - `floor`: ``2^(e - 2)``, as in the specification. m lies below 8 steps, and what lies above 6 steps is clipped.
    - `round`: as `floor`, with the exponent of m after rounding m to one mantissa bit. 7 steps or more thus become 4
      steps of twice the size.
    - `ceil`: the smallest power of two that clips nothing.
    - `mse`: the one of ``2^(e - 3)`` to ``2^(e - 1)`` with the least squared error.
    """

    scale_step: ClassVar[float] = 1.0

    grid: Literal["mxfp4"] = "mxfp4"
    group_size: Literal[32] = 32
    scale_rounding: Literal["floor", "round", "ceil", "mse"] = "floor"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(scale_rounding="round"), cls(scale_rounding="ceil"), cls(scale_rounding="mse")]

    @property
    def group_bits(self) -> int:
        return 8

    def fit(self, groups: Tensor) -> GroupParams:
        extreme = largest(groups).view(torch.int32)
        if self.scale_rounding != "mse":
            return self._params(extreme + _CARRY[self.scale_rounding], 0)
        return self.least_squares(groups, (self._params(extreme, shift) for shift in (0, 1, -1)))

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


_E4M3 = torch.float8_e4m3fn
_E4M3_MAX = 448.0
_E4M3_TINY = 2.0**-9
_LEAST = 2.0**-100  # of tensor scales, so that no scale is an fp32 subnormal


def _whole_scale(extreme: Tensor) -> Tensor:
    """The tensor scale at which the largest weight becomes the largest element of a group with the largest scale."""
    return (extreme / (E2M1_MAX * _E4M3_MAX)).clamp(min=_LEAST)


def _possible_scales(widest: float, peaks: Tensor) -> list[float]:
    """The tensor scales at which a weight may already lie on the grid, from the largest magnitudes of its groups.

    The largest weight is an element times a group scale, and so is the largest weight of each group. `widest` is the
    tensor scale for the largest element and the largest group scale.
    """
    possible = []
    for element in (E2M1_MAX, 4.0):
        for group in (240, *range(256, int(_E4M3_MAX) + 1, 32)):  # one for each mantissa
            scale = widest * (E2M1_MAX * _E4M3_MAX) / (element * group)
            wanted = peaks / scale / torch.tensor([E2M1_MAX, 4.0], device=peaks.device)
            near = wanted.clamp(max=_E4M3_MAX).to(_E4M3).float()
            if bool((((near - wanted).abs() <= 2.0**-8 * wanted).any(-1) | (peaks[:, 0] == 0)).all()):
                possible.append(scale)
    return possible


class Nvfp4Grid(E2M1Grid):
    """NVFP4: groups of 16, each with an E4M3 scale, and one fp32 tensor scale.

    A grid must be bound to a weight (`with_tensor_scale`) before it can fit or pack. If it is not bound, `fake` gives
    each row its own tensor scale, so that tokens do not depend on each other. `scale` is as for fp4. The scales in
    `GroupParams` are the products of group scale and tensor scale. The tensor scale makes the largest weight the
    largest element of a group with the largest scale. With `mse`, it may be another element or group scale, if the
    weight already lies on the grid.
    """

    fits: ClassVar[tuple[str, ...]] = ("minmax", "mse")
    scale_step: ClassVar[float] = 2.0**-3

    grid: Literal["nvfp4"] = "nvfp4"
    group_size: Literal[16] = 16
    scale: Literal["minmax", "mse"] = "mse"
    _tensor_scale: float | None = PrivateAttr(default=None)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(scale="minmax")]

    @property
    def group_bits(self) -> int:
        return 8

    @property
    def tensor_scale(self) -> float:
        """The tensor scale, an fp32 number. Raises InputError for a grid that is not bound."""
        if self._tensor_scale is None:
            raise InputError(
                "an nvfp4 grid needs the tensor scale of the whole weight: call with_tensor_scale(weight) first"
            )
        return self._tensor_scale

    def _as_tensor(self, device: torch.device) -> Tensor:
        return torch.tensor([self.tensor_scale], dtype=torch.float32, device=device)

    def with_tensor_scale(self, *weights: Tensor) -> Nvfp4Grid:
        if self._tensor_scale is not None:
            return self
        widest = max(float(_whole_scale(largest(weight.float().reshape(1, -1)))) for weight in weights)
        if self.scale == "mse" and widest > _LEAST:
            groups = [weight.detach().float().reshape(-1, self.group_size) for weight in weights]
            peaks = torch.cat([largest(rows) for rows in groups])
            for scale in _possible_scales(widest, peaks):
                bound = self._with(scale)
                if all(bool(is_given_back(bound, rows, bound.fit(rows)).all()) for rows in groups):
                    return bound
        return self._with(widest)

    def with_stored_scale(self, arrays: dict[str, Tensor]) -> Nvfp4Grid:
        return self._with(float(stored(arrays, "global", (1,))))

    def _with(self, tensor_scale: float) -> Nvfp4Grid:
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
        return self._fit(groups, extreme, _whole_scale(extreme.amax(-2, keepdim=True)))

    def _fit(self, groups: Tensor, extreme: Tensor, tensor_scale: Tensor) -> GroupParams:
        wide = extreme / E2M1_MAX / tensor_scale
        if self.scale == "minmax":
            return self._params(wide, tensor_scale)
        return self.least_squares(groups, (self._params(wide * factor, tensor_scale) for factor in SCALINGS))

    def _params(self, wanted: Tensor, tensor_scale: Tensor) -> GroupParams:
        return self.scaled(wanted.clamp(_E4M3_TINY, _E4M3_MAX).to(_E4M3).float() * tensor_scale)

    def _stored(self, scale: Tensor) -> dict[str, Tensor]:
        tensor_scale = self._as_tensor(scale.device)
        return {"scales": (scale / tensor_scale).to(_E4M3).view(torch.uint8), "global": tensor_scale}

    def _restored(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return stored(arrays, "scales", shape).view(_E4M3).float() * stored(arrays, "global", (1,))
