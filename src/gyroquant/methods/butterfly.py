"""Butterflies with fixed angles: the initial values of ButterflyQuant (arXiv 2509.09679), which learns the angles."""

from __future__ import annotations

from typing import Literal

import torch
from typing_extensions import Self

from gyroquant.maps import Map, butterfly
from gyroquant.methods.base import BlockwiseMethod


class Butterfly(BlockwiseMethod):
    """A butterfly with all angles pi/4, which is a Hadamard matrix up to signs. Every block gets the same one.

    The order of the site or block must be a power of two.
    """

    method: Literal["butterfly"] = "butterfly"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(block=16)]

    def one_block(self, n: int, generator: torch.Generator) -> Map:
        return butterfly(n)
