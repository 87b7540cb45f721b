"""DuQuant (arXiv 2406.01721): a greedy rotation of blocks, a zigzag permutation, a second greedy rotation."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.calibration.observers import TokenSample
from gyroquant.maps import BlockDiagonal, Dense, Identity, Map, Permutation, product
from gyroquant.methods.base import Context, Method
from gyroquant.methods.permutations import zigzag
from gyroquant.models.graph.sites import Site


class DuQuant(Method):
    """Block rotation, zigzag permutation, block rotation, each chosen from a sample of the site's vectors (section 3).

    The block size is the largest one up to `block` that divides the site. `steps` limits the greedy search for a
    rotation.
    """

    method: Literal["duquant"] = "duquant"
    statistics: ClassVar[tuple[Any, ...]] = (TokenSample,)
    block: Annotated[int, Field(ge=2)] = 128
    steps: Annotated[int, Field(ge=1, le=4096)] = 256

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(block=16, steps=20)]

    @property
    def random(self) -> bool:
        return True

    def choose(self, site: Site, context: Context) -> Map:
        size = max(d for d in range(1, min(self.block, site.n) + 1) if site.n % d == 0)
        spread = spreading(size, context.generator(site))
        x = context.statistics[TokenSample].value
        if not len(x):
            return Identity(site.n)
        first = self._rotation(x, spread)
        if size == site.n:
            return first
        x = first.apply(x)
        order = Permutation(zigzag(x.abs().amax(0), size))
        return product(first, order, self._rotation(order.apply(x), spread))

    def _rotation(self, x: Tensor, spread: Tensor) -> Map:
        matrices = [Dense(matrix) for matrix in greedy_rotations(x, spread, self.steps)]
        return matrices[0] if len(matrices) == 1 else BlockDiagonal(tuple(matrices))


def spreading(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, shape (n, n), fp64, whose first row is uniform: it spreads coordinate 0 evenly."""
    start = torch.randn(n, n, generator=generator, dtype=torch.float64)
    start[:, 0] = 1
    q, r = torch.linalg.qr(start)
    return (q * r.diagonal().sign()).T.contiguous()


def greedy_rotations(x: Tensor, spread: Tensor, steps: int) -> Tensor:
    """A rotation for every block of the channels of x, which has shape (tokens, blocks b): (blocks, b, b), fp64.

    Each step finds the channel with the largest entry of a block. It applies `spread` with coordinate 0 and that
    channel swapped, which spreads the channel evenly over the block. The result is the product of the first k steps,
    with the k from 0 to `steps` after which the largest entry is smallest.
    """
    b = len(spread)
    x = x.reshape(len(x), x.shape[1] // b, b).movedim(1, 0).float().contiguous()  # (blocks, tokens, b)
    rotations = torch.eye(b, dtype=torch.float64).repeat(len(x), 1, 1)
    best, lowest = rotations.clone(), torch.full((len(x),), torch.inf)
    for step in range(steps + 1):
        height, channel = x.abs().amax(1).max(1)
        better = height < lowest
        best[better], lowest = rotations[better], torch.where(better, height, lowest)
        if step < steps:
            x, rotations = (_spread(y, channel, spread.to(y)) for y in (x, rotations))
    return best


def _spread(y: Tensor, channel: Tensor, spread: Tensor) -> Tensor:
    """y, shape (blocks, rows, b), times `spread` with coordinate 0 and each block's `channel` swapped."""
    swap = torch.arange(len(spread)).repeat(len(y), 1)
    swap[:, 0] = channel
    swap.scatter_(1, channel[:, None], 0)
    index = swap[:, None].expand_as(y)
    return (y.gather(2, index) @ spread).gather(2, index)
