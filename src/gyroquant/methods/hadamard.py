"""Hadamard rotations, randomised as in QuaRot (arXiv 2404.00456) or plain, on the whole site or block by block.

Names in GSR (arXiv 2505.03810): GH is the randomised Hadamard on all of R1, LH is the plain one in blocks.
"""

from __future__ import annotations

from typing import Literal

import torch
from typing_extensions import Self

from gyroquant.maps import Map, hadamard, random_signs
from gyroquant.methods.base import BlockwiseMethod


class Hadamard(BlockwiseMethod):
    """A Hadamard matrix, after random signs if `random_signs` is true. Every block gets the same one."""

    method: Literal["hadamard"] = "hadamard"
    random_signs: bool = False

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(random_signs=True), cls(block=16)]

    @property
    def random(self) -> bool:
        return self.random_signs

    def one_block(self, n: int, generator: torch.Generator) -> Map:
        return random_signs(n, generator) @ hadamard(n) if self.random_signs else hadamard(n)
