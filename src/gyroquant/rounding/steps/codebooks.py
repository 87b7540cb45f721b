"""The best codebooks for given codes: linear least squares, by conjugate gradients.

With codes and scales fixed, the numbers of a matrix are linear in its codebooks, and the squared error of the layer's
outputs is quadratic. AQLM (arXiv 2401.06118) goes downhill with Adam, in steps of 1e-4. Conjugate gradients take the
exact best length of each step, so that sixteen suffice, and have no rate to choose. A block of 8 x 8 for each entry
preconditions them: the second moments at the places where the entry stands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gyroquant.grids import AdditiveGrid, GroupParams

_STEPS = 16
_ENOUGH = 1e-4  # of the first slope, squared: the rest changes little
_RIDGE = 1e-6  # of the mean diagonal of a block
_LENGTH = 8


def best_codebooks(
    grid: AdditiveGrid, codes: Tensor, params: GroupParams, slope: Tensor, second_moments: Tensor
) -> AdditiveGrid:
    """The grid with the storable codebooks nearest to those that lower ``d H d' - 2 <slope, d>`` most.

    d is the change of the numbers, shape (rows, columns), as `slope`, which is -1/2 times the gradient. H is
    `second_moments`, shape (columns, columns), positive definite. `codes` have shape (rows, columns), `params` (rows,
    groups, 1).
    """
    numbers = _Numbers(grid, codes, params)
    rest = numbers.pulled_back(slope)
    conditioned = numbers.preconditioner(second_moments)
    change, direction = torch.zeros_like(rest), torch.zeros_like(rest)
    before, first = 0.0, 0.0
    for _ in range(_STEPS):
        better = conditioned @ rest[..., None]
        size = float((rest * better.squeeze(-1)).sum())
        first = first or size
        if size <= _ENOUGH * first:
            break
        direction = better.squeeze(-1) + (direction * (size / before) if before else 0)
        moved = numbers.changed(direction)
        pull = moved @ second_moments
        curvature = float((pull * moved).sum())
        if curvature <= 0:
            break
        change += direction * (size / curvature)
        rest = rest - numbers.pulled_back(pull) * (size / curvature)
        before = size
    return grid.with_books(grid.books.to(change) + change)


class _Numbers:
    """How the numbers of a matrix depend on its codebooks, for given codes and scales."""

    def __init__(self, grid: AdditiveGrid, codes: Tensor, params: GroupParams):
        rows, columns = codes.shape
        self.entries = grid.entries(codes)  # (rows, vectors, codebooks)
        self.shape = (grid.codebooks, 2**grid.codebook_bits, _LENGTH)
        groups = params.scale.shape[1]
        self.scale = params.scale.expand(rows, groups, columns // groups // _LENGTH).reshape(rows, -1, 1)

    def changed(self, books: Tensor) -> Tensor:
        """The change of the numbers, shape (rows, columns), for a change of the codebooks."""
        total = books[0][self.entries[..., 0]]
        for m in range(1, len(books)):
            total = total + books[m][self.entries[..., m]]
        return (total * self.scale).flatten(1)

    def pulled_back(self, slope: Tensor) -> Tensor:
        """The transpose of `changed`: the slope along each number of the codebooks, for that along each weight."""
        pulls = (slope.unflatten(1, (-1, _LENGTH)) * self.scale).flatten(0, 1)
        books = torch.zeros(self.shape, dtype=slope.dtype, device=slope.device)
        for m in range(len(books)):
            books[m].index_add_(0, self.entries[..., m].flatten(), pulls)
        return books

    def preconditioner(self, h: Tensor) -> Tensor:
        """The inverse of each entry's own part of the quadratic form, shape (codebooks, entries, 8, 8)."""
        vectors = h.shape[0] // _LENGTH
        blocks = h.view(vectors, _LENGTH, vectors, _LENGTH).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        place = torch.arange(vectors, device=h.device)
        squares = self.scale.square().expand(-1, vectors, 1).flatten()
        own = []
        codebooks, count, _ = self.shape
        for m in range(codebooks):
            weight = torch.zeros(count * vectors, dtype=h.dtype, device=h.device)
            weight.index_add_(0, (self.entries[..., m] * vectors + place).flatten(), squares.to(h.dtype))
            own.append((weight.view(count, vectors) @ blocks.flatten(1)).view(count, _LENGTH, _LENGTH))
        every = torch.stack(own)
        diagonal = every.diagonal(dim1=-2, dim2=-1)
        mean = diagonal.mean(-1, keepdim=True)
        diagonal += torch.where(mean > 0, _RIDGE * mean, 1.0)
        return torch.linalg.inv(every)
