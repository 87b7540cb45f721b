"""Chooses the bits of every row of outputs: one order over all rows of the model (MixLLM, arXiv 2412.14590)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gyroquant.errors import RecipeError
from gyroquant.rounding.bit_allocation import Choice

Places = npt.NDArray[np.int64]
"""For each row, the place of its width among the widths that it may have, the fewest bits first."""


@dataclass(frozen=True)
class RowChoices:
    """What the widths of a layer's rows cost and take.

    - `costs`: float64 of shape (rows, widths), for the fewest bits first.
    - `sizes`: the bits stored for a row, for each width.
    """

    costs: npt.NDArray[np.float64]
    sizes: tuple[int, ...]


def choose_rows(
    layers: Sequence[RowChoices], tables: Mapping[Choice, float], table_sizes: Mapping[Choice, int], room: int
) -> tuple[list[Places], dict[str, int]]:
    """For each row, the place of its width, and for each table its bits, with the least total cost within `room` bits.

    All rows of all layers are in one order: that of the cost that one more bit saves (the knapsack's relaxation, so the
    result is optimal but for what less than one step of a row is worth). Widths of a row that others beat at a lower
    price are left out. Tables and heads are tried in every combination. Raises RecipeError if nothing fits.
    """
    names = sorted({name for name, _ in tables})
    ways = [[choice for choice in sorted(tables) if choice[0] == name] for name in names]
    best: tuple[float, list[Places], dict[str, int]] | None = None
    for way in itertools.product(*ways):
        taken = _within(layers, room - sum(table_sizes[choice] for choice in way))
        if taken is None:
            continue
        rows = sum(
            float(np.take_along_axis(own.costs, at[:, None], 1).sum()) for own, at in zip(layers, taken, strict=True)
        )
        total = rows + sum(tables[choice] for choice in way)
        if best is None or total < best[0]:
            best = total, taken, dict(way)
    if best is None:
        least = sum(min(table_sizes[choice] for choice in way) for way in ways)
        least += sum(len(own.costs) * min(own.sizes) for own in layers)
        raise RecipeError(
            f"weights.allocate has room for {room} bits, and the rows take at least {least}: raise its limit"
        )
    return best[1], best[2]


def _within(layers: Sequence[RowChoices], room: int) -> list[Places] | None:
    """The widths of all rows within `room` bits; None if the smallest do not fit."""
    taken: list[Places] = [np.zeros(len(own.costs), dtype=np.int64) for own in layers]
    room -= sum(len(own.costs) * own.sizes[0] for own in layers)
    if room < 0:
        return None
    parts = [_steps(own, number) for number, own in enumerate(layers)]
    gain, layer, row, before, after, size = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((after, row, layer, -gain))  # of equal gains, those of early layers and rows come first
    layer, row, before, after, size = (part[order] for part in (layer, row, before, after, size))
    first = int(np.searchsorted(np.cumsum(size), room, side="right"))
    for number, own in enumerate(taken):
        mine = np.flatnonzero(layer[:first] == number)
        np.maximum.at(own, row[mine], after[mine])
    room -= int(size[:first].sum())
    least = np.minimum.accumulate(size[::-1])[::-1]
    for at in range(first, len(size)):  # what is left may hold a few more steps of short rows
        if room < least[at]:
            break
        if size[at] <= room and taken[layer[at]][row[at]] == before[at]:
            taken[layer[at]][row[at]] = after[at]
            room -= int(size[at])
    return taken


def _steps(own: RowChoices, number: int) -> tuple[npt.NDArray[Any], ...]:
    """The steps of every row of a layer from a width to a larger one along the lower convex hull of its costs.

    Arrays of the cost that a step saves for each bit, the number of the layer, the row, the places of the widths before
    and after, and the bits of the step.
    """
    sizes, rows = np.array(own.sizes, dtype=np.float64), np.arange(len(own.costs))
    at, found = np.zeros(len(rows), dtype=np.int64), []
    most = np.full(len(rows), np.inf)
    for _ in own.sizes[1:]:
        wider = sizes[None] > sizes[at][:, None]
        saved = own.costs[rows, at][:, None] - own.costs
        gains = np.where(wider, saved / np.where(wider, sizes[None] - sizes[at][:, None], 1), -np.inf)
        after = gains.argmax(1)
        most = np.minimum(most, gains[rows, after])  # rounding must not make a later step the better one
        good = np.flatnonzero(most > 0)
        size = (sizes[after] - sizes[at]).astype(np.int64)
        found.append((most[good], np.full(len(good), number), good, at[good], after[good], size[good]))
        at = np.where(most > 0, after, at)
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


__all__ = ["Places", "RowChoices", "choose_rows"]
