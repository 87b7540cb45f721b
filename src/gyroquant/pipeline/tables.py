"""Rounds tables of embeddings. A table that is tied to a head is rounded for both of its uses at once.

A table that nothing is tied to has errors in each row alone, so every row is rounded to nearest, however often the
token occurs. For a tied table E, row r costs ``p_r (d H d' + c |d|^2)``, where d is the error of the row, H the second
moments of the head's inputs, c the cost of an error in a looked-up row, and p_r how often the token occurs, which is
the same for inputs and outputs. So the frequency does not change which codes of a row are best, and all rows share the
same second moments, ``H + c I``.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from gyroquant.calibration.observers import input_key
from gyroquant.grids import Grid, QuantizedWeight, joined
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.rounding.base import InputStatistics
from gyroquant.rounding.layers import LayerGroup, RoundingConfig
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.system.progress import Advance

# c, relative to the mean second moment of the head's inputs. Rounded to nearest at 4 bits, the embedding of
# SmolLM2-135M costs 0.9 % of perplexity, and the same numbers in the head 9 %.
LOOKUP = 0.1
_ROWS = 32768  # rows that are rounded at once, or a few less, so that they are whole tiles of a grid


def table_statistics(graph: ModelGraph, name: str, layers: LayerGroup) -> InputStatistics | None:
    """The statistics that a table is rounded with, given those of the head; None if no observed head is tied to it.

    They have no input error: a table that corrected errors of its head would not be the embedding any more.
    """
    heads = [graph.find_op(alias) for alias, stored in graph.tied.items() if stored == name]
    observed = [layers.statistics(input_key(head, frozenset())) for head in heads if head is not None]
    if not observed or observed[0] is None:
        return None
    moments = observed[0].second_moments
    lookup = LOOKUP * moments.diagonal().mean() * torch.eye(len(moments), device=moments.device)
    return InputStatistics(moments + lookup, observed[0].count)


def table_steps(op: LinearOp, grid: Grid) -> int:
    """How many times `round_table` reports progress."""
    return len(range(0, op.matrix_shape[0], _rows(grid)))


def _rows(grid: Grid) -> int:
    return max(1, _ROWS // grid.tile_rows) * grid.tile_rows


def round_table(
    layers: LayerGroup,
    op: LinearOp,
    statistics: InputStatistics | None,
    grid: Grid,
    config: RoundingConfig,
    advance: Advance = lambda: None,
) -> RoundedLayer:
    """Rounds a table of the layers outside the blocks, shape (tokens, hidden), with the steps of the other layers.

    Without statistics it is rounded to nearest. No row depends on another one, so memory holds what some of them need.
    """
    if statistics is None:
        config = replace(config, steps=[RoundToNearest()])
    matrix, parts = layers.matrix(op), list[QuantizedWeight]()
    grid = grid.for_columns(matrix.shape[1]).with_tensor_scale(config.encoded(matrix, statistics))
    for rows in matrix.split(_rows(grid)):
        parts.append(config.solve_part(config.prepare(op.name, rows, statistics), grid))
        advance()
    return RoundedLayer(op, joined(parts))
