"""The measurements inside the models of a comparison: errors of layers, outliers of activations, l1 mass of blocks.

The tables at the end have the numbers that the plots of the page show.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from statistics import fmean, median
from typing import Any

from gyroquant.benchmark.rows import (
    UNROTATED,
    RunResult,
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
from gyroquant.benchmark.sizes import budget_of, budget_text, in_bytes

ORIGINAL = "original"
MEASURES = {"error": "relative squared error of the output", "decibels": "decibels above the rate-distortion bound"}
_MOST = 7  # recipes whose lines are still distinct in one plot, besides the original


def ranked(comparison: Mapping[str, Any], bits: int) -> list[RunResult]:
    """The runs of a budget with results, lowest seeds only: recommended, best and baseline, then the others by gap."""
    first = {group[0]["key"] for group in by_seed(comparison)}
    done = [row for row in rows(comparison, (tests(comparison) or [""])[0]) if row.done and row.run["key"] in first]
    return [row.run for row in sorted(done, key=lambda row: not row.roles) if budget_of(row.run) == bits]


def named(comparison: Mapping[str, Any], run: RunResult) -> str:
    """The name of a run in a selector: its label, with the bits if the label does not have them."""
    budget = budget_of(run)
    words = budget_text(budget) if in_bytes(budget) else f"W{budget}"
    return str(run["label"]) if words in str(run["label"]) else f"{short(comparison, run)} {words}"


def with_layers(comparison: Mapping[str, Any]) -> dict[str, RunResult]:
    """The runs whose layers were measured, by their names in the selector."""
    runs = (run for bits in sizes(comparison) for run in ranked(comparison, bits))
    return {named(comparison, run): run for run in runs if run.get("layers")}


def layer_values(run: RunResult) -> dict[tuple[str, int], dict[str, float]]:
    """The measures of each (module, block). Modules that differ in a number only, such as experts, are averaged.

    Embeddings and heads, which are in no block, are left out.
    """
    values: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for layer in run["layers"]:
        if layer["block"] is None:
            continue
        place = re.sub(r"\d+", "*", layer["module"]), layer["block"]
        for measure, key in (("error", "output_error"), ("decibels", "decibels")):
            value = number(layer.get(key))
            if value is not None and (measure == "decibels" or value > 0):
                values[place][measure].append(value)
    return {place: {name: fmean(of_name) for name, of_name in of_place.items()} for place, of_place in values.items()}


def measures(comparison: Mapping[str, Any]) -> list[str]:
    """Those of MEASURES that some run has."""
    runs = with_layers(comparison).values()
    present = {name for run in runs for layer in layer_values(run).values() for name in layer}
    return [name for name in MEASURES if name in present]


def ranges(comparison: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """The lowest and the highest value of each recipe and measure, for a scale of colours that two recipes share."""
    ends: dict[str, dict[str, list[float]]] = {}
    for name, run in with_layers(comparison).items():
        values = layer_values(run).values()
        for measure in MEASURES:
            of_measure = [layer[measure] for layer in values if measure in layer]
            if of_measure:
                ends.setdefault(name, {})[measure] = [min(of_measure), max(of_measure)]
    return ends


def last(module: str) -> str:
    """The last part of a module's name. A list of experts keeps its whole name."""
    return module if "*" in module else module.rpartition(".")[2]


def transforming(comparison: Mapping[str, Any], bits: int) -> list[RunResult]:
    """The runs of a budget that transform the model and whose activations were measured.

    At most _MOST recipes, the best ones, and the same in all budgets.
    """
    by_budget = [_transforming(comparison, budget) for budget in sizes(comparison)]
    ranks = zip_longest(*([short(comparison, run) for run in runs] for runs in by_budget))
    best = list(dict.fromkeys(name for rank in ranks for name in rank if name is not None))[:_MOST]
    return [run for run in _transforming(comparison, bits) if short(comparison, run) in best]


def _transforming(comparison: Mapping[str, Any], bits: int) -> list[RunResult]:
    return [run for run in ranked(comparison, bits) if run.get("outliers") and family(run) != UNROTATED]


