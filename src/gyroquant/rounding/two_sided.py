"""Rounding with feedback of errors along both sides of a matrix, from YAQA (Tseng et al., arXiv 2505.22988).

The error ``D = W - Q``, shape (out, in), costs ``tr(H_O D H_I D^T)``. With upper triangular R_O and R_I, ``H_O = R_O
R_O^T`` and ``H_I = R_I R_I^T``, this is the sum of the squares of ``R_O^T D R_I``. Entry (r, j) of that matrix depends
only on errors in rows up to r and columns up to j, and in its own error it is linear. So in any order that takes an
entry after all entries of lower rows and columns, later entries can be made 0 whatever the earlier ones are. Rounding
each entry to the number nearest to where its own term is 0 is then greedy: it adds the least possible cost.

With U the inverse of R, so ``U^T U = H^-1``, this is GPTQ twice. Along the columns it is GPTQ, of the weights f that
remain after the errors of earlier columns. Within a column, f is itself rounded by GPTQ down the rows, with U_O. YAQA
goes from the last entry to the first, with the lower factors; this is its mirror image.

Entries on an anti-diagonal (r + j constant) do not depend on each other and are rounded at once. For evenly spaced
numbers on a CPU, a loop that numba compiles takes the place of that, if numba is installed. Its sums are in another
order, so single codes may differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gyroquant.grids import EvenGrid, Grid, GroupParams
from gyroquant.grids.tiled import has_compiler

_ROWS = 512  # rows between two products with all rows above


def round_columns(
    free: Tensor, grid: Grid, params: GroupParams, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Rounds some columns of a matrix whose scales are known.

    - `free`: the columns, compensated for the errors of all columns before them, shape (columns, rows), fp32.
    - `params`: the scales, shape (rows, tiles, 1): one for each `grid.tile_columns` columns.
    - `inputs`: U_I for these columns, shape (columns, columns).
    - `outputs`: U_O, shape (rows, rows).

    Returns the codes, uint8, and the errors that GPTQ feeds to later columns, fp32, both of the shape of `free`.
    """
    if isinstance(grid, EvenGrid) and free.device.type == "cpu" and has_compiler():
        return _compiled(free, grid, params, inputs, outputs)
    sweep, rows = _Sweep(free, grid, params, inputs), free.shape[1]
    for start in range(0, rows, _ROWS):
        sweep.rows(start, min(rows, start + _ROWS), outputs)
    return sweep.codes.flip(1).flatten(1).T, sweep.errors.flip(1).flatten(1).T.contiguous()


def _compiled(
    free: Tensor, grid: EvenGrid, params: GroupParams, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """As `round_columns`."""
    from gyroquant.rounding.two_sided_compiled import round_part

    codes, errors, down = torch.empty(free.shape, dtype=torch.uint8), torch.empty_like(free), torch.empty_like(free)
    scale, zero = params.scale[..., 0].T, params.zero[..., 0].T
    for start in range(0, free.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        above = down[:, :start] @ outputs[:start, rows].float()
        made = [torch.empty_like(above, dtype=kind.dtype) for kind in (codes, errors, down)]
        given = [
            free[:, rows].clone(),
            above,
            scale[:, rows],
            zero[:, rows],
            inputs.float(),
            outputs[rows, rows].float(),
        ]
        arrays = [array.contiguous().numpy() for array in given]
        round_part(*arrays, grid.code_count - 1, *(part.numpy() for part in made))
        for whole, part in zip((codes, errors, down), made, strict=True):
            whole[:, rows] = part
    return codes, errors


class _Sweep:
    """The state of the rounding of some columns. Tiles of columns are held from the last to the first: then the
    entries of an anti-diagonal have rising rows and rising tiles, so that slices and diagonals of tensors hold them.

    - `codes`, `errors`: shape (rows, tiles, columns of a tile). The errors are those along the columns.
    - `down`: the errors along the rows, shape (tiles, rows, columns of a tile).
    """

    def __init__(self, free: Tensor, grid: Grid, params: GroupParams, inputs: Tensor):
        columns, rows = free.shape
        tile, self.grid = grid.tile_columns, grid
        self.tiles = columns // tile
        self.free = free.T.reshape(rows, self.tiles, tile).flip(1)
        self.scale, self.zero = (part[..., 0].flip(1) for part in (params.scale, params.zero))
        self.codes = torch.zeros(self.free.shape, dtype=torch.uint8, device=free.device)
        self.errors = torch.zeros_like(self.free)
        self.down = torch.zeros(self.tiles, rows, tile, device=free.device)
        upper = inputs.float().reshape(self.tiles, tile, self.tiles, tile).flip(0, 2)
        corners = upper.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # of each tile, shape (tiles, tile, tile)
        eye = torch.eye(tile, device=free.device).expand_as(corners)
        self.own = torch.linalg.solve_triangular(corners.contiguous(), eye, upper=True)
        across = upper.permute(2, 0, 1, 3).contiguous()  # (tile that is compensated, tile of the error, tile, tile)
        across.diagonal(dim1=0, dim2=1).zero_()
        self.across = across.flatten(1, 2)

    def rows(self, start: int, stop: int, outputs: Tensor) -> None:
        """Rounds rows start..stop. All rows before them are rounded."""
        upper = outputs[start:stop, start:stop].float()
        pivot, within = upper.diagonal().clone(), upper.T.tril(-1).contiguous()
        above = torch.zeros(self.tiles, stop - start, self.free.shape[2], device=self.free.device)
        if start:
            above = torch.matmul(outputs[:start, start:stop].T.float(), self.down[:, :start])
        count, down = stop - start, self.down[:, start:stop]
        part = [x[start:stop] for x in (self.free, self.errors, self.codes, self.scale, self.zero)]
        free, errors, codes, scale, zero = part
        tile = free.shape[2]
        for offset in range(1 - self.tiles, count):  # of the diagonal: row minus (reversed) tile
            first, last = max(0, offset), min(count, self.tiles + offset)
            low, high = first - offset, last - offset
            here = (slice(first, last), slice(low, high))
            later = errors[first:last, low:].flatten(1)  # tiles from `low` on are those of earlier columns
            across = _products(later, self.across[low:high, low * tile :])
            wanted = free[here].diagonal().T - across
            rows = _products(within[first:last, :last], down[low:high, :last])
            moved = wanted - above[low:high, first:last].diagonal().T - rows
            params = GroupParams(scale[here].diagonal()[:, None], zero[here].diagonal()[:, None])
            coded = self.grid.encode(moved, params)
            number = self.grid.decode(coded, params)
            own = _products(wanted - number, self.own[low:high])
            codes[here].diagonal().copy_(coded.T)
            errors[here].diagonal().copy_(own.T)
            down[low:high, first:last].diagonal().copy_(((moved - number) / pivot[first:last, None]).T)


def _products(vectors: Tensor, matrices: Tensor) -> Tensor:
    """Each vector times its matrix: (k, n) and (k, n, t) give (k, t)."""
    if matrices.shape[2] == 1:
        return (vectors * matrices[..., 0]).sum(1, keepdim=True)
    return torch.matmul(vectors[:, None], matrices)[:, 0]


__all__ = ["round_columns"]
