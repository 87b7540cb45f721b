"""Base classes of methods. A method chooses the map to fold at a site."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.errors import MapError, RecipeError
from gyroquant.grids import Grid, IntegerGrid
from gyroquant.maps import Map, blocks
from gyroquant.models.graph.sites import Site, Structure
from gyroquant.registry import Registry, no_examples


def _no_weights() -> Iterator[Tensor]:
    raise RecipeError(
        "a method that reads the weights at its site must declare it: set needs_weights: ClassVar[bool] = True"
    )


@dataclass(frozen=True)
class Context:
    """The input of a method, in addition to its site.

    `seed`: the seed of the recipe.
    `group_size`: the group size of the weights; -1 means one group a row.
    `statistics`: the observers that saw the vectors at the site, by kind; see `Method.statistics`.
    `weights`: yields the weights that read the site and will be rounded, one matrix after another. Their shape is
    (rows, k n): the site's basis occurs k times along a row. They are in the basis in which the vectors were measured.
    Raises RecipeError unless the method declares `needs_weights`.
    `grid`: the grid of the weights.
    """

    seed: int
    group_size: int
    statistics: Mapping[type[Any], Any] = field(default_factory=dict)
    weights: Callable[[], Iterator[Tensor]] = _no_weights
    grid: Grid = field(default_factory=IntegerGrid)

    def generator(self, site: Site) -> torch.Generator:
        """A random generator for this site. It depends on the seed and the site's label only."""
        digest = hashlib.sha256(f"{self.seed} {site.label}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Method(BaseModel, ABC):
    """A way to choose maps. Subclasses register themselves under their `method` name, with their options as fields.

    A new method declares what it needs in the class attributes below. `gyroquant.testing.check_method` checks what it
    declares.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    registry: ClassVar[Registry[type[Method]]] = Registry("method", "gyroquant.methods", error=RecipeError)
    structure: ClassVar[Structure] = "orthogonal"
    """The structure of its maps, for all statistics."""
    statistics: ClassVar[tuple[Callable[[int], Any], ...]] = ()
    """The observers that it needs. `Context.statistics` holds them, by kind, after they saw the site's vectors."""
    needs_weights: ClassVar[bool] = False
    """Whether it reads `Context.weights`."""
    sites: ClassVar[tuple[str, ...]] = ()
    """The sites that it is for; it refuses all others. Empty: every site that takes maps of its `structure`."""

    method: str

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        name = cls.model_fields["method"].default
        for observer in cls.statistics if isinstance(cls.statistics, tuple) else ():
            if not hasattr(observer, "size_in_bytes"):
                raise TypeError(
                    f"{cls.__name__}.statistics: {getattr(observer, '__name__', observer)} is not an observer: it does "
                    "not have size_in_bytes. Derive it from gyroquant.calibration.observers.Observer"
                )
        if isinstance(name, str):
            Method.registry.add(name, cls)

    @classmethod
    def examples(cls) -> list[Self]:
        """Methods that cover the options of this class, for tests. Their blocks divide 16, the smallest site."""
        raise no_examples(cls)

    @property
    def looks(self) -> bool:
        """Whether it needs statistics or weights, so that it can choose only after the model was measured."""
        return bool(self.statistics) or self.needs_weights

    @property
    def random(self) -> bool:
        """Whether its maps depend on the seed."""
        return False

    def check(self, site: Site, context: Context) -> None:
        """Raises RecipeError for options that do not fit a site, and for a site that the method is not for.

        Called before anything is measured.
        """

    @abstractmethod
    def choose(self, site: Site, context: Context) -> Map:
        """The map for a site, of order ``site.n``."""


def _block(value: Any) -> Any:
    if value in ("full", "group"):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ValueError("block must be 'full', 'group' (the group size of the weights) or a positive number")


BlockSize = Annotated[Literal["full", "group"] | int, BeforeValidator(_block)]


class BlockwiseMethod(Method):
    """A method that puts one map on the whole site, or the same map on every block of it."""

    block: BlockSize = Field(default="full")

    @abstractmethod
    def one_block(self, n: int, generator: torch.Generator) -> Map:
        """The map for one block of n coordinates."""

    def choose(self, site: Site, context: Context) -> Map:
        size = block_size(self.block, site, context)
        try:
            return blocks(self.one_block(size, context.generator(site)), site.n)
        except MapError as error:
            raise RecipeError(f"{site.label}: {error} (--set transform.{site.name}.block=SIZE)") from error


def block_size(block: BlockSize, site: Site, context: Context) -> int:
    """The block size that an option gives at a site. Raises RecipeError if it does not divide the order of the site."""
    if block == "full" or (block == "group" and context.group_size == -1):
        return site.n
    size = min(context.group_size, site.n) if block == "group" else int(block)
    if site.n % size:
        fits = [d for d in range(2, site.n + 1) if site.n % d == 0]
        nearest = min(fits, key=lambda d: (abs(d - size), d), default=site.n)
        raise RecipeError(
            f"{site.label} has {site.n} coordinates, which blocks of {size} do not divide; the nearest size that "
            f"does is {nearest} (--set transform.{site.name}.block={nearest})"
        )
    return size
