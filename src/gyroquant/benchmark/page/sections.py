"""The content of the sections of the page, as plain data for the template. A section without data is None."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gyroquant.benchmark import diagnostics
from gyroquant.benchmark.page.charts import Sizes, Spec
from gyroquant.benchmark.page.diagnostic_charts import FIGURES
from gyroquant.benchmark.page.themes import categories
from gyroquant.benchmark.rows import (
    FAMILIES,
    Row,
    budgets,
    by_seed,
    columns,
    family,
    perplexity,
    rows,
    tests,
)
from gyroquant.benchmark.sentences import counts, introduction, model_facts, notes, original_line
from gyroquant.benchmark.sizes import View, budget_of, budget_text, bytes_of, unit
from gyroquant.benchmark.sizes import text as size_text

_NAMES = {
    "verdict": "Verdict",
    "tradeoff": "Size against quality",
    "results": "All results",
    "layers": "Layers",
    "outliers": "Outliers",
    "mass": "Mass",
    "seeds": "Seeds",
    "repeat": "Repeat",
}
_ABSENT = {
    "pareto": "Size against quality: no method has a perplexity to compare with the original's.",
    "layers": "Errors of the layers: no result has measurements of its layers.",
    "outliers": "Outliers: the activations were not measured.",
    "mass": "Mass of blocks: the l1 masses were not measured.",
    "seeds": "Variation over seeds: every method was run with one seed.",
}


def page(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any]:
    """Everything that the template shows of a comparison. `plots` has the specifications by name."""
    optional = {
        "pareto": _pareto(comparison, plots),
        "layers": _layers(comparison, plots),
        "outliers": _outliers(comparison, plots),
        "mass": _mass(comparison, plots),
        "seeds": _seeds(comparison, plots),
    }
    present = {"verdict", "results", "repeat", *(name for name in optional if optional[name])}
    present |= {"tradeoff"} if optional["pareto"] else set()
    return optional | {
        "title": comparison["name"],
        "made": comparison["made"],
        "model": model_facts(comparison),
        "introduction": introduction(comparison),
        "counts": counts(comparison),
        "notes": comparison["notes"],
        "tests": tests(comparison) or [""],
        "sections": [(id_, name) for id_, name in _NAMES.items() if id_ in present],
        "verdict": [_budget(comparison, of_bits) for of_bits in budgets(comparison)],
        "table": _table(comparison),
        "absent": [words for name, words in _ABSENT.items() if not optional[name]],
        "command": comparison["command"],
        "commands": _commands(comparison),
        "facts": _facts(comparison),
        "colours": categories()[: len(FAMILIES)],
    }


def _control(id_: str, label: str, param: str, targets: str, options: Iterable[Any], value: Any) -> dict[str, Any]:
    """A selector for the parameter `param` of the plots with the ids `targets`. Options: values, or (value, text)."""
    pairs = [option if isinstance(option, tuple) else (option, option) for option in options]
    return {"id": id_, "label": label, "param": param, "targets": targets, "options": pairs, "value": value}


def _tests(comparison: Mapping[str, Any], place: str) -> dict[str, Any]:
    names = tests(comparison)
    return _control(f"{place}-test", "Text", "test", place, names, names[0] if names else "")


def _bits(place: str, plot: str, present: Iterable[int], value: Any, every: bool = False) -> dict[str, Any]:
    sizes = [(bits, budget_text(bits)) for bits in sorted(set(present))]
    options = [("all", "all"), *sizes] if every and len(sizes) > 1 else sizes
    return _control(f"{place}-bits", "Budget", "bits", plot, options, value)


def _values(spec: Spec) -> dict[str, Any]:
    return {param["name"]: param["value"] for param in spec["params"]}


def _budget(comparison: Mapping[str, Any], of_bits: list[Mapping[str, Any]]) -> dict[str, Any]:
    texts: list[dict[str, Any]] = []
    for budget in of_bits:
        command = budget["command"] if all(text["command"] != budget["command"] for text in texts) else None
        facts = [] if texts else _budget_facts(comparison, budget)
        home = budget.get("home") if command else None
        words = {"test": budget["test"], "text": budget["text"]}
        texts.append(words | {"command": command, "home": home, "facts": facts})
    first = texts[0]
    for text in texts[1:]:
        if text["text"] == first["text"]:
            text["text"] = "the same."
    size = budget_of(of_bits[0])
    amount, _, unit_of_size = budget_text(size).partition(" ")
    return {"bits": size, "amount": amount, "unit": unit_of_size, "texts": texts}


def _budget_facts(comparison: Mapping[str, Any], budget: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a verdict: those of the recommended run, of the baseline and of the original."""
    by_key = {row.run["key"]: row for row in rows(comparison, budget["test"]) if row.done}
    facts: list[tuple[str, str]] = []
    for role in ("recommended", "best", "baseline"):
        row = by_key.pop(budget.get(role), None)
        if row and not (role == "best" and facts):
            facts.append((f"{role.capitalize()}: {row.name}", _figures(row, unit(comparison["cells"]))))
    original = original_line(comparison, budget["test"])
    if original:
        facts.append((f"Original, {budget['test']}", f"perplexity {original.partition(' (')[0]}"))
    return facts


