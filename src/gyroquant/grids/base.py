"""Base classes of grids. A grid is a set of representable numbers with scales for each group of weights in a row."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_origin

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids.basis import Basis
from gyroquant.grids.low_rank import LowRankFactors
from gyroquant.registry import Registry, no_examples


def _group_size(value: int) -> int:
    if value == -1 or 16 <= value <= 256:
        return value
    raise ValueError("group_size is -1 (one group a row) or between 16 and 256")


_AT_ONCE = 1 << 16  # numbers of candidates that are compared at once; they stay in the cache
_SQUARED = (2.0**-40, 2.0**40)  # fp32 holds the squares of numbers between these, and of their rounding errors

GroupSize = Annotated[int, AfterValidator(_group_size)]


@dataclass(frozen=True)
class GroupParams:
    """The scales and zero points of some groups, exactly as they will be stored.

    `scale` and `zero` have the shape of the groups' weights with the last dimension 1. They are fp32 values that do not
    change when they are stored and read. `zero` is a code, in units of one step. It is 0 for grids without zero points.
    """

    scale: Tensor
    zero: Tensor

    def __getitem__(self, index: Any) -> GroupParams:
        return GroupParams(self.scale[index], self.zero[index])


@dataclass(frozen=True)
class LeadingOrder:
    """Where the leading directions of a layer's inputs are: first in every `period` of inputs, a `share` of them."""

    period: int
    share: float


