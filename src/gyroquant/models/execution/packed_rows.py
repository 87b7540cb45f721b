"""Rounded keys or values as packed codes, and the products of attention with them without decoding them to a matrix.

Codes of 1, 2, 4 or 8 bits are packed in planes: byte i of a vector of n numbers holds the codes of the numbers i,
i + n b/8, i + 2 n b/8 and so on, the first in the lowest bits. A plane comes out by one mask, without a shift or an
interleaving: its codes are too large by a power of two, which goes into the query, or into the result, instead. Codes
of other bits are packed as a dense stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gyroquant.grids import Grid, GroupParams
from gyroquant.grids.bitpack import pack, unpack

_PIECE = 2048  # tokens that are unpacked at a time, which bounds the memory besides the codes


def _planes(bits: int, n: int) -> int:
    """The number of codes in a byte, 0 if vectors of n codes are not packed in planes."""
    planes = 8 // bits
    return planes if 8 % bits == 0 and n % planes == 0 else 0


@dataclass
class PackedRows:
    """Rounded vectors of shape (batch, heads, length, n). Each is packed separately, so that more can be appended.

    - codes: shape (batch, heads, length, bytes), uint8.
    - scale: shape (batch, heads, length, groups), fp16.
    - zero: the same shape, uint8, in steps of the grid's zero points. None if the grid does not store any.
    """

    grid: Grid
    n: int
    codes: Tensor | None = None
    scale: Tensor | None = None
    zero: Tensor | None = None
    middle: float = 0.0  # the zero point, if the grid does not store one

    def __post_init__(self) -> None:
        self._planes = _planes(self.grid.bits, self.n)
        lowest = 2**self.grid.bits - 1
        masks = [lowest << (self.grid.bits * plane) for plane in range(self._planes)]
        self._masks = torch.tensor(masks, dtype=torch.uint8).view(-1, 1, 1, 1, 1)
        self._step = float(getattr(self.grid, "zero_step", 1.0))

    def __len__(self) -> int:
        return 0 if self.codes is None else self.codes.shape[2]

    @property
    def multiplies(self) -> bool:
        """Whether `scores` and `mix` work: codes in planes, and one scale a vector."""
        return self._planes > 0 and self.grid.group_of(self.n) == self.n

    def append(self, x: Tensor) -> None:
        """Rounds and appends vectors of shape (batch, heads, new, n)."""
        if not x.shape[2]:
            return
        groups = x.float().unflatten(-1, (-1, self.grid.group_of(self.n)))
        params = self.grid.fit(groups)
        codes = self._packed(self.grid.encode(groups, params).flatten(-2))
        new = {"codes": codes, "scale": params.scale.squeeze(-1).half()}
        if not getattr(self.grid, "symmetric", False):
            new["zero"] = torch.round(params.zero.squeeze(-1) / self._step).to(torch.uint8)
        else:
            self.middle = float(params.zero.flatten()[0])
        for name, value in new.items():
            old = getattr(self, name)
            setattr(self, name, value if old is None else torch.cat([old, value], dim=2))

    def _packed(self, codes: Tensor) -> Tensor:
        """Codes of shape (..., n) as bytes, (..., bytes)."""
        if not self._planes:
            return pack(codes, self.grid.bits).view(*codes.shape[:-1], -1).to(codes.device)
        first, *others = codes.unflatten(-1, (self._planes, -1)).unbind(-2)
        packed = first.clone()
        for plane, part in enumerate(others, start=1):
            packed |= part << (self.grid.bits * plane)
        return packed

    def _unpacked(self) -> Tensor:
        assert self.codes is not None
        if not self._planes:
            shape = (*self.codes.shape[:-1], self.n)
            return unpack(self.codes.reshape(-1), self.grid.bits, shape).to(self.codes.device)
        mask = 2**self.grid.bits - 1
        return torch.cat([(self.codes >> (self.grid.bits * plane)) & mask for plane in range(self._planes)], dim=-1)

    def _zero(self) -> Tensor:
        assert self.scale is not None
        if self.zero is None:
            return torch.full_like(self.scale, self.middle, dtype=torch.float32)
        return self.zero.float() * self._step

    def decode(self, dtype: torch.dtype) -> Tensor:
        """The vectors, shape (batch, heads, length, n)."""
        assert self.scale is not None
        codes = self._unpacked().unflatten(-1, (self.scale.shape[-1], -1))
        params = GroupParams(self.scale.float().unsqueeze(-1), self._zero().unsqueeze(-1))
        return self.grid.decode(codes, params).flatten(-2).to(dtype)

    def _plane_codes(self, start: int, dtype: torch.dtype) -> Tensor:
        """A piece of the codes as numbers, plane p times 2^(bits p).

        Shape (planes, batch, heads, length, n / planes).
        """
        assert self.codes is not None
        return (self.codes[:, :, start : start + _PIECE] & self._masks.to(self.codes.device)).to(dtype)

    def _sizes(self, x: Tensor) -> Tensor:
        """What the codes of each plane are too large by, to divide x of shape (planes, ...)."""
        sizes = 2.0 ** (self.grid.bits * torch.arange(self._planes, device=x.device, dtype=x.dtype))
        return sizes.view(-1, *[1] * (x.dim() - 1))

    def scores(self, query: Tensor) -> Tensor:
        """The products of queries with the vectors, shape (batch, heads, queries, length).

        `query` has shape (batch, heads, queries, n), fp32 or fp64: the queries that share a head are together.
        """
        assert self.scale is not None
        parts = query.unflatten(-1, (self._planes, -1)).movedim(-2, 0)
        parts = parts / self._sizes(parts)
        products = [
            (parts @ self._plane_codes(start, query.dtype).transpose(-1, -2)).sum(0)
            for start in range(0, len(self), _PIECE)
        ]
        scale, zero = self.scale.float().transpose(-1, -2), self._zero().transpose(-1, -2)
        return (torch.cat(products, dim=-1) - query.sum(-1, keepdim=True) * zero) * scale

    def mix(self, weights: Tensor) -> Tensor:
        """Sums of the vectors, shape (batch, heads, queries, n).

        `weights` has shape (batch, heads, queries, length), fp32 or fp64.
        """
        assert self.scale is not None
        weights = weights * self.scale.float().transpose(-1, -2)
        total: Tensor | float = 0.0
        for start in range(0, len(self), _PIECE):
            total = total + weights[..., start : start + _PIECE] @ self._plane_codes(start, weights.dtype)
        assert isinstance(total, Tensor)
        mixed = (total / self._sizes(total)).movedim(0, -2).flatten(-2)
        return mixed - weights @ self._zero().to(weights.dtype)

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Applies a function to the tensors, whose first axis is the batch and whose third counts vectors."""
        for name in ("codes", "scale", "zero"):
            if getattr(self, name) is not None:
                setattr(self, name, function(getattr(self, name)))

    @property
    def bytes(self) -> int:
        """The size of codes, scales and zero points in bytes."""
        parts = (self.codes, self.scale, self.zero)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)