def _figures(row: Row, kind: str) -> str:
    size = bytes_of(row.run, kind)
    words = f"perplexity {perplexity(row.evaluation.get('perplexity'))} at {row.run['true_bits']:.3f} true bits"
    return words if size is None else f"{words}, {size_text(size)}"


def _pareto(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any] | None:
    views = [(_VIEW_PLOTS[view], words) for view, words in _VIEW_WORDS.items() if _VIEW_PLOTS[view] in plots]
    if not views:
        return None
    first = views[0][0]
    captions = [
        (test, [(name, _caption(Sizes(comparison, view), test)) for view, name in _VIEW_PLOTS.items() if name in plots])
        for test in tests(comparison)
    ]
    present = {point["budget"] for name, _ in views for point in plots[name]["data"]["values"]}
    return {
        "plot": first,
        "view": _control("pareto-view", "Size", "view", "pareto", views, first),
        "test": _tests(comparison, "pareto"),
        "bits": _bits("pareto", "pareto", present, "all", every=True),
        "captions": captions,
    }


_VIEW_PLOTS: dict[View, str] = {"bytes": "pareto", "bits": "pareto_bits"}
_VIEW_WORDS: dict[View, str] = {"bytes": "bytes of the file", "bits": "bits of the layers"}


def _caption(size_of: Sizes, test: str) -> str:
    """The front of a text in words, and the results that are too large to be drawn."""
    along = size_of.fronts(test)["all"]
    named = [f"{row.name} ({size_of.text(row)}, {row.gap:+.4f} nats)" for row in along]
    caption = f"On the front, from the smallest: {', '.join(named)}." if named else "There is no front."
    beyond = [f"{row.name} ({size_of.text(row)})" for row in size_of.far_out(test)]
    return f"{caption} Too large to be drawn: {', '.join(beyond)}." if beyond else caption


def _table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    shown = columns(comparison)
    tables = []
    for test in tests(comparison) if comparison["cells"] else ():
        lines = [_line(row, shown) for row in rows(comparison, test)]
        tables.append({"test": test, "original": original_line(comparison, test), "rows": lines})
    families = {family(run) for run in comparison["cells"]}
    return {
        "columns": shown,
        "tables": tables,
        "notes": notes(comparison),
        "test": _tests(comparison, "table"),
        "bits": _bits("table", "", map(budget_of, comparison["cells"]), "all", every=True),
        "families": [(name, index) for index, name in enumerate(FAMILIES) if name in families],
    }


def _line(row: Row, shown: Iterable[Any]) -> dict[str, Any]:
    cells = []
    for column in shown:
        value = column.value(row)
        cells.append(
            {"value": "" if value is None else repr(value), "text": column.text(row), "beside": column.beside(row)}
        )
    return {
        "name": row.name,
        "family": row.family,
        "family_index": FAMILIES.index(row.family),
        "hollow": not row.run.get("rotated"),
        "bits": budget_of(row.run),
        "seed": row.seed,
        "roles": row.roles,
        "marks": row.marks,
        "done": row.done,
        "status": row.run["status"],
        "reason": row.run["reason"],
        "cells": cells,
    }


