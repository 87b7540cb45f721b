"""What the sections of the page hold, as plain data for the template; a section that has nothing is None."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gyroquant.report import comparison_inside as inside
from gyroquant.report.comparison_rows import (
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
from gyroquant.report.comparison_words import counts, introduction, model_facts, notes, original_line
from gyroquant.report.page.charts import Spec, far_out, fronts
from gyroquant.report.page.charts_inside import FIGURES
from gyroquant.report.page.themes import categories

_NAMES = {
    "verdict": "Verdict",
    "tradeoff": "Bits against quality",
    "results": "All results",
    "layers": "Layers",
    "outliers": "Outliers",
    "mass": "Mass",
    "seeds": "Seeds",
    "repeat": "To repeat it",
}
_ABSENT = {
    "pareto": "Bits against quality: no method has a perplexity yet to set beside the original's.",
    "layers": "Errors of the layers: no result says how its layers came out.",
    "outliers": "Outliers: the activations were not measured.",
    "mass": "Mass of blocks: it was not measured.",
    "seeds": "Luck of the seed: every method was run with one seed.",
}


def page(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any]:
    """Everything that the template shows of a comparison; `plots` are the specifications by name."""
    made = {
        "pareto": _pareto(comparison, plots),
        "layers": _layers(comparison, plots),
        "outliers": _outliers(comparison, plots),
        "mass": _mass(comparison, plots),
        "seeds": _seeds(comparison, plots),
    }
    there = {"verdict", "results", "repeat", *(name for name in made if made[name])}
    there |= {"tradeoff"} if made["pareto"] else set()
    return made | {
        "title": comparison["name"],
        "made": comparison["made"],
        "model": model_facts(comparison),
        "introduction": introduction(comparison),
        "counts": counts(comparison),
        "notes": comparison["notes"],
        "tests": tests(comparison) or [""],
        "sections": [(id_, name) for id_, name in _NAMES.items() if id_ in there],
        "verdict": [_budget(comparison, found) for found in budgets(comparison)],
        "table": _table(comparison),
        "absent": [words for name, words in _ABSENT.items() if not made[name]],
        "command": comparison["command"],
        "commands": _commands(comparison),
        "facts": _facts(comparison),
        "colours": categories()[: len(FAMILIES)],
    }


def _control(id_: str, label: str, param: str, targets: str, options: Iterable[Any], value: Any) -> dict[str, Any]:
    """A selector of the parameter `param` of the plots whose ids are `targets`; options are values or (value, text)."""
    pairs = [option if isinstance(option, tuple) else (option, option) for option in options]
    return {"id": id_, "label": label, "param": param, "targets": targets, "options": pairs, "value": value}


def _tests(comparison: Mapping[str, Any], place: str) -> dict[str, Any]:
    there = tests(comparison)
    return _control(f"{place}-test", "Text", "test", place, there, there[0] if there else "")


def _bits(place: str, plot: str, there: Iterable[int], value: Any, every: bool = False) -> dict[str, Any]:
    sizes = [(bits, f"{bits} bits") for bits in sorted(set(there))]
    options = [("all", "all"), *sizes] if every and len(sizes) > 1 else sizes
    return _control(f"{place}-bits", "Budget", "bits", plot, options, value)


def _values(spec: Spec) -> dict[str, Any]:
    return {one["name"]: one["value"] for one in spec["params"]}


def _budget(comparison: Mapping[str, Any], found: list[Mapping[str, Any]]) -> dict[str, Any]:
    texts: list[dict[str, Any]] = []
    for budget in found:
        command = budget["command"] if all(one["command"] != budget["command"] for one in texts) else None
        facts = [] if texts else _budget_facts(comparison, budget)
        home = budget.get("home") if command else None
        said = {"test": budget["test"], "text": budget["text"]}
        texts.append(said | {"command": command, "home": home, "facts": facts})
    first = texts[0]
    for one in texts[1:]:
        if one["text"] == first["text"]:
            one["text"] = "the same."
    return {"bits": found[0]["bits"], "texts": texts}


def _budget_facts(comparison: Mapping[str, Any], budget: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers behind a verdict: of the method it names, of the baseline and of the original."""
    by_key = {row.cell["key"]: row for row in rows(comparison, budget["test"]) if row.done}
    facts: list[tuple[str, str]] = []
    for role in ("recommended", "best", "baseline"):
        row = by_key.pop(budget.get(role), None)
        if row and not (role == "best" and facts):
            facts.append((f"{role.capitalize()}: {row.name}", _figures(row)))
    original = original_line(comparison, budget["test"])
    if original:
        facts.append((f"Original, {budget['test']}", f"perplexity {original.partition(' (')[0]}"))
    return facts


def _figures(row: Row) -> str:
    return f"perplexity {perplexity(row.evaluation.get('perplexity'))} at {row.cell['true_bits']:.3f} true bits"


def _pareto(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any] | None:
    if "pareto" not in plots:
        return None
    captions = []
    for test in tests(comparison):
        named = [
            f"{row.name} ({row.cell['true_bits']:.3f} bits, {row.gap:+.4f} nats)"
            for row in fronts(comparison, test)["all"]
        ]
        caption = f"On the front, from the smallest: {', '.join(named)}." if named else "Nothing is on a front."
        beyond = [f"{row.name} ({row.cell['true_bits']:.3f} bits)" for row in far_out(comparison, test)]
        captions.append((test, f"{caption} Too large to be drawn: {', '.join(beyond)}." if beyond else caption))
    there = {one["budget"] for one in plots["pareto"]["data"]["values"]}
    return {
        "test": _tests(comparison, "pareto"),
        "bits": _bits("pareto", "pareto", there, "all", every=True),
        "captions": captions,
    }


