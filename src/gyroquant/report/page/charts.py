"""Plots of a comparison as Vega-Lite specifications: true bits against what is lost, and seeds.

Every specification holds its data and has parameters (`test`, `bits`, ...) with which the page chooses what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import quantiles
from typing import Any

from gyroquant.evaluation.paired import front as undominated
from gyroquant.report.comparison_inside import seeds as several_seeds
from gyroquant.report.comparison_rows import (
    FAMILIES,
    NONE,
    Column,
    Row,
    by_seed,
    columns,
    family,
    number,
    perplexity,
    rows,
    short,
    sizes,
    tests,
)

Spec = dict[str, Any]
_FAR = 2.0  # bits above the number in its name
_BOXED = 5  # seeds from which on a box says something


def legend(values: Sequence[Any], unit: str = "", **settings: Any) -> Spec:
    """A legend under a plot, in as many columns as a document has room for; the page fits them to its own width."""
    longest = max((len(f"{value}{unit}") for value in values), default=1)
    words = {"labelExpr": f"datum.label + '{unit}'"} if unit else {}
    columns = max(1, 600 // (7 * longest + 46))
    return {"orient": "bottom", "title": None, "values": values, "columns": columns, **words, **settings}


def frame(description: str, height: int, params: Mapping[str, Any], **rest: Any) -> Spec:
    """A specification that is as wide as its place, with parameters and their first values."""
    return {
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding", "resize": True},
        "params": [{"name": name, "value": value} for name, value in params.items()],
        **rest,
    }


def rounded(value: Any, digits: int = 5) -> float | None:
    """A number to so many significant digits, to keep the page small."""
    found = number(value)
    return None if found is None else float(f"{found:.{digits}g}")


def ticks(values: Iterable[float]) -> list[float]:
    """Places for ticks on a logarithmic axis over `values`, all positive."""
    found = list(values)
    low, high = (math.floor(math.log10(end)) for end in (min(found), max(found)))
    steps = (1, 1.5, 2, 3, 5, 7)
    return [float(f"{step}e{power}") for power in range(low, high + 1) for step in steps] + [10.0 ** (high + 1)]


def lowest_seeds(comparison: Mapping[str, Any], test: str) -> list[Row]:
    """The rows that a plot shows a recipe and size by: as in the verdict, the lowest seed that was done."""
    first = {group[0]["key"] for group in by_seed(comparison)}
    return [row for row in rows(comparison, test) if row.cell["key"] in first]


def front(points: Iterable[Row]) -> list[Row]:
    """Those that nothing of as few bits surpasses, by true bits."""
    found = {row.cell["key"]: row for row in points}
    return [found[key] for key in undominated({k: (r.cell["true_bits"], r.gap or 0.0) for k, r in found.items()})]


def fronts(comparison: Mapping[str, Any], test: str) -> dict[str, list[Row]]:
    """The fronts of one text: of "all", and of each budget, where the verdict's is taken if it has one."""
    points = [row for row in lowest_seeds(comparison, test) if row.gap is not None]
    judged = {one["bits"]: one["front"] for one in comparison["verdict"] if one["test"] == test}
    found = {"all": front(points)}
    for bits in sizes(comparison):
        here = [row for row in points if row.cell["bits"] == bits]
        of_verdict = [row for row in here if row.cell["key"] in judged.get(bits, ())]
        found[str(bits)] = sorted(of_verdict, key=lambda row: row.cell["true_bits"]) or front(here)
    return found


def far_out(comparison: Mapping[str, Any], test: str) -> list[Row]:
    """Those that take so many more bits than they are named by that a plot of them would show little else."""
    kept = {row.cell["key"] for found in fronts(comparison, test).values() for row in found}
    points = [row for row in lowest_seeds(comparison, test) if row.gap is not None and row.cell["key"] not in kept]
    return [row for row in points if row.cell["true_bits"] > row.cell["bits"] + _FAR]


def _corners(along: Sequence[Row]) -> dict[str, list[float | None]]:
    """The keys of those on a front that are named, of several nearly above one another the last, each with the place
    of the one named before it."""
    bits = [row.cell["true_bits"] for row in along]
    room = 0.06 * (bits[-1] - bits[0]) if bits else 0.0
    after = [*bits[1:], math.inf][: len(bits)]
    found = [row for row, here, there in zip(along, bits, after, strict=True) if there - here > room]
    before: list[list[float | None]] = [[None, None]]
    before += [[rounded(row.cell["true_bits"], 7), rounded(row.gap)] for row in found]
    return {row.cell["key"]: place for row, place in zip(found, before, strict=False)}