def _layers(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any] | None:
    if "layers" not in plots:
        return None
    names = list(diagnostics.ranges(comparison))
    start = _values(plots["layers"])["recipe"]
    bits = budget_of(diagnostics.with_layers(comparison)[start])
    # The second panel has the best of the smallest budget, the first the baseline of that budget, if they differ.
    plain = [
        name for name, run in diagnostics.with_layers(comparison).items() if budget_of(run) == bits and name != start
    ]
    baselines = {budget["baseline"] for budget in comparison["verdict"]}
    against = [name for name in plain if diagnostics.with_layers(comparison)[name]["key"] in baselines]
    other = next(iter([*against, *plain, *names]))
    return {
        "measure": _control(
            "layers-measure",
            "Colour",
            "measure",
            "layers-a layers-b",
            [(measure, diagnostics.MEASURES[measure]) for measure in diagnostics.measures(comparison)],
            _values(plots["layers"])["measure"],
        ),
        "left": _control("layers-left", "Recipe", "recipe", "layers-a", names, other),
        "right": _control("layers-right", "Recipe", "recipe", "layers-b", names, start),
        "table": diagnostics.layers_table(comparison),
    }


def _outliers(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any] | None:
    if "outliers" not in plots:
        return None
    values, target = _values(plots["outliers"]), "outliers-plot"
    present = {point["bits"] for point in plots["outliers"]["data"]["values"] if point["bits"] is not None}
    sites = diagnostics.outlier_sites(comparison)
    return {
        "site": _control("outliers-site", "Site", "site", target, sites, values["site"]),
        "measure": _control("outliers-measure", "Height", "measure", target, FIGURES.items(), values["measure"]),
        "bits": _bits("outliers", target, present, values["bits"]),
        "table": diagnostics.outliers_table(comparison),
    }


def _mass(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any] | None:
    if "mass" not in plots:
        return None
    values, sites = _values(plots["mass"]), diagnostics.outlier_sites(comparison, "mass")
    return {
        "site": _control("mass-site", "Site", "site", "mass-plot", sites, values["site"]),
        "recipe": _control(
            "mass-recipe", "Recipe", "recipe", "mass-plot", diagnostics.with_mass(comparison), values["recipe"]
        ),
        "table": diagnostics.mass_table(comparison),
    }


def _seeds(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any] | None:
    if "seeds" not in plots:
        return None
    present = {point["bits"] for point in plots["seeds"]["data"]["values"]}
    return {
        "test": _tests(comparison, "seeds-plot"),
        "bits": _bits("seeds", "seeds-plot", present, _values(plots["seeds"])["bits"]),
        "table": diagnostics.seeds_table(comparison),
    }


def _commands(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The command of each result with its name. The name of an external tool has its home in brackets."""
    several = {run["key"] for group in by_seed(comparison, done=False) for run in group if len(group) > 1}

    def name(run: Mapping[str, Any]) -> str:
        seed = f", seed {run['seed']}" if run["key"] in several else ""
        return f"{run['label']}{seed}{f' ({home})' if (home := run.get('home')) else ''}"

    return [(name(run), run["command"]) for run in comparison["cells"] if run["command"]]


def _facts(comparison: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings, texts and versions, as names and values."""

    def printed(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ", ".join(map(printed, value))
        return (
            {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)
        )

    texts, model = comparison["texts"], comparison["model"]
    of_texts = [("model", f"{model['label']}, sha256 {model['sha256']}")]
    of_texts.append(("calibration", f"{texts['calibration']['name']}, sha256 {texts['calibration']['sha256']}"))
    for name, test in texts["tests"].items():
        amount = f"{test['tokens']} tokens in {test['windows']} windows of {test['window']}"
        of_texts.append((name, f"{amount}, sha256 {test['sha256']}"))
    settings = [(key.replace("_", " "), printed(value)) for key, value in comparison["settings"].items()]
    versions = [(key, printed(value)) for key, value in comparison["versions"].items()]
    groups = [("Settings", settings), ("Model and texts", of_texts), ("Versions", versions)]
    return [(name, pairs) for name, pairs in groups if pairs]


__all__ = ["page"]
