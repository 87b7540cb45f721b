"""Plots of measurements inside a model: errors of layers, outliers of activations, l1 mass of blocks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gyroquant.benchmark.diagnostics import (
    MEASURES,
    ORIGINAL,
    last,
    layer_values,
    masses,
    measures,
    outlier_sites,
    outlier_sources,
    ranges,
    transforming,
    with_layers,
    with_mass,
)
from gyroquant.benchmark.page.charts import Spec, frame, legend, rounded, ticks
from gyroquant.benchmark.rows import short, sizes

AFTER = "after the recipe"
_POWER = "measure == 'decibels' ? {} : log({}) / LN10"  # the value that a colour shows
FIGURES = {"max_over_rms": "largest entry over the rms", "kurtosis": "kurtosis (a Gaussian has 3)"}


def heading(measures_of: Mapping[str, str]) -> Spec:
    """The title of a plot that shows one of several measures, selected by the parameter `measure`."""
    words = json.dumps(measures_of)
    return {"text": {"expr": f"{words}[measure]"}, "anchor": "start"}


def layers(comparison: Mapping[str, Any]) -> Spec | None:
    """Errors by block and module.

    Parameters: `recipe`, `measure`, and `low` and `high`, the ends of the scale of colours.
    """
    present, spans = measures(comparison), ranges(comparison)
    if not present:
        return None
    values: list[dict[str, Any]] = []
    modules: dict[str, None] = {}
    for name, run in with_layers(comparison).items():
        for (module, block), layer in layer_values(run).items():
            modules[last(module)] = None
            figures = {measure: rounded(value, 4) for measure, value in layer.items()}
            values.append({"recipe": name, "module": last(module), "block": block, **figures})
    blocks = sorted({value["block"] for value in values})
    first, measure = next(name for name in spans if present[0] in spans[name]), present[0]
    low, high = spans[first][measure]
    hover = [{"field": name, "type": "nominal"} for name in ("recipe", "module", "block", "error", "decibels")]
    return frame(
        "Error of each rounded layer, by block and module.",
        28 * len(modules),
        {"recipe": first, "measure": measure, "low": low, "high": high},
        title=heading(MEASURES),
        data={"values": values},
        transform=[
            {"filter": "datum.recipe == recipe && isValid(datum[measure])"},
            {"calculate": _POWER.format("datum.decibels", "datum.error"), "as": "value"},
        ],
        mark={"type": "rect", "tooltip": True},
        encoding={
            "x": {
                "field": "block",
                "type": "ordinal",
                "title": "block",
                "axis": {
                    "labelAngle": 0,
                    "labelOverlap": False,
                    "values": blocks[:: next(step for step in (1, 2, 5, 10, 20, 50) if len(blocks) <= 10 * step)],
                    "domain": False,
                    "ticks": False,
                },
            },
            "y": {
                "field": "module",
                "type": "nominal",
                "title": None,
                "sort": list(modules),
                "axis": {"labelLimit": 110, "domain": False, "ticks": False},
            },
            "color": _error_color(),
            "tooltip": hover,
        },
    )


def _error_color() -> Spec:
    """Colours of decibels, or of the logarithm of an error, from the parameter `low` to the parameter `high`."""
    return {
        "field": "value",
        "type": "quantitative",
        "scale": {
            "domainMin": {"expr": _POWER.format("low", "low")},
            "domainMax": {"expr": _POWER.format("high", "high")},
            "clamp": True,
            "nice": False,
            "zero": False,
        },
        "legend": {
            "orient": "bottom",
            "title": None,
            "gradientLength": {"expr": "min(width, 260)"},
            "tickCount": 4,
            "labelExpr": "measure == 'decibels' ? datum.label + ' dB' : format(pow(10, datum.value), '.2~g')",
        },
    }


def _lines(comparison: Mapping[str, Any]) -> Iterable[tuple[str, int | None, Iterable[Mapping[str, Any]]]]:
    yield ORIGINAL, None, comparison["original"].get("outliers") or ()
    for bits in sizes(comparison):
        for run in transforming(comparison, bits):
            yield short(comparison, run), bits, run["outliers"]


def outliers(comparison: Mapping[str, Any]) -> Spec | None:
    """Outliers of activations by block, before and after the transforms. Parameters `site`, `measure`, `bits`."""
    values = []
    names: dict[str, None] = {}
    for name, bits, rows in _lines(comparison):
        for row in rows:
            figures = {key: rounded(row.get(key), 4) for key in FIGURES}
            if all(value is not None and value > 0 for value in figures.values()):
                names[name] = None
                values.append({"recipe": name, "bits": bits, "site": row["site"], "block": row["block"], **figures})
    if not values:
        return None
    everything = [value[key] for value in values for key in FIGURES]
    sites = outlier_sites(comparison)
    budgets = [value["bits"] for value in values if value["bits"] is not None]
    hover = [{"field": name, "type": "nominal"} for name in ("recipe", "block", "max_over_rms", "kurtosis")]
    encoding = {
        "x": {
            "field": "block",
            "type": "quantitative",
            "title": "block",
            "axis": {"tickMinStep": 1, "format": "d", "grid": False},
            "scale": {"padding": 8, "nice": False, "zero": False},
        },
        "y": {
            "field": "value",
            "type": "quantitative",
            "title": None,
            "scale": {"type": "log", "nice": False, "padding": 8},
            "axis": {"values": ticks(everything), "format": "~s", "labelOverlap": "greedy"},
        },
        "color": _line_color(list(names)),
    }
    return frame(
        "Outliers of the activations by block, for the original and after each transform.",
        300,
        {"site": sites[0], "measure": "max_over_rms", "bits": min(budgets, default=0)},
        title=heading(FIGURES),
        data={"values": values},
        transform=[
            {"filter": "datum.site == site && (!isValid(datum.bits) || datum.bits == bits)"},
            {"calculate": "datum[measure]", "as": "value"},
        ],
        encoding=encoding,
        layer=[
            {
                "mark": {"type": "line", "strokeWidth": 2},
                "encoding": {
                    "strokeDash": {
                        "condition": {"test": f"datum.recipe == '{ORIGINAL}'", "value": [5, 4]},
                        "value": [1, 0],
                    }
                },
            },
            {"mark": {"type": "point", "filled": True, "size": 40, "opacity": 1}, "encoding": {"tooltip": hover}},
        ],
    )


def _line_color(names: list[str]) -> Spec:
    # The first colour is always the original's, even if the original is not drawn.
    domain = [ORIGINAL, *(name for name in names if name != ORIGINAL)]
    symbols = legend([name for name in domain if name in names], symbolType="circle")
    return {"field": "recipe", "type": "nominal", "scale": {"domain": domain}, "legend": symbols}


def mass(comparison: Mapping[str, Any]) -> Spec | None:
    """MixQuant's bound and the largest entry after a block Hadamard, by block size. Parameters `site` and `recipe`."""
    values: list[dict[str, Any]] = []
    blocks: set[int] = set()
    for name, rows in outlier_sources(comparison):
        for (site, size), (bound, largest) in sorted(masses(rows).items()):
            blocks.add(size)
            figures = {"bound": rounded(bound, 4), "largest": rounded(largest, 4)}
            values.append({"recipe": name, "site": site, "size": size, **figures})
    if not values:
        return None
    after = with_mass(comparison)
    encoding = {
        "x": {
            "field": "size",
            "type": "quantitative",
            "title": "block size of the Hadamard",
            "scale": {"type": "log", "base": 2, "nice": False, "padding": 10},
            "axis": {"values": sorted(blocks), "format": "d", "grid": False, "labelOverlap": True},
        },
        "color": {
            "field": "which",
            "type": "nominal",
            "scale": {"domain": [ORIGINAL, AFTER]},
            "legend": legend([ORIGINAL, AFTER], symbolType="circle"),
        },
    }
    y = {"type": "quantitative", "title": None, "scale": {"zero": True}}
    tooltip = [{"field": name, "type": "nominal"} for name in ("recipe", "size", "bound", "largest")]
    entry = {"y": y | {"field": "largest"}}
    return frame(
        "MixQuant's bound on the largest entry after a block Hadamard, and the largest entry, by block size.",
        300,
        {"site": outlier_sites(comparison, "mass")[0], "recipe": after[0] if after else ORIGINAL},
        title={"text": "over the rms; line: bound, dots: largest entry", "anchor": "start"},
        data={"values": values},
        transform=[
            {"filter": f"datum.site == site && (datum.recipe == recipe || datum.recipe == '{ORIGINAL}')"},
            {"calculate": f"datum.recipe == '{ORIGINAL}' ? '{ORIGINAL}' : '{AFTER}'", "as": "which"},
        ],
        encoding=encoding,
        layer=[
            {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {"y": y | {"field": "bound"}}},
            {"mark": {"type": "line", "strokeWidth": 1.5, "strokeDash": [2, 4]}, "encoding": entry},
            {
                "mark": {"type": "point", "filled": True, "size": 64, "opacity": 1},
                "encoding": entry | {"tooltip": tooltip},
            },
        ],
    )