def _hover(row: Row, shown: Sequence[Column]) -> dict[str, str]:
    """What the pointer shows of a cell: every column, as the table prints it."""
    said = {"Family": row.family}
    for column in shown:
        beside = column.beside(row)
        if column.text(row) != NONE:
            said[column.heading] = column.text(row) + (f" ({beside})" if beside else "")
    if row.marks:
        said["Note"] = ", ".join(row.marks)
    if row.spread:
        said["Over seeds"] = f"{perplexity(row.spread[0])} to {perplexity(row.spread[1])}"
    return said


def pareto(comparison: Mapping[str, Any]) -> Spec | None:
    """True bits against ln(perplexity / original) with the front; parameters `test` and `bits`."""
    shown = columns(comparison)
    points: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    hover: dict[str, str] = {}
    for test in tests(comparison):
        along = fronts(comparison, test)
        corners = {scope: _corners(found) for scope, found in along.items()}
        beyond = far_out(comparison, test)
        for row in lowest_seeds(comparison, test):
            if row.gap is None or number(row.cell["true_bits"]) is None or row in beyond:
                continue
            said = {}
            for heading, words in _hover(row, shown).items():
                said[hover.setdefault(heading, f"c{len(hover)}")] = words  # headings may hold what fields must not
            low, high = row.interval or (None, None)
            place = {"test": test, "x": rounded(row.cell["true_bits"], 7), "y": rounded(row.gap), "name": row.name}
            place |= {"low": rounded(low), "high": rounded(high), "budget": row.cell["bits"], "lost": row.family}
            named = {scope: found[row.cell["key"]] for scope, found in corners.items() if row.cell["key"] in found}
            points.append(place | {"corners": named, "turned": bool(row.cell.get("rotated"))} | said)
        for scope, found in along.items():
            ends = [{"x": rounded(row.cell["true_bits"], 7), "y": rounded(row.gap)} for row in found]
            steps += [{"test": test, "scope": scope, "order": n} | end for n, end in enumerate(ends)]
    if not points:
        return None
    points = [dict.fromkeys(hover.values(), NONE) | point for point in points]
    return frame(
        "True bits per weight against the logarithm of how much perplexity has grown, one point a method and size.",
        460,
        {"test": tests(comparison)[0], "bits": "all"},
        data={"values": points},
        layer=_pareto_layers(points, steps, {"Method": "name"} | hover),
    )


def _gap_axis(points: Sequence[Mapping[str, Any]]) -> Spec:
    """The axis of the gap: logarithmic, and linear around zero where there are gaps that are not above it."""
    ends = [point[key] for point in points for key in ("y", "low", "high") if point[key] is not None]
    gaps = [point["y"] for point in points]
    scale: dict[str, Any] = {"type": "log", "nice": False, "padding": 14}
    if min(ends) > 0:
        values = ticks(ends)
    elif min(gaps) > 0:  # an interval that reaches zero is cut where a logarithmic axis ends
        scale |= {"domainMin": min(gaps) / 2, "clamp": True}
        values = ticks(gaps)
    else:
        small = max(1e-3, min((abs(gap) for gap in gaps if gap), default=1e-3))
        scale |= {"type": "symlog", "constant": small}
        above = ticks([small, max(*map(abs, gaps), 2 * small)])
        values = sorted({0.0, *above, *(-one for one in above)})
    axis = {"values": values, "format": "~g", "labelOverlap": "greedy"}
    return {"field": "y", "type": "quantitative", "title": "ln perplexity gap (nats)", "scale": scale, "axis": axis}


def _pareto_layers(points: list[dict[str, Any]], steps: list[dict[str, Any]], hover: Mapping[str, str]) -> list[Spec]:
    x = {"field": "x", "type": "quantitative", "title": "true bits a weight", "scale": {"zero": False, "padding": 20}}
    x["axis"] = {"tickCount": {"expr": "width / 80"}}
    place = {"x": x, "y": _gap_axis(points)}
    families = {"field": "lost", "type": "nominal", "scale": {"domain": list(FAMILIES)}}
    there = [point["lost"] for point in points]
    color = families | {"legend": legend([one for one in FAMILIES if one in there], symbolType="circle")}
    bits = sorted({point["budget"] for point in points})
    shape = {"field": "budget", "type": "nominal", "scale": {"domain": bits}, "legend": None}
    if len(bits) > 1:
        shape["legend"] = legend(bits, " bits", symbolFillColor="transparent", symbolStrokeColor="gray")
    here = {"filter": "datum.test == test && (bits == 'all' || datum.budget == bits)"}
    hollow: Spec = {"condition": {"test": "!datum.turned", "value": 0}, "value": 0.75}
    tooltip = [{"field": key, "title": title, "type": "nominal"} for title, key in hover.items()]
    return [
        {
            "data": {"values": steps},
            "transform": [{"filter": "datum.test == test && datum.scope == toString(bits)"}],
            "mark": {"type": "line", "style": "front", "interpolate": "step-after"},
            "encoding": place | {"order": {"field": "order"}},
        },
        {
            "transform": [here, {"filter": "isValid(datum.low)"}],
            "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.55},
            "encoding": place | {"y": place["y"] | {"field": "low"}, "y2": {"field": "high"}, "color": color},
        },
        _names(here, place),
        {
            "transform": [here],
            "mark": {"type": "point", "size": 90, "strokeWidth": 2, "opacity": 1},
            "encoding": place
            | {"color": color, "fill": families, "fillOpacity": hollow, "shape": shape, "tooltip": tooltip},
        },
    ]


