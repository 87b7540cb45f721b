"""Recipes for a result of a given size."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gyroquant.errors import GyroquantError, InputError
from gyroquant.grids import Grid
from gyroquant.recipes.schema import Recipe, load_recipe

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_WIDTHS = range(2, 9)


def parse_size(text: str) -> int:
    """A size in bytes, from a text such as `60MB`, `1.5 GiB` or `60000000`. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?b)?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[(match[2] or "B").upper()]) if match else 0
    if size <= 0:
        raise InputError(f"{text!r} is not a size: give a number and a unit, such as 60MB or 1.5GiB")
    return size


def with_size(recipe: Recipe, size: int) -> Recipe:
    """The recipe with bits chosen so that all weights of the result take at most `size` bytes.

    Layers may get one bit less than the recipe gives them and up to two more, embeddings and heads likewise if the
    recipe rounds them. Raises RecipeError if the recipe's grid has no bits to choose.
    """
    data, weights = recipe.to_dict(), recipe.weights
    allocate = data["weights"]["allocate"] or {}
    bits = {*allocate.get("bits", ()), *_around([weights.grid])}
    tables = [section.grid for section in (recipe.embeddings, recipe.head) if section is not None]
    allocate |= {"budget": None, "bytes": size, "bits": sorted(bits)}
    allocate["embeddings"] = _around(tables)
    data["weights"]["allocate"] = allocate
    return load_recipe(data)


def _around(grids: Iterable[Grid]) -> list[int]:
    """The bits around those of some grids, without those that a grid cannot have."""
    near = [(grid, width) for grid in grids for width in range(int(grid.bits) - 1, int(grid.bits) + 3)]
    return sorted({width for grid, width in near if width in _WIDTHS and _possible(grid, width)})


def _possible(grid: Grid, bits: int) -> bool:
    try:
        grid.at_bits(bits)
    except (GyroquantError, ValueError):
        return False
    return True
