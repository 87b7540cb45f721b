"""What a grid is: a set of representable numbers with its scales, one set for each group of weights in a row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_origin

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids.basis import Basis
from gyroquant.registry import Registry, no_examples


def _group_size(value: int) -> int:
    if value == -1 or 16 <= value <= 256:
        return value
    raise ValueError("group_size is -1 (one group a row) or between 16 and 256")


_SQUARED = (2.0**-40, 2.0**40)  # numbers of this size have squares, those of their rounding errors included

GroupSize = Annotated[int, AfterValidator(_group_size)]


@dataclass(frozen=True)
class GroupParams:
    """The scales of some groups, exactly as they will be stored.

    `scale` and `zero` have the shape of the groups' weights with the last dimension 1; fp32 values that come back from
    what is stored exactly. `zero` is a code, in units of one step; 0 for grids that have none.
    """

    scale: Tensor
    zero: Tensor

    def __getitem__(self, index: Any) -> GroupParams:
        return GroupParams(self.scale[index], self.zero[index])


class Grid(BaseModel, ABC):
    """A kind of number grid with its settings. Subclasses register themselves under their `grid` name.

    A new kind declares what it can do in the class attributes below and is held to it by
    `gyroquant.testing.check_grid`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    registry: ClassVar[Registry[type[Grid]]] = Registry("grid", "gyroquant.grids")
    has_bit_widths: ClassVar[bool] = False
    """Whether `bits` can be chosen, as `allocate` does for every layer."""
    plain_integers: ClassVar[bool] = False
    """Whether numbers are ``(code - zero) * scale`` with one scale a group, as other programs and the packed KV cache
    take them.
    """
    fits: ClassVar[tuple[str, ...]] = ()
    """The values of a setting `scale` that says how scales are fitted: `minmax` by the range of a group, `mse` by a
    search. Empty where there is one way alone.
    """
    scale_step: ClassVar[float] = 2.0**-10
    """By what share neighbouring scales that can be stored differ: 2^-10 for fp16."""

    grid: str
    bits: int
    group_size: int

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        name = cls.model_fields["grid"].default
        if isinstance(name, str):
            Grid.registry.add(name, cls)

    @classmethod
    def examples(cls) -> list[Self]:
        """Grids that cover the options of this kind, for tests. Their groups are whole rows or divide 192 weights."""
        raise no_examples(cls)

    @property
    @abstractmethod
    def group_bits(self) -> int:
        """The bits stored for each group besides its codes."""

    @property
    def holds_zero(self) -> bool:
        """Whether 0 is among the numbers."""
        return True

    def fitted_by(self, fit: str) -> Self:
        """This grid with scales fitted by `minmax` or `mse`; itself where it has one way alone (see `fits`)."""
        return self.model_copy(update={"scale": fit}) if fit in self.fits else self

    @property
    def tensor_bits(self) -> int:
        """The bits stored for a scale of the whole weight."""
        return 0

    def group_of(self, columns: int, name: str = "a weight") -> int:
        """The group size for rows of this many weights. Raises RecipeError when it does not divide them."""
        if self.group_size == -1:
            return columns
        if columns % self.group_size:
            raise RecipeError(
                f"group_size {self.group_size} does not divide the {columns} inputs of {name}; {self._advice(columns)}"
            )
        return self.group_size

    def _advice(self, columns: int) -> str:
        if get_origin(type(self).model_fields["group_size"].annotation) is Literal:
            return f"{self.grid} has no other; choose another grid, or put such layers into weights.ignore"
        fits = [g for g in (16, 32, 64, 128, 256) if columns % g == 0]
        return f"use {', '.join(map(str, fits))} or -1 (one group a row)" if fits else "use -1 (one group a row)"

    def with_tensor_scale(self, *weights: Tensor) -> Grid:
        """This grid for one weight, of any shape, or several that are stored as one: itself, or for grids with a scale
        of the whole weight a copy that knows it. A bound grid stays as it is.
        """
        return self

    def with_stored_scale(self, arrays: dict[str, Tensor]) -> Grid:
        """As `with_tensor_scale`, for a weight that is stored in these arrays."""
        return self

    @abstractmethod
    def fit(self, groups: Tensor) -> GroupParams:
        """Scales for groups of weights, shape (..., group), fp32. Raises InputError for NaN, infinity and what the
        stored scale cannot hold.
        """

    def _fit_rows(self, groups: Tensor) -> GroupParams:
        """As `fit`, for groups of shape (..., groups of a row, group) whose rows know nothing of each other."""
        return self.fit(groups)

    @abstractmethod
    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        """The parameters nearest to finite ones, of the same shape, that can be stored."""

    def rescale(self, params: GroupParams, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, not yet storable, of groups whose span has its two ends moved by these factors.

        Differentiable. Grids without zero points take the mean of the two.
        """
        return params.scale * ((low + high) / 2), params.zero

    @abstractmethod
    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number in units of the scale, for zero points of any shape, differentiable."""

    def step_below(self, numbers: Tensor) -> Tensor:
        """How far the next number towards zero is from numbers of the grid, both in units of the scale."""
        return torch.ones_like(numbers)

    @abstractmethod
    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        """The nearest codes, uint8, for weights of shape (..., k) whose scales are `params`."""

    @abstractmethod
    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        """The numbers that codes stand for, fp32."""

    def nearest(self, weights: Tensor, params: GroupParams) -> Tensor:
        """What `decode` makes of `encode`; grids that can do without the codes are faster at it."""
        return self.decode(self.encode(weights, params), params)

    def fake(self, x: Tensor) -> Tensor:
        """Numbers of shape (..., n) rounded by scales fitted to them, group by group of the last dimension.

        Computed in fp32, returned in the dtype of `x`. Raises RecipeError when the groups do not divide n, InputError
        as `fit` does.
        """
        groups = x.float().unflatten(-1, (-1, self.group_of(x.shape[-1], "an activation")))
        return self.nearest(groups, self._fit_rows(groups)).reshape(x.shape).to(x.dtype)

    def least_squares(self, groups: Tensor, candidates: Iterable[GroupParams]) -> GroupParams:
        """For each group the candidate of least squared error, the first of equals."""
        best, error, up = None, torch.empty(0), lift(groups)
        for tried in candidates:
            away = (self.nearest(groups, tried) - groups).mul_(up) if up != 1 else self.nearest(groups, tried) - groups
            tried_error = away.square_().sum(-1, keepdim=True)
            if best is None:
                best, error = tried, tried_error
                continue
            better = tried_error < error
            error = torch.where(better, tried_error, error)
            best = GroupParams(torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero))
        if best is None:
            raise ValueError("there are no candidates to choose from")
        return best

    @abstractmethod
    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        """What is stored for a weight: codes of shape (rows, columns), params of shape (rows, groups, 1)."""

    @abstractmethod
    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        """The inverse of `pack`. Raises InputError for arrays of a wrong size."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight matrix: codes of shape (rows, columns), uint8, and scales of shape (rows, groups, 1).

    With a `basis` these are of the weight as it is there, with as many columns as the basis has.
    """

    grid: Grid
    codes: Tensor
    params: GroupParams
    basis: Basis | None = None

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, shape (rows, columns), fp32."""
        rows, columns = self.codes.shape
        groups = self.codes.view(rows, self.params.scale.shape[1], -1)
        numbers = self.grid.decode(groups, self.params).view(rows, columns)
        return numbers if self.basis is None else self.basis.decode(numbers)

    @property
    def bits(self) -> int:
        """The bits that are stored for the matrix, up to what filling the last byte takes."""
        basis = 0 if self.basis is None or self.basis.scale is None else 16 * self.basis.scale.numel()
        groups = self.grid.group_bits * self.params.scale.numel()
        return self.grid.bits * self.codes.numel() + groups + self.grid.tensor_bits + basis

    def pack(self) -> dict[str, Tensor]:
        return self.grid.pack(self.codes, self.params) | ({} if self.basis is None else self.basis.pack())


def lift(numbers: Tensor) -> float:
    """The power of two by which numbers are multiplied before they are squared: 1 unless fp32 lacks their squares."""
    largest = float(numbers.detach().abs().amax()) if numbers.numel() else 0.0
    if largest == 0 or not math.isfinite(largest) or _SQUARED[0] < largest < _SQUARED[1]:
        return 1.0
    return 2.0 ** max(-120, min(120, -math.frexp(largest)[1]))


def straight_through(seen: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `seen`: rounding as gradients are to see it."""
    return seen + (value - seen).detach()


def stored(arrays: dict[str, Tensor], part: str, shape: tuple[int, ...]) -> Tensor:
    """One of the arrays of a weight. Raises InputError when it is missing or has another shape than this."""
    if part not in arrays:
        raise InputError(f"the array of {part} of a rounded weight is missing")
    if tuple(arrays[part].shape) != shape:
        raise InputError(f"{part} of shape {tuple(arrays[part].shape)} where {shape} is expected")
    return arrays[part]


def stored_bits(arrays: dict[str, Tensor]) -> int:
    """The bits that arrays take in a file."""
    return sum(array.numel() * array.element_size() * 8 for array in arrays.values())


def grid_from(spec: dict[str, Any]) -> Grid:
    """A grid from its saved description. Raises InputError for an unknown kind and for settings that it cannot have."""
    name = spec.get("grid")
    kind = Grid.registry.find(name)
    try:
        return kind(**spec)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"a grid {name} cannot have {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
