"""Uniformly random orthogonal matrices, a simple rotation for comparison."""

from __future__ import annotations

from typing import Literal

import torch
from typing_extensions import Self

from gyroquant.maps import Map, random_orthogonal
from gyroquant.methods.base import BlockwiseMethod


class RandomOrthogonal(BlockwiseMethod):
    """A Haar-distributed orthogonal matrix. Every block gets the same one."""

    method: Literal["orthogonal"] = "orthogonal"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(block=8)]

    @property
    def random(self) -> bool:
        return True

    def one_block(self, n: int, generator: torch.Generator) -> Map:
        return random_orthogonal(n, generator)
