"""Plots of a comparison as Vega-Lite specifications: size against the perplexity gap, and seeds.

Every specification holds its data. The page selects what it shows with its parameters (`test`, `bits`, ...).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import quantiles
from typing import Any

from gyroquant.benchmark.diagnostics import seeds as several_seeds
from gyroquant.benchmark.rows import (
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
from gyroquant.benchmark.sizes import WEIGHTS, View, budget_of, budget_text, bytes_of, in_bytes, text, unit
from gyroquant.evaluation.paired import front as undominated

Spec = dict[str, Any]
_FAR = 2.0  # true bits above the nominal bits at which a point is not drawn
_FAR_BYTES = 3.0  # times the bytes of the largest result on a front from which on a point is not drawn
_BOXED = 5  # the least number of seeds for a box


def legend(values: Sequence[Any], unit: str = "", **settings: Any) -> Spec:
    """A legend under a plot, in as many columns as a document has room for. The page fits them to its own width."""
    longest = max((len(f"{value}{unit}") for value in values), default=1)
    words = {"labelExpr": f"datum.label + '{unit}'"} if unit else {}
    columns = max(1, 600 // (7 * longest + 46))
    return {"orient": "bottom", "title": None, "values": values, "columns": columns, **words, **settings}


def budget_legend(budgets: Sequence[int]) -> Spec:
    """The legend of budgets, which are numbers of bits or of bytes."""
    hollow = {"symbolFillColor": "transparent", "symbolStrokeColor": "gray"}
    if not any(map(in_bytes, budgets)):
        return legend(budgets, " bits", **hollow)
    named = json.dumps({str(budget): budget_text(budget) for budget in budgets})
    return legend(budgets, "", **hollow) | {"labelExpr": f"({named})[toString(datum.value)]"}


def frame(description: str, height: int, params: Mapping[str, Any], **rest: Any) -> Spec:
    """A specification as wide as its container. `params` has its parameters and their first values."""
    return {
        "description": description,
        "width": "container",
        "height": height,
        "autosize": {"type": "fit-x", "contains": "padding", "resize": True},
        "params": [{"name": name, "value": value} for name, value in params.items()],
        **rest,
    }


def rounded(value: Any, digits: int = 5) -> float | None:
    """A number to `digits` significant digits, to keep the page small. None if it is not finite."""
    finite = number(value)
    return None if finite is None else float(f"{finite:.{digits}g}")


def ticks(values: Iterable[float]) -> list[float]:
    """Positions of ticks on a logarithmic axis over `values`, which are all positive."""
    positive = list(values)
    low, high = (math.floor(math.log10(end)) for end in (min(positive), max(positive)))
    steps = (1, 1.5, 2, 3, 5, 7)
    return [float(f"{step}e{power}") for power in range(low, high + 1) for step in steps] + [10.0 ** (high + 1)]


def lowest_seeds(comparison: Mapping[str, Any], test: str) -> list[Row]:
    """The rows that a plot shows: of each recipe and size the lowest seed with a result, as in the verdict."""
    first = {group[0]["key"] for group in by_seed(comparison)}
    return [row for row in rows(comparison, test) if row.run["key"] in first]


class Sizes:
    """The sizes of the rows of a comparison in one view: MB of all weights, or true bits per weight of the layers."""

    def __init__(self, comparison: Mapping[str, Any], view: View):
        self.comparison, self.view, self.unit = comparison, view, unit(comparison["cells"])

    @property
    def title(self) -> str:
        """What the sizes are."""
        if self.view == "bits":
            return "true bits per weight of the layers"
        return "weights of the file, MB" if self.unit == WEIGHTS else "files, MB"

    def __call__(self, row: Row) -> float:
        """The size of a row that `points` returned."""
        size = self._of(row)
        assert size is not None
        return size

    def _of(self, row: Row) -> float | None:
        if self.view == "bits":
            return number(row.run["true_bits"])
        size = bytes_of(row.run, self.unit)
        return None if size is None else size / 1e6

    def text(self, row: Row) -> str:
        """The size of a row, as printed."""
        return f"{self(row):.3f} bits" if self.view == "bits" else text(1e6 * self(row))

    def points(self, test: str) -> list[Row]:
        """The rows that have a gap on this text and a size."""
        return [row for row in lowest_seeds(self.comparison, test) if row.gap is not None and self._of(row) is not None]

    def front(self, points: Iterable[Row]) -> list[Row]:
        """The Pareto front of size and gap, by rising size."""
        by_key = {row.run["key"]: row for row in points}
        return [by_key[key] for key in undominated({k: (self(r), r.gap or 0.0) for k, r in by_key.items()})]

    def fronts(self, test: str) -> dict[str, list[Row]]:
        """The fronts of one text: of "all" runs, and of each budget.

        The front of the verdict is used in the view of the verdict: bytes, or bits in the last release.
        """
        points = self.points(test)
        of_verdict = {
            budget_of(budget): budget["front"]
            for budget in self.comparison["verdict"]
            if budget["test"] == test and ("unit" in budget) == (self.view == "bytes")
        }
        by_scope = {"all": self.front(points)}
        for bits in sizes(self.comparison):
            of_bits = [row for row in points if budget_of(row.run) == bits]
            given = [row for row in of_bits if row.run["key"] in of_verdict.get(bits, ())]
            by_scope[str(bits)] = sorted(given, key=self) or self.front(of_bits)
        return by_scope

    def far_out(self, test: str) -> list[Row]:
        """The rows that are not drawn, because they would squeeze all other points together. None is on a front."""
        along = [row for rows_of_scope in self.fronts(test).values() for row in rows_of_scope]
        kept, limit = {row.run["key"] for row in along}, _FAR_BYTES * max(map(self, along), default=math.inf)
        points = [row for row in self.points(test) if row.run["key"] not in kept]
        if self.view == "bytes":
            return [row for row in points if self(row) > limit]
        return [row for row in points if not row.run.get("max_bytes") and self(row) > row.run["bits"] + _FAR]


def _corners(along: Sequence[Row], size_of: Sizes) -> dict[str, list[float | None]]:
    """The rows of a front that get a name in the plot, by key. Of several with almost the same size, the last one.

    Each has the position (size, gap) of the named row before it, or two Nones.
    """
    bits = [size_of(row) for row in along]
    room = 0.06 * (bits[-1] - bits[0]) if bits else 0.0
    after = [*bits[1:], math.inf][: len(bits)]
    named = [row for row, x, next_x in zip(along, bits, after, strict=True) if next_x - x > room]
    before: list[list[float | None]] = [[None, None]]
    before += [[rounded(size_of(row), 7), rounded(row.gap)] for row in named]
    return {row.run["key"]: place for row, place in zip(named, before, strict=False)}


def _hover(row: Row, shown: Sequence[Column]) -> dict[str, str]:
    """The tooltip of a run: every column, as the table prints it."""
    lines = {"Family": row.family}
    for column in shown:
        beside = column.beside(row)
        if column.text(row) != NONE:
            lines[column.heading] = column.text(row) + (f" ({beside})" if beside else "")
    if row.marks:
        lines["Note"] = ", ".join(row.marks)
    if row.spread:
        lines["Over seeds"] = f"{perplexity(row.spread[0])} to {perplexity(row.spread[1])}"
    return lines


def pareto(comparison: Mapping[str, Any], view: View = "bytes") -> Spec | None:
    """Size against ln(perplexity / perplexity of the original), with the front. Parameters `test` and `bits`.

    view: "bytes" of all weights in the file, or "bits" of the rounded layers. A run without bytes is in the latter.
    """
    shown, size_of = columns(comparison), Sizes(comparison, view)
    points: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    hover: dict[str, str] = {}
    for test in tests(comparison):
        along = size_of.fronts(test)
        corners = {scope: _corners(rows_of_scope, size_of) for scope, rows_of_scope in along.items()}
        beyond = size_of.far_out(test)
        for row in size_of.points(test):
            if row in beyond:
                continue
            tooltip = {}
            for heading, words in _hover(row, shown).items():
                tooltip[hover.setdefault(heading, f"c{len(hover)}")] = words  # a heading may not be a valid field name
            low, high = row.interval or (None, None)
            place = {"test": test, "x": rounded(size_of(row), 7), "y": rounded(row.gap), "name": row.name}
            place |= {"low": rounded(low), "high": rounded(high), "budget": budget_of(row.run), "lost": row.family}
            named = {scope: keys[row.run["key"]] for scope, keys in corners.items() if row.run["key"] in keys}
            points.append(place | {"corners": named, "turned": bool(row.run.get("rotated"))} | tooltip)
        for scope, rows_of_scope in along.items():
            ends = [{"x": rounded(size_of(row), 7), "y": rounded(row.gap)} for row in rows_of_scope]
            steps += [{"test": test, "scope": scope, "order": n} | end for n, end in enumerate(ends)]
    if not points:
        return None
    points = [dict.fromkeys(hover.values(), NONE) | point for point in points]
    return frame(
        f"The {size_of.title} against ln(perplexity / perplexity of the original), one point per method and size.",
        460,
        {"test": tests(comparison)[0], "bits": "all"},
        data={"values": points},
        layer=_pareto_layers(points, steps, {"Method": "name"} | hover, size_of.title),
    )


def _gap_axis(points: Sequence[Mapping[str, Any]]) -> Spec:
    """The axis of the gap: logarithmic. If there are gaps of zero or below, it is linear around zero."""
    ends = [point[key] for point in points for key in ("y", "low", "high") if point[key] is not None]
    gaps = [point["y"] for point in points]
    scale: dict[str, Any] = {"type": "log", "nice": False, "padding": 14}
    if min(ends) > 0:
        values = ticks(ends)
    elif min(gaps) > 0:  # an interval that reaches zero is cut at the end of the logarithmic axis
        scale |= {"domainMin": min(gaps) / 2, "clamp": True}
        values = ticks(gaps)
    else:
        small = max(1e-3, min((abs(gap) for gap in gaps if gap), default=1e-3))
        scale |= {"type": "symlog", "constant": small}
        above = ticks([small, max(*map(abs, gaps), 2 * small)])
        values = sorted({0.0, *above, *(-tick for tick in above)})
    axis = {"values": values, "format": "~g", "labelOverlap": "greedy"}
    return {"field": "y", "type": "quantitative", "title": "ln perplexity gap (nats)", "scale": scale, "axis": axis}


def _pareto_layers(
    points: list[dict[str, Any]], steps: list[dict[str, Any]], hover: Mapping[str, str], title: str
) -> list[Spec]:
    x = {"field": "x", "type": "quantitative", "title": title, "scale": {"zero": False, "padding": 20}}
    x["axis"] = {"tickCount": {"expr": "width / 80"}}
    place = {"x": x, "y": _gap_axis(points)}
    families = {"field": "lost", "type": "nominal", "scale": {"domain": list(FAMILIES)}}
    present = [point["lost"] for point in points]
    color = families | {"legend": legend([name for name in FAMILIES if name in present], symbolType="circle")}
    bits = sorted({point["budget"] for point in points})
    shape = {"field": "budget", "type": "nominal", "scale": {"domain": bits}, "legend": None}
    if len(bits) > 1:
        shape["legend"] = budget_legend(bits)
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
    """The names of the corners of the front. They are below and to the left of the points, where no point can be."""
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
    """Perplexity over seeds, with boxes for _BOXED seeds or more. Parameters `test` and `bits`."""
    values = []
    for test in tests(comparison):
        for group, perplexities in several_seeds(comparison, test):
            for n, (run, value) in enumerate(zip(group, perplexities, strict=True)):
                place = {"test": test, "bits": budget_of(run), "recipe": short(comparison, run), "seed": run["seed"]}
                figures = {"perplexity": rounded(value, 6), "family": family(run)}
                values.append(place | figures | _box(perplexities, n == 0))
    if not values:
        return None
    y: Spec = {"field": "recipe", "type": "nominal", "title": None, "sort": {"field": "middle", "op": "min"}}
    y["axis"] = {"labelLimit": 130, "domain": False, "ticks": False}
    budgets = {value["bits"] for value in values}
    present = [name for name in FAMILIES if any(value["family"] == name for value in values)]
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
        "Perplexity over the seeds of rotations and calibration windows, one row per method.",
        44 * max(len({value["recipe"] for value in values if value["bits"] == bits}) for bits in budgets),
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
    """The data of a box plot. `first` marks one point of each box: the parts of a box are drawn for that point only."""
    quarter, middle, three_quarters = quantiles(values, n=4, method="inclusive")
    box = {
        "low": min(values),
        "quarter": quarter,
        "middle": middle,
        "three_quarters": three_quarters,
        "high": max(values),
    }
    return {key: rounded(value, 6) for key, value in box.items()} | {"seeds": len(values), "first_of": first}
