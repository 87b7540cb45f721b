"""Uniformly random orthogonal matrices, the plainest rotation to compare with."""

from __future__ import annotations

from typing import Literal

import torch

from gyroquant.maps import Map, random_orthogonal
from gyroquant.methods.base import BlockwiseMethod


class RandomOrthogonal(BlockwiseMethod):
    """A Haar-distributed orthogonal matrix; every block gets the same one."""

    method: Literal["orthogonal"] = "orthogonal"

    @property
    def random(self) -> bool:
        return True

    def one_block(self, n: int, generator: torch.Generator) -> Map:
        return random_orthogonal(n, generator)
