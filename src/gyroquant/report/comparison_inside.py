"""What a comparison holds of the inside of models: errors of layers, outliers of activations, l1 mass of blocks.

The tables at the end say in numbers what the plots of the page show.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean, median
from typing import Any

from gyroquant.report.comparison_rows import (
    UNROTATED,
    Cell,
    by_seed,
    decimals,
    family,
    number,
    perplexity,
    rows,
    short,
    sizes,
    tests,
)

ORIGINAL = "original"
MEASURES = {"error": "relative squared error of the output", "decibels": "decibels above the limit of any code"}
_MOST = 7  # recipes that a plot of lines can tell apart beside the original


def ranked(comparison: Mapping[str, Any], bits: int) -> list[Cell]:
    """The cells of a budget that were done, lowest seeds only: recommended, best and baseline, then the rest by gap."""
    first = {group[0]["key"] for group in by_seed(comparison)}
    found = [row for row in rows(comparison, (tests(comparison) or [""])[0]) if row.done and row.cell["key"] in first]
    return [row.cell for row in sorted(found, key=lambda row: not row.roles) if row.cell["bits"] == bits]


def named(comparison: Mapping[str, Any], cell: Cell) -> str:
    """What a selector calls a cell: its label, with the bits where that leaves them out."""
    bits = f"W{cell['bits']}"
    return str(cell["label"]) if bits in str(cell["label"]) else f"{short(comparison, cell)} {bits}"


def with_layers(comparison: Mapping[str, Any]) -> dict[str, Cell]:
    """The cells whose layers were measured, by what the selector calls them."""
    cells = (cell for bits in sizes(comparison) for cell in ranked(comparison, bits))
    return {named(comparison, cell): cell for cell in cells if cell.get("layers")}


def layer_values(cell: Cell) -> dict[tuple[str, int], dict[str, float]]:
    """The measures of each (module, block); modules that differ in a number only, as experts do, are averaged."""
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for layer in cell["layers"]:
        place = re.sub(r"\d+", "*", layer["module"]), layer["block"]
        for measure, key in (("error", "output_error"), ("decibels", "decibels")):
            value = number(layer.get(key))
            if value is not None and (measure == "decibels" or value > 0):
                found[place][measure].append(value)
    return {place: {name: fmean(all_of) for name, all_of in one.items()} for place, one in found.items()}


def measures(comparison: Mapping[str, Any]) -> list[str]:
    """Which of MEASURES there are."""
    cells = with_layers(comparison).values()
    there = {name for cell in cells for one in layer_values(cell).values() for name in one}
    return [name for name in MEASURES if name in there]


def ranges(comparison: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """The least and the largest value of each recipe and measure, for a scale of colours that two recipes share."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, cell in with_layers(comparison).items():
        values = layer_values(cell).values()
        for measure in MEASURES:
            of_measure = [one[measure] for one in values if measure in one]
            if of_measure:
                found.setdefault(name, {})[measure] = [min(of_measure), max(of_measure)]
    return found


def last(module: str) -> str:
    """A module without what it lies in, but for lists of experts."""
    return module if "*" in module else module.rpartition(".")[2]


def transforming(comparison: Mapping[str, Any], bits: int) -> list[Cell]:
    """The cells of a budget that transform the model and whose activations were measured; of many the best, the same
    recipes in all budgets, no more than can be drawn.
    """
    there = [_transforming(comparison, one) for one in sizes(comparison)]
    ranks = zip_longest(*([short(comparison, cell) for cell in cells] for cells in there))
    best = list(dict.fromkeys(name for rank in ranks for name in rank if name is not None))[:_MOST]
    return [cell for cell in _transforming(comparison, bits) if short(comparison, cell) in best]


def _transforming(comparison: Mapping[str, Any], bits: int) -> list[Cell]:
    return [one for one in ranked(comparison, bits) if one.get("outliers") and family(one) != UNROTATED]