def _table(comparison: Mapping[str, Any]) -> dict[str, Any]:
    shown = columns(comparison)
    tables = []
    for test in tests(comparison) if comparison["cells"] else ():
        lines = [_line(row, shown) for row in rows(comparison, test)]
        tables.append({"test": test, "original": original_line(comparison, test), "rows": lines})
    families = {family(cell) for cell in comparison["cells"]}
    return {
        "columns": shown,
        "tables": tables,
        "notes": notes(comparison),
        "test": _tests(comparison, "table"),
        "bits": _bits("table", "", (cell["bits"] for cell in comparison["cells"]), "all", every=True),
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
        "hollow": not row.cell.get("rotated"),
        "bits": row.cell["bits"],
        "seed": row.seed,
        "roles": row.roles,
        "marks": row.marks,
        "done": row.done,
        "status": row.cell["status"],
        "reason": row.cell["reason"],
        "cells": cells,
    }


def _layers(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any] | None:
    if "layers" not in plots:
        return None
    names = list(inside.ranges(comparison))
    start = _values(plots["layers"])["recipe"]
    bits = inside.with_layers(comparison)[start]["bits"]
    # Beside the first, which is the best of the smallest budget: what does not rotate, if that is another.
    plain = [name for name, cell in inside.with_layers(comparison).items() if cell["bits"] == bits and name != start]
    baselines = {budget["baseline"] for budget in comparison["verdict"]}
    against = [name for name in plain if inside.with_layers(comparison)[name]["key"] in baselines]
    other = next(iter([*against, *plain, *names]))
    return {
        "measure": _control(
            "layers-measure",
            "Colour",
            "measure",
            "layers-a layers-b",
            [(one, inside.MEASURES[one]) for one in inside.measures(comparison)],
            _values(plots["layers"])["measure"],
        ),
        "left": _control("layers-left", "Recipe", "recipe", "layers-a", names, other),
        "right": _control("layers-right", "Recipe", "recipe", "layers-b", names, start),
        "table": inside.layers_table(comparison),
    }


def _outliers(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any] | None:
    if "outliers" not in plots:
        return None
    values, target = _values(plots["outliers"]), "outliers-plot"
    there = {one["bits"] for one in plots["outliers"]["data"]["values"] if one["bits"] is not None}
    sites = inside.outlier_sites(comparison)
    return {
        "site": _control("outliers-site", "Site", "site", target, sites, values["site"]),
        "measure": _control("outliers-measure", "Height", "measure", target, FIGURES.items(), values["measure"]),
        "bits": _bits("outliers", target, there, values["bits"]),
        "table": inside.outliers_table(comparison),
    }


def _mass(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any] | None:
    if "mass" not in plots:
        return None
    values, sites = _values(plots["mass"]), inside.outlier_sites(comparison, "mass")
    return {
        "site": _control("mass-site", "Site", "site", "mass-plot", sites, values["site"]),
        "recipe": _control(
            "mass-recipe", "Recipe", "recipe", "mass-plot", inside.with_mass(comparison), values["recipe"]
        ),
        "table": inside.mass_table(comparison),
    }


def _seeds(comparison: Mapping[str, Any], plots: Mapping[str, Spec]) -> dict[str, Any] | None:
    if "seeds" not in plots:
        return None
    there = {one["bits"] for one in plots["seeds"]["data"]["values"]}
    return {
        "test": _tests(comparison, "seeds-plot"),
        "bits": _bits("seeds", "seeds-plot", there, _values(plots["seeds"])["bits"]),
        "table": inside.seeds_table(comparison),
    }


def _commands(comparison: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The command of each result by its name, which for another program has its home beside it."""
    several = {cell["key"] for group in by_seed(comparison, done=False) for cell in group if len(group) > 1}

    def name(cell: Mapping[str, Any]) -> str:
        seed = f", seed {cell['seed']}" if cell["key"] in several else ""
        return f"{cell['label']}{seed}{f' ({home})' if (home := cell.get('home')) else ''}"

    return [(name(cell), cell["command"]) for cell in comparison["cells"] if cell["command"]]


def _facts(comparison: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings, texts and versions, as names and values."""

    def said(value: Any) -> str:
        if isinstance(value, list | tuple):
            return ", ".join(map(said, value))
        return (
            {True: "yes", False: "no", None: "none"}[value] if value is None or isinstance(value, bool) else str(value)
        )

    texts, model = comparison["texts"], comparison["model"]
    of_texts = [("model", f"{model['label']}, sha256 {model['sha256']}")]
    of_texts.append(("calibration", f"{texts['calibration']['name']}, sha256 {texts['calibration']['sha256']}"))
    for name, one in texts["tests"].items():
        amount = f"{one['tokens']} tokens in {one['windows']} windows of {one['window']}"
        of_texts.append((name, f"{amount}, sha256 {one['sha256']}"))
    settings = [(key.replace("_", " "), said(value)) for key, value in comparison["settings"].items()]
    versions = [(key, said(value)) for key, value in comparison["versions"].items()]
    found = [("Settings", settings), ("Model and texts", of_texts), ("Versions", versions)]
    return [(name, pairs) for name, pairs in found if pairs]


__all__ = ["page"]
