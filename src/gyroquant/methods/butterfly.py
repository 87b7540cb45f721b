"""Butterflies with fixed angles: where ButterflyQuant (arXiv 2509.09679) starts before it learns them."""

from __future__ import annotations

from typing import Literal

import torch
from typing_extensions import Self

from gyroquant.maps import Map, butterfly
from gyroquant.methods.base import BlockwiseMethod


class Butterfly(BlockwiseMethod):
    """A butterfly with all angles pi/4, a Hadamard matrix up to signs; every block gets the same one.

    Its order, the site's or the block's, is a power of two.
    """

    method: Literal["butterfly"] = "butterfly"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(block=16)]

    def one_block(self, n: int, generator: torch.Generator) -> Map:
        return butterfly(n)