def outlier_sources(comparison: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The outlier figures of the original and of every cell that transforms the model, by what the page calls them."""
    cells = (cell for bits in sizes(comparison) for cell in transforming(comparison, bits))
    found = [(ORIGINAL, list(comparison["original"].get("outliers") or ()))]
    return found + [(named(comparison, cell), list(cell["outliers"])) for cell in cells]


def outlier_sites(comparison: Mapping[str, Any], key: str = "site") -> list[str]:
    """The sites whose activations were measured; with `key` "mass" those with l1 masses."""
    return sorted({one["site"] for _, found in outlier_sources(comparison) for one in found if one.get(key)})


def with_mass(comparison: Mapping[str, Any]) -> list[str]:
    """The recipes, by what the selector calls them, whose l1 masses were measured."""
    cells = [cell for bits in sizes(comparison) for cell in transforming(comparison, bits)]
    return [named(comparison, cell) for cell in cells if any(one.get("mass") for one in cell["outliers"])]


def masses(found: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], tuple[float, float]]:
    """The bound and the largest entry by site and block size, means over the blocks of the model."""
    pairs: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for one in found:
        for size, (bound, largest) in (one.get("mass") or {}).items():
            if number(bound) is not None and number(largest) is not None:
                pairs[one["site"], int(size)].append((bound, largest))
    return {key: (fmean(one[0] for one in all_of), fmean(one[1] for one in all_of)) for key, all_of in pairs.items()}


def seeds(comparison: Mapping[str, Any], test: str) -> Iterable[tuple[list[Cell], list[float]]]:
    """The cells that were done with several seeds, and their perplexities on a text."""
    for group in by_seed(comparison):
        found = [(cell, number(cell["tests"].get(test, {}).get("perplexity"))) for cell in group]
        kept = [(cell, value) for cell, value in found if value is not None]
        if len(kept) > 1:
            yield [cell for cell, _ in kept], [value for _, value in kept]


@dataclass(frozen=True)
class Table:
    """A small table of texts; its first column is a name, the others are numbers."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def seeds_table(comparison: Mapping[str, Any]) -> Table:
    """Perplexity over seeds."""
    lines = []
    for test in tests(comparison):
        for group, values in seeds(comparison, test):
            figures = map(perplexity, (min(values), median(values), max(values)))
            lines.append((named(comparison, group[0]), test, str(len(values)), *figures))
    return Table(("recipe", "text", "seeds", "least", "median", "most"), lines)


def layers_table(comparison: Mapping[str, Any]) -> Table:
    """The median layer and the worst layer of each recipe."""
    there = measures(comparison)
    headings = {"error": ("median error", "worst error"), "decibels": ("median dB", "worst dB")}
    lines = []
    for name, cell in with_layers(comparison).items():
        values = layer_values(cell)
        line = [name]
        for measure in there:
            found = {place: one[measure] for place, one in values.items() if measure in one}
            digits = 4 if measure == "error" else 1
            worst = max(found, key=found.__getitem__, default=None)
            line.append(decimals(median(found.values()) if found else None, digits))
            where = "" if worst is None else f" ({last(worst[0])} of block {worst[1]})"
            line.append(decimals(None if worst is None else found[worst], digits) + where)
        lines.append(tuple(line))
    return Table(("recipe", *(heading for measure in there for heading in headings[measure])), lines)


def outliers_table(comparison: Mapping[str, Any]) -> Table:
    """max/rms and kurtosis at each site, means over blocks."""
    sites = outlier_sites(comparison)

    def line(name: str, found: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
        texts = [name]
        for site in sites:
            figures = []
            for key in ("max_over_rms", "kurtosis"):
                values = [number(one.get(key)) for one in found if one["site"] == site]
                kept = [value for value in values if value is not None]
                figures.append(decimals(fmean(kept) if kept else None, 1))
            texts.append(" / ".join(figures))
        return tuple(texts)

    return Table(("max/rms / kurtosis", *sites), [line(name, found) for name, found in outlier_sources(comparison)])


def mass_table(comparison: Mapping[str, Any]) -> Table:
    """Bound and largest entry by block size, at each site."""
    of_all = {name: masses(found) for name, found in outlier_sources(comparison)}
    blocks = sorted({size for one in of_all.values() for _, size in one})
    lines = []
    for name, one in of_all.items():
        for site in sorted({site for site, _ in one}):
            pairs = [one.get((site, size)) for size in blocks]
            texts = (f"{decimals(pair and pair[0], 2)} / {decimals(pair and pair[1], 2)}" for pair in pairs)
            lines.append((f"{name}, {site}", *texts))
    return Table(("bound / largest entry", *map(str, blocks)), lines)
