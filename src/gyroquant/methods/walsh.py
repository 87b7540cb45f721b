"""Walsh rotations: the Hadamard matrix in sequency order (GSR, arXiv 2505.03810).

`block: group` is GSR: blocks as large as the quantization groups of the weights. `block: full` is GW. There are no
random signs, because they would undo the order.
"""

from __future__ import annotations

from typing import Literal

import torch
from typing_extensions import Self

from gyroquant.maps import Map, walsh
from gyroquant.methods.base import BlockwiseMethod


class Walsh(BlockwiseMethod):
    """A Walsh matrix on the whole site, or the same one on every block."""

    method: Literal["walsh"] = "walsh"

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(block="group")]

    def one_block(self, n: int, generator: torch.Generator) -> Map:
        return walsh(n)