def _names(here: Spec, place: Spec) -> Spec:
    """The names of the corners of the front: below and to the left there is nothing, so they stand there."""
    narrow = "scale('x', datum.x) < 7 * length(datum.name) + 12"
    near = "abs(scale('x', datum.x) - scale('x', datum.before[0])) < 7 * length(datum.name) + 12"
    level = "abs(scale('y', datum.y) - scale('y', datum.before[1])) < 16"
    hidden = f"width < 480 || (isValid(datum.before[0]) && {near} && {level})"
    return {
        "transform": [
            here,
            {"calculate": "datum.corners[toString(bits)]", "as": "before"},
            {"filter": "isValid(datum.before)"},
        ],
        "mark": {
            "type": "text",
            "dx": {"expr": f"{narrow} ? 10 : -10"},
            "dy": 14,
            "align": {"expr": f"{narrow} ? 'left' : 'right'"},
        },
        "encoding": place
        | {"text": {"field": "name"}, "opacity": {"condition": {"test": hidden, "value": 0}, "value": 1}},
    }


def seeds(comparison: Mapping[str, Any]) -> Spec | None:
    """Perplexity over seeds; boxes where there are five or more. Parameters `test` and `bits`."""
    values = []
    for test in tests(comparison):
        for group, measured in several_seeds(comparison, test):
            for n, (cell, value) in enumerate(zip(group, measured, strict=True)):
                place = {"test": test, "bits": cell["bits"], "recipe": short(comparison, cell), "seed": cell["seed"]}
                values.append(
                    place | {"perplexity": rounded(value, 6), "family": family(cell)} | _box(measured, n == 0)
                )
    if not values:
        return None
    y: Spec = {"field": "recipe", "type": "nominal", "title": None, "sort": {"field": "middle", "op": "min"}}
    y["axis"] = {"labelLimit": 130, "domain": False, "ticks": False}
    budgets = {value["bits"] for value in values}
    present = [one for one in FAMILIES if any(value["family"] == one for value in values)]
    color = {"field": "family", "type": "nominal", "scale": {"domain": list(FAMILIES)}}
    color["legend"] = legend(present, symbolType="circle")
    once, many = {"filter": "datum.first_of"}, {"filter": f"datum.first_of && datum.seeds >= {_BOXED}"}

    def at(field: str, end: str | None = None) -> Spec:
        x = {"field": field, "type": "quantitative", "title": "perplexity", "scale": {"zero": False, "padding": 12}}
        x["axis"] = {"tickCount": {"expr": "width / 70"}}
        return {"x": x, "y": y, "color": color} | ({"x2": {"field": end}} if end else {})

    tooltip = [{"field": name} for name in ("recipe", "seed", "perplexity")]
    boxes = {
        "transform": [many],
        "mark": {"type": "bar", "height": 22, "fillOpacity": 0.18, "strokeWidth": 1.5, "cornerRadius": 2},
        "encoding": at("quarter", "three_quarters") | {"stroke": {k: v for k, v in color.items() if k != "legend"}},
    }
    return frame(
        "Perplexity over the seeds of rotations and calibration windows, one row a method.",
        44 * max(len({one["recipe"] for one in values if one["bits"] == bits}) for bits in budgets),
        {"test": tests(comparison)[0], "bits": min(budgets)},
        data={"values": values},
        transform=[{"filter": "datum.test == test && datum.bits == bits"}],
        layer=[
            {"transform": [once], "mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": at("low", "high")},
            *([boxes] if any(value["seeds"] >= _BOXED for value in values) else []),
            {
                "transform": [once],
                "mark": {"type": "tick", "thickness": 3, "height": 22, "opacity": 1},
                "encoding": at("middle"),
            },
            {
                "mark": {"type": "point", "filled": True, "size": 46, "opacity": 0.8},
                "encoding": at("perplexity") | {"tooltip": tooltip},
            },
        ],
    )


def _box(values: Sequence[float], first: bool) -> dict[str, Any]:
    """What a box plot is drawn from; `first` marks one of the points of a box, for what is drawn once."""
    quarter, middle, three_quarters = quantiles(values, n=4, method="inclusive")
    box = {
        "low": min(values),
        "quarter": quarter,
        "middle": middle,
        "three_quarters": three_quarters,
        "high": max(values),
    }
    return {key: rounded(value, 6) for key, value in box.items()} | {"seeds": len(values), "first_of": first}