class Grid(BaseModel, ABC):
    """A kind of number grid with its settings. Subclasses register themselves under their `grid` name.

    A new kind declares what it can do in the class attributes below. `gyroquant.testing.check_grid` checks what it
    declares.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    registry: ClassVar[Registry[type[Grid]]] = Registry("grid", "gyroquant.grids")
    has_bit_widths: ClassVar[bool] = False
    """Whether `bits` can be chosen, as `allocate` does for every layer."""
    plain_integers: ClassVar[bool] = False
    """Whether numbers are ``(code - zero) * scale`` with one scale a group. Other programs and the packed KV cache need
    this form.
    """
    float_zero: ClassVar[bool] = False
    """Whether numbers are ``(code - zero) * scale`` with a zero point that is any number. Then refinement chooses scale
    and zero point together.
    """
    by_rows: ClassVar[bool] = False
    """Whether rows differ in their numbers. `allocate` makes such grids; a recipe does not name them."""
    leads: ClassVar[bool] = False
    """Whether the first columns have more bits, as suits the order of directions that the method `leading` makes."""
    real_zeros: ClassVar[bool] = False
    """Whether numbers have that form with zero points that are no codes, as only the KV cache takes them. `zero_step`
    is then the distance of neighbouring zero points.
    """
    fits: ClassVar[tuple[str, ...]] = ()
    """The values of the setting `scale`, which states how scales are fitted: `minmax` by the range of a group, `mse` by
    a search. Empty if the grid fits scales in one way only.
    """
    scale_step: ClassVar[float] = 2.0**-10
    """The relative difference of neighbouring storable scales: 2^-10 for fp16."""
    has_codebooks: ClassVar[bool] = False
    """Whether the numbers are fitted to a whole matrix and stored with it. `with_tensor_scale` fits them. Then rows of
    a matrix that a grid is not bound to depend on each other, and `decode` takes whole tiles as `encode` does.
    """

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
        """Grids that cover the options of this kind, for tests. Their group sizes are -1 or divide 192."""
        raise no_examples(cls)

    @property
    @abstractmethod
    def group_bits(self) -> int:
        """The bits stored for each group in addition to its codes."""

    @property
    def holds_zero(self) -> bool:
        """Whether the grid can represent 0."""
        return True

    def fitted_by(self, fit: str) -> Self:
        """This grid with scales fitted by `minmax` or `mse`. Returns itself if `fits` does not contain `fit`."""
        return self.model_copy(update={"scale": fit}) if fit in self.fits else self

    @property
    def tensor_bits(self) -> int:
        """The bits stored for the tensor scale; 0 if there is none."""
        return 0

    @property
    def row_bits(self) -> int:
        """The bits stored for a row in addition to its codes and those of its groups."""
        return 0

    @property
    def tile_rows(self) -> int:
        """The number of consecutive rows whose codes depend on each other; 1 if each weight is coded by itself.

        Such a grid gets whole tiles in `encode`, `decode` and `nearest`: rows are the first dimension, and their number
        is a multiple of this.
        """
        return 1

    @property
    def tile_columns(self) -> int:
        """The number of consecutive weights of a row whose codes depend on each other; 1 if each is coded by itself.

        Such a grid gets whole tiles in `encode` and `nearest`, as the last dimension. `decode` takes codes one by one,
        unless the grid has codebooks.
        """
        return 1

    @property
    def coded_singly(self) -> bool:
        """Whether each weight is coded by itself."""
        return self.tile_rows == self.tile_columns == 1

    @property
    def code_bits(self) -> float:
        """The bits stored for the code of a weight."""
        return float(self.bits)

    @property
    def code_count(self) -> int:
        """Codes are below this number."""
        return int(2**self.bits)

    def weight_bits(self, codes: Tensor, params: GroupParams) -> int:
        """The bits stored for a weight with these codes, shape (rows, columns), and params, without padding."""
        own = self.group_bits * params.scale.numel() + self.row_bits * params.scale.shape[0]
        return int(self.code_bits * codes.numel()) + own + self.tensor_bits

    @property
    def super_block(self) -> int:
        """The number of consecutive groups of a row whose scales are stored as multiples of one number; usually 1.

        Such a grid gets whole super-blocks in `fit` and `round_params`: the last dimension but one counts groups, and
        is a multiple of this.
        """
        return 1

    def stored_together(self, columns: int) -> int:
        """The number of consecutive groups, of a row of `columns` weights, that `fit` and `round_params` get at once.

        A super-block, or all groups of the row if their scales are stored as multiples of one number of the row. Then
        `refit` and `round_within` take single super-blocks, and keep that number.
        """
        return self.super_block

    def fit_shared(self, groups: Tensor) -> GroupParams:
        """As `fit`, for callers that call `refit` for every super-block: only what that keeps need be as good."""
        return self.fit(groups)

    def refit(self, groups: Tensor, params: GroupParams, first: int) -> GroupParams:
        """As `fit`, for some groups of rows that have `params`, from the group `first` on. All numbers that the rows'
        other groups share with them stay. Groups have shape (..., groups, group), params those of whole rows.
        """
        return self.fit(groups)

    def round_within(self, scale: Tensor, zero: Tensor, params: GroupParams, first: int) -> GroupParams:
        """As `round_params`, for some groups of rows as in `refit`."""
        return self.round_params(scale, zero)

    @property
    def quick(self) -> Grid:
        """A grid of the same size and nearly the same errors whose codes take less time, for estimates."""
        return self

    @property
    def keeps_codes(self) -> bool:
        """Whether numbers of the grid always get the codes that they were decoded from."""
        return True

    def check(self) -> None:
        """Raises InputError, with the remedy, if a package that `encode` needs is not installed."""

    def group_of(self, columns: int, name: str = "a weight") -> int:
        """The group size for rows of `columns` weights. Raises RecipeError if it does not divide `columns`."""
        if self.group_size == -1:
            return columns
        if columns % (self.group_size * self.super_block):
            size = (
                f"group_size {self.group_size}"
                if self.super_block == 1
                else f"a super-block of {self._stored_together}"
            )
            raise RecipeError(f"{size} does not divide the {columns} inputs of {name}; {self._advice(columns)}")
        return self.group_size

    @property
    def _stored_together(self) -> int:
        return self.group_size * self.super_block

    def for_columns(self, columns: int) -> Grid:
        """The grid for rows of `columns` weights: this one, or the nearest that other programs put in its place."""
        return self

    def for_input(self, order: LeadingOrder | None) -> Grid:
        """The grid for a layer whose inputs have their leading directions first; None: in no order."""
        return self

    def check_shape(self, rows: int, columns: int, name: str) -> None:
        """Raises RecipeError if a weight of this shape cannot be coded."""
        self.group_of(columns, name)
        if rows % self.tile_rows:
            raise RecipeError(
                f"the grid {self.grid} codes {self.tile_rows} rows together, and {name} has {rows}: take another grid "
                "or a length that divides them, or put such layers into weights.ignore"
            )

    def _advice(self, columns: int) -> str:
        if get_origin(type(self).model_fields["group_size"].annotation) is Literal:
            return f"{self.grid} has no other group size; choose another grid, or put such layers into weights.ignore"
        fits = [g for g in (16, 32, 64, 128, 256) if columns % g == 0]
        return f"use {', '.join(map(str, fits))} or -1 (one group a row)" if fits else "use -1 (one group a row)"

    def at_bits(self, bits: int) -> Grid:
        """The same grid with another number of bits, or the grid of that many bits that goes with it."""
        return type(self)(**self.model_dump() | {"bits": bits})

    def with_tensor_scale(self, *weights: Tensor) -> Grid:
        """This grid for one weight of any shape, or for several weights that are stored as one.

        Grids with a tensor scale return a copy that holds it: a bound grid. Other grids and bound grids return
        themselves.
        """
        return self

    def with_stored_scale(self, arrays: dict[str, Tensor]) -> Grid:
        """As `with_tensor_scale`, with the tensor scale that the arrays of a stored weight hold."""
        return self

    @abstractmethod
    def fit(self, groups: Tensor) -> GroupParams:
        """Scales for groups of weights, shape (..., group), fp32; (..., groups, group) if they form super-blocks.

        Raises InputError for NaN, for infinity, and for groups whose scale cannot be stored.
        """

    def _fit_rows(self, groups: Tensor) -> GroupParams:
        """As `fit`, for groups of shape (..., groups of a row, group) whose rows are fitted independently."""
        return self.fit(groups)

    @abstractmethod
    def round_params(self, scale: Tensor, zero: Tensor) -> GroupParams:
        """The storable parameters nearest to `scale` and `zero`, which must be finite; same shape."""

    def rescale(self, params: GroupParams, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point after the low and high end of each group's range are multiplied by these factors.

        The result is not rounded to storable values. Differentiable. Grids without zero points use the mean of the two
        factors.
        """
        return params.scale * ((low + high) / 2), params.zero

    @abstractmethod
    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest number in units of the scale, for zero points of any shape, differentiable."""

    def step_below(self, numbers: Tensor) -> Tensor:
        """The distance from numbers of the grid to the next number towards zero, both in units of the scale."""
        return torch.ones_like(numbers)

    def group_step_below(self, numbers: Tensor, params: GroupParams) -> Tensor:
        """As `step_below`, for groups with these parameters. Grids override it whose numbers depend on the group."""
        return self.step_below(numbers)

    @abstractmethod
    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        """The nearest codes, uint8, for weights of shape (..., k) whose scales are `params`."""

    def encode_by(self, weights: Tensor, params: GroupParams, second_moments: Tensor, codes: Tensor) -> Tensor:
        """The codes of one tile of columns for `weights`, shape (rows, tile_columns), whose scales are `params`.

        The error to lower is ``d H d'`` with H the `second_moments` of these columns. The search may start from
        `codes`. Grids that cannot search by it take the nearest codes.
        """
        return self.encode(weights, params)

    @abstractmethod
    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        """The numbers that codes stand for, fp32."""

    def nearest(self, weights: Tensor, params: GroupParams) -> Tensor:
        """``decode(encode(weights))``. Grids that do not need the codes compute it faster."""
        return self.decode(self.encode(weights, params), params)

    def fake(self, x: Tensor) -> Tensor:
        """Numbers of shape (..., n), rounded with scales fitted to each group of the last dimension.

        Computed in fp32, returned in the dtype of `x`. Raises RecipeError if the group size does not divide n and if
        rows depend on each other (`tile_rows`), and InputError as `fit` does.
        """
        if self.tile_rows > 1:
            raise RecipeError(f"the grid {self.grid} codes rows of a weight together, so it is for weights only")
        groups = x.float().unflatten(-1, (-1, self.group_of(x.shape[-1], "an activation")))
        return self.nearest(groups, self._fit_rows(groups)).reshape(x.shape).to(x.dtype)

    def least_squares(self, groups: Tensor, candidates: Iterable[GroupParams]) -> GroupParams:
        """For each group, the candidate with the least squared error; the first one of equals."""
        best, error, up = None, torch.empty(0), lift(groups)
        for params in candidates:
            difference = self.nearest(groups, params) - groups
            if up != 1:
                difference = difference.mul_(up)
            params_error = difference.square_().sum(-1, keepdim=True)
            if best is None:
                best, error = params, params_error
                continue
            better = params_error < error
            error = torch.where(better, params_error, error)
            best = GroupParams(
                torch.where(better, params.scale, best.scale), torch.where(better, params.zero, best.zero)
            )
        if best is None:
            raise ValueError("there are no candidates to choose from")
        return best

    def least_squares_of(self, groups: Tensor, tried: GroupParams) -> GroupParams:
        """As `least_squares`, for finite candidates of shape (..., candidates), and faster.

        Candidates and groups must be independent: as many as stay in the processor's cache are compared at once.
        """
        flat = groups.reshape(-1, groups.shape[-1])
        count, rows = tried.scale.shape[-1], max(1, _AT_ONCE // max(1, groups.shape[-1]))
        scales, zeros = (part.reshape(-1, count).split(rows) for part in (tried.scale, tried.zero))
        up = lift(groups)
        found = [self._best(*piece, up) for piece in zip(flat.split(rows), scales, zeros, strict=True)]
        scale, zero = (torch.cat(parts).view(*groups.shape[:-1], 1) for parts in zip(*found, strict=True))
        return GroupParams(scale, zero)

    def _best(self, groups: Tensor, scale: Tensor, zero: Tensor, up: float) -> tuple[Tensor, Tensor]:
        """Scale and zero point of least squared error, (groups, 1), for groups (groups, n), of (groups, candidates)."""
        errors, each = [], max(1, _AT_ONCE // max(1, groups.numel()))
        for params in map(GroupParams, scale.split(each, -1), zero.split(each, -1)):
            some = params if params.scale.shape[-1] == 1 else params[..., None]
            numbers = groups if some is params else groups[:, None]
            difference = self.nearest(numbers, some).sub_(numbers)
            error = (difference.mul_(up) if up != 1 else difference).square_().sum(-1)
            errors.append(error.view(len(groups), -1))
        best = torch.cat(errors, -1).argmin(-1, keepdim=True)
        return scale.gather(-1, best), zero.gather(-1, best)

    @abstractmethod
    def pack(self, codes: Tensor, params: GroupParams) -> dict[str, Tensor]:
        """The arrays stored for a weight: codes of shape (rows, columns), params of shape (rows, groups, 1)."""

    @abstractmethod
    def unpack(self, arrays: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, GroupParams]:
        """The inverse of `pack`. Raises InputError if an array is missing or has a wrong size."""


@dataclass(frozen=True)
class QuantizedWeight:
    """A rounded weight matrix: codes of shape (rows, columns), uint8, and scales of shape (rows, groups, 1).

    With a `basis`, codes and scales describe the weight in that basis. `columns` is then the order of the basis.

    With `low_rank`, a product of two factors is added to what the codes stand for. It runs with the model, so
    `dequantize` does not include it; `merged` does.
    """

    grid: Grid
    codes: Tensor
    params: GroupParams
    basis: Basis | None = None
    low_rank: LowRankFactors | None = None

    def merged(self) -> Tensor:
        """The matrix of codes and low-rank product together, shape (rows, columns), fp32."""
        numbers = self.dequantize()
        return numbers if self.low_rank is None else numbers + self.low_rank.product()

    def dequantize(self) -> Tensor:
        """The matrix that the codes stand for, shape (rows, columns), fp32, without the low-rank product."""
        rows, columns = self.codes.shape
        groups = self.codes.view(rows, self.params.scale.shape[1], -1)
        numbers = self.grid.decode(groups, self.params).view(rows, columns)
        return numbers if self.basis is None else self.basis.decode(numbers)

    @property
    def bits(self) -> int:
        """The bits stored for the matrix, without the padding of the last byte."""
        basis = 0 if self.basis is None or self.basis.scale is None else 16 * self.basis.scale.numel()
        factors = 0 if self.low_rank is None else self.low_rank.bits
        return self.grid.weight_bits(self.codes, self.params) + basis + factors

    def pack(self) -> dict[str, Tensor]:
        basis = {} if self.basis is None else self.basis.pack()
        return self.grid.pack(self.codes, self.params) | basis | ({} if self.low_rank is None else self.low_rank.pack())


def joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """A matrix with the rows of several ones, which share a grid and a basis."""
    params = (torch.cat([getattr(part.params, kind) for part in parts]) for kind in ("scale", "zero"))
    return QuantizedWeight(
        parts[0].grid, torch.cat([part.codes for part in parts]), GroupParams(*params), parts[0].basis
    )


def lift(numbers: Tensor) -> float:
    """The power of two to multiply numbers by before squaring them: 1 if fp32 holds their squares."""
    largest = float(numbers.detach().abs().amax()) if numbers.numel() else 0.0
    if largest == 0 or not math.isfinite(largest) or _SQUARED[0] < largest < _SQUARED[1]:
        return 1.0
    return 2.0 ** max(-120, min(120, -math.frexp(largest)[1]))


def straight_through(seen: Tensor, value: Tensor) -> Tensor:
    """`value`, with the gradient of `seen`: the straight-through estimator of rounding."""
    return seen + (value - seen).detach()


def stored(arrays: dict[str, Tensor], part: str, shape: tuple[int, ...]) -> Tensor:
    """One of the arrays of a weight. Raises InputError if it is missing or does not have this shape."""
    if part not in arrays:
        raise InputError(f"the array of {part} of a rounded weight is missing")
    if tuple(arrays[part].shape) != shape:
        raise InputError(f"{part} of shape {tuple(arrays[part].shape)} where {shape} is expected")
    return arrays[part]


def stored_bits(arrays: dict[str, Tensor]) -> int:
    """The bits that arrays take in a file."""
    return sum(array.numel() * array.element_size() * 8 for array in arrays.values())


def grid_from(spec: dict[str, Any]) -> Grid:
    """A grid from its saved description. Raises InputError for an unknown kind and for invalid settings."""
    name = spec.get("grid")
    kind = Grid.registry.find(name)
    try:
        return kind(**spec)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"a grid {name} cannot have {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