def outlier_sources(comparison: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The outlier figures of the original and of every run that transforms the model, with their names on the page."""
    runs = (run for bits in sizes(comparison) for run in transforming(comparison, bits))
    sources = [(ORIGINAL, list(comparison["original"].get("outliers") or ()))]
    return sources + [(named(comparison, run), list(run["outliers"])) for run in runs]


def outlier_sites(comparison: Mapping[str, Any], key: str = "site") -> list[str]:
    """The sites whose activations were measured. With `key` "mass", those with l1 masses."""
    return sorted({row["site"] for _, figures in outlier_sources(comparison) for row in figures if row.get(key)})


def with_mass(comparison: Mapping[str, Any]) -> list[str]:
    """The names in the selector of the runs whose l1 masses were measured."""
    runs = [run for bits in sizes(comparison) for run in transforming(comparison, bits)]
    return [named(comparison, run) for run in runs if any(row.get("mass") for row in run["outliers"])]


def masses(figures: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], tuple[float, float]]:
    """The bound and the largest entry by (site, block size), means over the blocks of the model."""
    pairs: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in figures:
        for size, (bound, largest) in (row.get("mass") or {}).items():
            if number(bound) is not None and number(largest) is not None:
                pairs[row["site"], int(size)].append((bound, largest))
    return {
        key: (fmean(bound for bound, _ in of_key), fmean(largest for _, largest in of_key))
        for key, of_key in pairs.items()
    }


def seeds(comparison: Mapping[str, Any], test: str) -> Iterable[tuple[list[RunResult], list[float]]]:
    """The runs that have results with several seeds, and their perplexities on a text."""
    for group in by_seed(comparison):
        scores = [(run, number(run["tests"].get(test, {}).get("perplexity"))) for run in group]
        kept = [(run, value) for run, value in scores if value is not None]
        if len(kept) > 1:
            yield [run for run, _ in kept], [value for _, value in kept]


@dataclass(frozen=True)
class Table:
    """A small table of texts. The first column has names, the others have numbers."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def seeds_table(comparison: Mapping[str, Any]) -> Table:
    """Perplexity over seeds."""
    lines = []
    for test in tests(comparison):
        for group, values in seeds(comparison, test):
            figures = map(perplexity, (min(values), median(values), max(values)))
            lines.append((named(comparison, group[0]), test, str(len(values)), *figures))
    return Table(("recipe", "text", "seeds", "lowest", "median", "highest"), lines)


def layers_table(comparison: Mapping[str, Any]) -> Table:
    """The median layer and the worst layer of each recipe."""
    present = measures(comparison)
    headings = {"error": ("median error", "worst error"), "decibels": ("median dB", "worst dB")}
    lines = []
    for name, run in with_layers(comparison).items():
        values = layer_values(run)
        line = [name]
        for measure in present:
            of_measure = {place: layer[measure] for place, layer in values.items() if measure in layer}
            digits = 4 if measure == "error" else 1
            worst = max(of_measure, key=of_measure.__getitem__, default=None)
            line.append(decimals(median(of_measure.values()) if of_measure else None, digits))
            where = "" if worst is None else f" ({last(worst[0])} of block {worst[1]})"
            line.append(decimals(None if worst is None else of_measure[worst], digits) + where)
        lines.append(tuple(line))
    return Table(("recipe", *(heading for measure in present for heading in headings[measure])), lines)


def outliers_table(comparison: Mapping[str, Any]) -> Table:
    """max/rms and kurtosis at each site, means over blocks."""
    sites = outlier_sites(comparison)

    def line(name: str, figures: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
        texts = [name]
        for site in sites:
            means = []
            for key in ("max_over_rms", "kurtosis"):
                values = [number(row.get(key)) for row in figures if row["site"] == site]
                kept = [value for value in values if value is not None]
                means.append(decimals(fmean(kept) if kept else None, 1))
            texts.append(" / ".join(means))
        return tuple(texts)

    return Table(("max/rms / kurtosis", *sites), [line(name, figures) for name, figures in outlier_sources(comparison)])


def mass_table(comparison: Mapping[str, Any]) -> Table:
    """Bound and largest entry by block size, at each site."""
    by_name = {name: masses(figures) for name, figures in outlier_sources(comparison)}
    blocks = sorted({size for of_name in by_name.values() for _, size in of_name})
    lines = []
    for name, of_name in by_name.items():
        for site in sorted({site for site, _ in of_name}):
            pairs = [of_name.get((site, size)) for size in blocks]
            texts = (f"{decimals(pair and pair[0], 2)} / {decimals(pair and pair[1], 2)}" for pair in pairs)
            lines.append((f"{name}, {site}", *texts))
    return Table(("bound / largest entry", *map(str, blocks)), lines)
