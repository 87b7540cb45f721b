"""Searches the scales of rounded weights before a block is tuned (SignRoundV2, arXiv 2512.04746).

Each group gets the scale, from a list of multiples of its own, with the least squared error of its weights rounded to
nearest. The error of each weight counts by the mean square of its input, the diagonal of the second moments.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from gyroquant.calibration.observers import MeanSquare, SecondMoments, watch
from gyroquant.grids import Grid, GroupParams, QuantizedWeight
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.rounding.steps.base import RoundedBlock

_FACTORS = tuple(1.2 - 0.02 * i for i in range(41))  # on both ends of a group's range
_PIECE = 1 << 22  # weights that are searched at once


def with_searched_scales(block: RoundedBlock, matrices: Mapping[str, Tensor | None]) -> RoundedBlock:
    """The block with searched scales, and codes that round to nearest with them.

    `matrices` are those to round, shape (out, in), by the name of the layer's weight; layers with None stay. The inputs
    are those of the unrounded block, on the calibration text after the rounded blocks.
    """
    searched = {name: matrix for name, matrix in matrices.items() if matrix is not None}
    layers, squares = dict(block.layers), _input_squares(block, searched)
    for name, matrix in searched.items():
        op, weight = layers[name].op, layers[name].weight
        moved = matrix if weight.basis is None else weight.basis.encode(matrix)
        layers[name] = RoundedLayer(op, search_scales(moved, weight, squares[name]))
    return replace(block, layers=layers)


def search_scales(matrix: Tensor, rounded: QuantizedWeight, weights: Tensor) -> QuantizedWeight:
    """A rounded matrix with searched scales.

    - `matrix`: the numbers to round, shape (out, columns), fp32, in the basis of the codes.
    - `weights`: what the squared errors of columns count, in equal parts of the rows: shape (parts, columns).

    A super-block whose scales are stored together, or a group, keeps its scales and codes if no others are better.
    """
    grid, columns = rounded.grid, matrix.shape[1]
    size = columns // rounded.params.scale.shape[1]
    counted = weights.repeat_interleave(len(matrix) // len(weights), 0)
    found = []
    for start in range(0, len(matrix), max(1, _PIECE // columns)):
        rows = slice(start, start + max(1, _PIECE // columns))
        groups, own = (x[rows].unflatten(1, (-1, size)) for x in (matrix, counted))
        found.append(_search(grid, groups, own, rounded.params[rows], rounded.codes[rows]))
    codes, scale, zero = (torch.cat(part) for part in zip(*found, strict=True))
    return replace(rounded, codes=codes, params=GroupParams(scale, zero))


def _search(
    grid: Grid, groups: Tensor, weights: Tensor, params: GroupParams, codes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, shape (rows, columns), scales and zero points of some rows."""

    def error(numbers: Tensor) -> Tensor:
        return ((numbers - groups).square_() * weights).sum(-1, keepdim=True)

    least, best = torch.full_like(params.scale, torch.inf), params
    for factor in _FACTORS:
        ends = torch.full_like(params.scale, factor)
        tried = grid.round_params(*grid.rescale(params, ends, ends))
        own = error(grid.nearest(groups, tried))
        better, least = own < least, torch.minimum(own, least)
        best = GroupParams(torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero))
    best, old = grid.round_params(best.scale, best.zero), codes.view(groups.shape)
    new = grid.encode(groups, best)
    gain = error(grid.decode(old, params)) - error(grid.decode(new, best))
    count = grid.stored_together(groups.shape[1] * groups.shape[2])
    together = gain.unflatten(1, (-1, count)).sum(2, keepdim=True).expand(-1, -1, count, -1)
    better = together.flatten(1, 2) > 0
    chosen = torch.where(better, new, old).flatten(1)
    return chosen, torch.where(better, best.scale, params.scale), torch.where(better, best.zero, params.zero)


@torch.no_grad()
def _input_squares(block: RoundedBlock, names: Iterable[str]) -> dict[str, Tensor]:
    """The mean squares of the inputs of layers in the basis of their weights, shape (parts, columns): a part for each
    expert, or one. Experts that no token reached have ones.
    """
    text, seen = block.text, dict[tuple[str, int | None], MeanSquare | SecondMoments]()
    assert text.hidden is not None

    def note(name: str, expert: int | None, x: Tensor) -> None:
        if (name, expert) not in seen:
            based = block.layers[name].weight.basis is not None
            seen[name, expert] = (SecondMoments if based else MeanSquare)(x.shape[-1])
        seen[name, expert](x)

    with ExitStack() as watching:
        for name in names:
            for undo in watch(text.runner.model, block.layers[name].op, partial(note, name)):
                watching.callback(undo)
        weights, plain = text.local(_unrounded(block)), text.hidden
        for start in range(0, len(plain), text.batch):
            for sequence in range(start, min(len(plain), start + text.batch)):
                block.run(weights, plain[sequence : sequence + 1].to(text.device), [sequence])
            block.progress()
    return {name: _by_part(block.layers[name], name, seen) for name in names}


def _unrounded(block: RoundedBlock) -> dict[str, Tensor]:
    """The parameters before rounding. What a low-rank branch holds, which runs beside them, is taken away."""
    found = dict(block.tensors)
    for name, layer in block.layers.items():
        if layer.weight.low_rank is not None:
            matrix = layer.op.to_matrix(found[name].float()) - layer.weight.low_rank.product()
            found[name] = layer.op.to_param(matrix)
    return found


def _by_part(
    layer: RoundedLayer, name: str, seen: Mapping[tuple[str, int | None], MeanSquare | SecondMoments]
) -> Tensor:
    parts = range(layer.op.shape[0]) if layer.op.entry.stacked else [None]
    found = []
    for part in parts:
        observed, basis = seen.get((name, part)), layer.weight.basis
        if observed is None:
            found.append(torch.ones(layer.weight.codes.shape[1]))
        elif isinstance(observed, MeanSquare):
            found.append(observed.value.float())
        else:
            assert basis is not None
            scale = basis.scale if basis.scale is None or part is None else basis.scale[part : part + 1]
            moved = replace(basis, scale=scale).second_moments(observed.second_moments.cpu())
            found.append((moved.diagonal() / observed.count).float())
    return torch.stack(found)


__all__ = ["search_scales", "with_searched_scales"]
