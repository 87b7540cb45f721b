"""Trellis-coded numbers: codes that share bits with their neighbours, so that b bits choose among many more numbers."""

from __future__ import annotations

from functools import cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids.base import GroupParams, GroupSize
from gyroquant.grids.tiled import TiledGrid, compiled

_SPREAD = 147.8  # the standard deviation of the sum of four random bytes
_QUICK = 8  # bits of state for estimates: 15 % more error than with 12, in a tenth of the time
_STATES = 4  # the shortest sequence in states: in shorter ones, too much of the path is tied to its own start


class TrellisGrid(TiledGrid):
    """A bit-shift trellis, as in QTIP (Tseng et al., arXiv 2406.11235), along the rows of each column.

    The number of a weight depends on its own code of `bits` bits and on the codes of the rows before it, `state_bits`
    bits in all. These bits are hashed to one of 2^state_bits numbers that are spread as a normal distribution. So the
    grid suits rotated weights. On normal numbers, 2 bits with 12 bits of state have 1.9 dB less error than the best
    evenly spaced grid of 2 bits, and 3 bits 2.8 dB less.

    `sequence` consecutive rows of a column are coded together (see `TiledGrid`), where QTIP takes tiles of 16 by 16.
    The last ones come before the first ones, so that no bits are stored beside the codes (a tail-biting trellis). A
    layer's number of rows must be a multiple of it.
    """

    has_bit_widths: ClassVar[bool] = True

    grid: Literal["trellis"] = "trellis"
    bits: Annotated[int, Field(ge=1, le=4)] = 2
    group_size: GroupSize = -1
    state_bits: Annotated[int, Field(ge=8, le=16)] = 12
    sequence: Annotated[int, Field(ge=16, le=1024)] = 64

    @model_validator(mode="after")
    def _consistent(self) -> TrellisGrid:
        least = -(-_STATES * self.state_bits // self.bits)
        if self.sequence < least:
            raise ValueError(
                f"sequences of {self.sequence} codes of {self.bits} bits are too short for state_bits: "
                f"{self.state_bits}. Use sequence: {least} or more"
            )
        return self

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(bits=2, state_bits=8, sequence=16),
            cls(bits=3, state_bits=10, sequence=16, group_size=64),
            cls(bits=4, state_bits=12, sequence=16),
            cls(bits=1, state_bits=8, sequence=32),
        ]

    @property
    def tile_rows(self) -> int:
        return self.sequence

    @property
    def quick(self) -> TrellisGrid:
        return self.model_copy(update={"state_bits": min(self.state_bits, _QUICK)})

    @property
    def _factor(self) -> float:
        return (1 - 4.0**-self.bits) ** 0.5  # numbers have the variance of the weights, less the least possible error

    def check(self) -> None:
        compiled("viterbi", "best_codes")

    def range(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        numbers = _numbers(self.state_bits)
        return torch.full_like(zero, float(numbers.min())), torch.full_like(zero, float(numbers.max()))

    def encode(self, weights: Tensor, params: GroupParams) -> Tensor:
        best_codes = compiled("viterbi", "best_codes")
        arrays = (x.contiguous().cpu().numpy() for x in self._steps(weights, params))
        codes = best_codes(*arrays, _numbers(self.state_bits).numpy(), self.bits, torch.get_num_threads())
        return self._rows(torch.from_numpy(codes).to(weights.device), weights.shape)

    def decode(self, codes: Tensor, params: GroupParams) -> Tensor:
        sequences = self._vectors(codes).to(torch.int32) << self.state_bits
        state = torch.zeros_like(sequences)
        for age in range(-(-self.state_bits // self.bits)):
            state |= sequences.roll(age, 1) >> (self.bits * (age + 1))
        return self._rows(_numbers(self.state_bits).to(codes.device)[state], codes.shape) * params.scale


@cache
def _numbers(state_bits: int) -> Tensor:
    """The number of every state, fp32: the code 1MAD of QTIP, the sum of the bytes of a linear congruential hash."""
    hashed = (34038481 * torch.arange(2**state_bits) + 76625530) % 2**32
    four_bytes = (hashed[:, None] >> torch.tensor([0, 8, 16, 24])) & 255
    return (four_bytes.sum(1) - 510).float() / _SPREAD
