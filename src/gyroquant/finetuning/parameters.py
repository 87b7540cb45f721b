"""The parameters that can be learned at a site: a rotation, the angles of a butterfly, or scales, each as a tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gyroquant.finetuning.settings import Learn
from gyroquant.finetuning.stiefel import CayleySGD, drift, orthogonalized, scheduled
from gyroquant.maps import BlockDiagonal, Butterfly, Dense, Diagonal, Map


class Parameter(ABC):
    """Converts maps to tensors and back, so that gradients reach them.

    `fits` are the values of `Site.admits` of sites that accept such maps.
    """

    fits: ClassVar[tuple[str, ...]] = ("any", "orthogonal")

    @abstractmethod
    def start(self, m: Map) -> Tensor:
        """The tensor for a map, fp64."""

    @abstractmethod
    def map(self, value: Tensor) -> Map:
        """The map for a tensor. It is differentiable in the tensor."""


@dataclass(frozen=True, eq=False)
class FreeMatrix(Dense):
    """A matrix that learning changes. It never counts as diagonal, even if it is diagonal at the start."""

    diagonal = False


class Rotation(Parameter):
    """Orthogonal blocks, shape (blocks, n, n): the blocks of the map, or the whole map as one block."""

    def start(self, m: Map) -> Tensor:
        return orthogonalized(torch.stack([part.dense() for part in equal_blocks(m)]))

    def map(self, value: Tensor) -> Map:
        return _block_diagonal([FreeMatrix(block) for block in value])


class Angles(Parameter):
    """The angles of butterflies, shape (blocks, stages, n / 2), as in ButterflyQuant (arXiv 2509.09679)."""

    def start(self, m: Map) -> Tensor:
        return torch.stack([part.angles.double() for part in equal_blocks(m) if isinstance(part, Butterfly)])

    def map(self, value: Tensor) -> Map:
        return _block_diagonal([Butterfly(angles) for angles in value])


class Scales(Parameter):
    """Logarithms of positive factors, shape (n,). OSTQuant (arXiv 2501.13987) learns them together with rotations."""

    fits = ("any", "diagonal")

    def start(self, m: Map) -> Tensor:
        return m.apply(torch.ones(m.n, dtype=torch.float64)).log()

    def map(self, value: Tensor) -> Map:
        return Diagonal(value.exp())


def parameter_of(m: Map) -> Parameter:
    """The parameter for a map from which learning starts."""
    if m.diagonal and not m.orthogonal:
        return Scales()
    if all(isinstance(part, Butterfly) and not part.transposed for part in equal_blocks(m)):
        return Angles()
    return Rotation()


def equal_blocks(m: Map) -> list[Map]:
    """The blocks of a block-diagonal map if all have the same size. Otherwise the map alone."""
    if isinstance(m, BlockDiagonal) and len({part.n for part in m.parts}) == 1:
        return list(m.parts) * m.repeat
    return [m]


def _block_diagonal(parts: list[Map]) -> Map:
    return parts[0] if len(parts) == 1 else BlockDiagonal(tuple(parts))


@dataclass(frozen=True)
class Place:
    """A learned map: its index in ``FoldPlan.folded``, and the parameter that converts it to a tensor."""

    index: int
    parameter: Parameter


@dataclass
class Adam:
    """Adam (arXiv 1412.6980) with its default constants, for tensors without constraints."""

    moments: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def step(self, name: str, value: Tensor, gradient: Tensor, lr: float, number: int) -> Tensor:
        """The tensor after step `number`, counted from 0."""
        previous = self.moments.get(name)
        first, second = torch.zeros_like(value).expand(2, *value.shape) if previous is None else previous
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient.square()
        self.moments[name] = torch.stack([first, second])
        first, second = first / (1 - 0.9 ** (number + 1)), second / (1 - 0.999 ** (number + 1))
        return value - lr * first / (second.sqrt() + 1e-12)


@dataclass
class Steps:
    """Takes steps: Cayley SGD for rotations, Adam for scales and angles. Both keep a state between steps."""

    settings: Learn
    cayley: CayleySGD = field(init=False)
    adam: Adam = field(default_factory=Adam)

    def __post_init__(self) -> None:
        self.cayley = CayleySGD(self.settings.momentum)

    def take(self, place: Place, name: str, value: Tensor, gradient: Tensor, number: int) -> Tensor:
        """A learned tensor after step `number`, counted from 0."""
        settings = self.settings

        def length(lr: float) -> float:
            return scheduled(lr, number, settings.steps, settings.schedule)

        if isinstance(place.parameter, Rotation):
            return self.cayley.step(name, value, gradient, length(settings.lr))
        return self.adam.step(name, value, gradient, length(settings.adam_lr), number)

    def kept(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The states that are kept between steps, by name. A checkpoint saves them and fills them again."""
        yield "velocity", self.cayley.velocity
        yield "moments", self.adam.moments


def largest_drift(places: dict[str, Place], values: dict[str, Tensor]) -> float:
    """The largest `drift` of the learned rotations. 0 if there are none."""
    return max(
        (drift(values[name]) for name, place in places.items() if isinstance(place.parameter, Rotation)),
        default=0.0,
    )
