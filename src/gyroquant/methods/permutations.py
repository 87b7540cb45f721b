"""Permutations that spread mass over the blocks of a rotation, so that no block has most of the outliers.

MixQuant, later PeRQ (arXiv 2601.22347): after a Hadamard matrix of order b, the entries of a block are at most its l1
norm over sqrt(b). Blocks of equal l1 mass therefore keep the largest entry small.
"""

from __future__ import annotations

import heapq
from abc import abstractmethod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.calibration.observers import AbsMax, MeanAbs
from gyroquant.maps import Identity, Map, Permutation
from gyroquant.methods.base import BlockSize, Context, Method, block_size
from gyroquant.models.graph.sites import Site, Structure


class _Spread(Method):
    """A permutation of a site into blocks; the identity if there is a single block."""

    structure: ClassVar[Structure] = "permutation"
    block: BlockSize = Field(default=32)

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(block=16)]  # type: ignore[call-arg]

    def check(self, site: Site, context: Context) -> None:
        block_size(self.block, site, context)

    def choose(self, site: Site, context: Context) -> Map:
        size = block_size(self.block, site, context)
        if size == site.n:
            return Identity(site.n)
        return Permutation(self.order(site, context, size))

    @abstractmethod
    def order(self, site: Site, context: Context, size: int) -> Tensor:
        """The channels in their new order, shape (n,): consecutive blocks of `size`."""


class MassDiff(_Spread):
    """Equal mean l1 mass in every block, greedily: the heaviest remaining channel goes to the lightest open block.

    Section 4 of the paper; O(n log n) with a heap of the blocks.
    """

    method: Literal["massdiff"] = "massdiff"
    statistics: ClassVar[tuple[Any, ...]] = (MeanAbs,)

    def order(self, site: Site, context: Context, size: int) -> Tensor:
        return massdiff(context.statistics[MeanAbs].value, size)


class Zigzag(_Spread):
    """Channels by descending magnitude, given to the blocks in zigzag order, as in DuQuant (arXiv 2406.01721)."""

    method: Literal["zigzag"] = "zigzag"
    statistics: ClassVar[tuple[Any, ...]] = (AbsMax,)

    def order(self, site: Site, context: Context, size: int) -> Tensor:
        return zigzag(context.statistics[AbsMax].value, size)


class SortedByMagnitude(_Spread):
    """Channels by descending largest magnitude, so that all outliers share a block: a control, the worst case."""

    method: Literal["absmax"] = "absmax"
    statistics: ClassVar[tuple[Any, ...]] = (AbsMax,)

    def order(self, site: Site, context: Context, size: int) -> Tensor:
        return torch.argsort(context.statistics[AbsMax].value, descending=True, stable=True)


class RandomPermutation(_Spread):
    """Channels in random order."""

    method: Literal["random_permutation"] = "random_permutation"

    @property
    def random(self) -> bool:
        return True

    def order(self, site: Site, context: Context, size: int) -> Tensor:
        return torch.randperm(site.n, generator=context.generator(site))


def massdiff(mass: Tensor, size: int) -> Tensor:
    """The channels in blocks of `size`, each block in the order in which it was filled; `mass` has shape (n,)."""
    channels = torch.argsort(mass, descending=True, stable=True).tolist()
    weights = mass.double().tolist()
    blocks: list[list[int]] = [[] for _ in range(len(channels) // size)]
    heap: list[tuple[float, int]] = []
    for number, channel in enumerate(channels[: len(blocks)]):
        blocks[number].append(channel)
        heapq.heappush(heap, (weights[channel], number))
    for channel in channels[len(blocks) :]:
        total, number = heapq.heappop(heap)
        blocks[number].append(channel)
        if len(blocks[number]) < size:
            heapq.heappush(heap, (total + weights[channel], number))
    return torch.tensor([channel for block in blocks for channel in block])


def zigzag(magnitude: Tensor, size: int) -> Tensor:
    """Channels by descending magnitude, given out in rounds of one a block; every second round is reversed."""
    rounds = torch.argsort(magnitude, descending=True, stable=True).view(size, -1)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)
