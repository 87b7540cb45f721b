"""What a comparison holds, as rows and columns: the page and the Markdown show the same numbers in the same words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gyroquant.environment import size

UNROTATED, OURS, PAPERS, OPPONENTS = "not rotated", "gyroquant's own", "recipes of papers", "other programs"
FAMILIES = (UNROTATED, OURS, PAPERS, OPPONENTS)
NONE = "-"
OVER = "over the budget"

Cell = Mapping[str, Any]


def number(value: Any) -> float | None:
    """A finite number, or None for everything else that may stand in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def pair(value: Any) -> tuple[float, float] | None:
    """An interval, or None where it is missing or has an end that is no number."""
    if not isinstance(value, Sequence) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def family(cell: Cell) -> str:
    """The family of methods that a cell belongs to, one of FAMILIES."""
    if cell["kind"] == "opponent":
        return OPPONENTS
    if cell["name"].startswith("gyro"):
        return OURS
    return PAPERS if cell["rotated"] else UNROTATED


def tests(comparison: Mapping[str, Any]) -> list[str]:
    """The names of the texts that perplexity was measured on, the verdict's first."""
    judged = [budget["test"] for budget in comparison["verdict"]]
    return list(dict.fromkeys([*judged, *comparison["texts"]["tests"]]))


def sizes(comparison: Mapping[str, Any]) -> list[int]:
    """The bit budgets, smallest first."""
    return sorted({cell["bits"] for cell in comparison["cells"]} | {one["bits"] for one in comparison["verdict"]})


def same(cell: Cell) -> tuple[Any, ...]:
    """What cells have in common that differ in their seed only."""
    return cell["kind"], cell["name"], cell["bits"], cell["group_size"], cell["symmetric"]


def by_seed(comparison: Mapping[str, Any], done: bool = True) -> list[list[Cell]]:
    """The cells, those together that differ in their seed only, lowest seed first."""
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in comparison["cells"]:
        if cell["status"] == "done" or not done:
            groups[same(cell)].append(cell)
    return [sorted(group, key=lambda cell: cell["seed"]) for group in groups.values()]


def short(comparison: Mapping[str, Any], cell: Cell) -> str:
    """A name that is the same for all budgets: the label without them, with the group size where one has several."""
    alike = {same(one)[3:] for one in comparison["cells"] if same(one)[:3] == same(cell)[:3]}
    name = str(cell["name"]).removesuffix(f"-w{cell['bits']}")
    if len(alike) == 1:
        return name
    scales = "a row" if cell["group_size"] < 0 else f"g{cell['group_size']}"
    return f"{name} {scales}{' symmetric' if cell['symmetric'] else ''}"


@dataclass(frozen=True)
class Row:
    """A cell as measured on one text; `row` is what the verdict says of it, `roles` what it is in the verdict.

    `marks` are what sets it apart from the other rows: that it is over the budget, other calibration than theirs.
    """

    cell: Cell
    name: str
    family: str
    evaluation: Mapping[str, Any]
    row: Mapping[str, Any]
    gap: float | None
    roles: tuple[str, ...]
    marks: tuple[str, ...]
    seed: str
    spread: tuple[float, float] | None

    @property
    def done(self) -> bool:
        """Whether there is anything measured."""
        return bool(self.cell["status"] == "done")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the gap, paired over the windows of the text, where the verdict has it."""
        return pair(self.row.get("gap_interval"))


def rows(comparison: Mapping[str, Any], test: str) -> list[Row]:
    """Every cell on one text: by bits, then what is done by its gap, then what is not."""
    original = number(comparison["original"]["tests"].get(test, {}).get("perplexity"))
    judged = {one["bits"]: one for one in comparison["verdict"] if one["test"] == test}
    made = []
    for group in by_seed(comparison, done=False):
        measured = [number(_evaluation(cell, test).get("perplexity")) for cell in group]
        found = [value for value in measured if value is not None]
        for cell in group:
            budget = judged.get(cell["bits"], {})
            said: Mapping[str, Any] = next((one for one in budget.get("rows", ()) if one["key"] == cell["key"]), {})
            reached = number(_evaluation(cell, test).get("perplexity"))
            gap = number(said.get("gap"))
            if gap is None and original and reached:
                gap = math.log(reached / original)
            made.append(
                Row(
                    cell=cell,
                    name=str(cell["label"]),
                    family=family(cell),
                    evaluation=_evaluation(cell, test),
                    row=said,
                    gap=gap,
                    roles=_roles(budget, cell),
                    marks=_marks(comparison, budget, cell),
                    seed=f"seed {cell['seed']}" if len(group) > 1 else "",
                    spread=(min(found), max(found)) if len(found) > 1 else None,
                )
            )
    return sorted(made, key=lambda row: (row.cell["bits"], not row.done, row.gap is None, row.gap or 0.0, row.name))


def _evaluation(cell: Cell, test: str) -> Mapping[str, Any]:
    found = (cell.get("tests") or {}).get(test) if cell["status"] == "done" else None
    return found or {}


def _roles(budget: Mapping[str, Any], cell: Cell) -> tuple[str, ...]:
    return tuple(role for role in ("recommended", "best", "baseline") if budget.get(role) == cell["key"])


def own_samples(comparison: Mapping[str, Any], cell: Cell) -> int | None:
    """The calibration windows of a cell, where it had another number of them than the comparison says."""
    found = cell.get("nsamples")
    return found if found is not None and found != comparison["settings"]["nsamples"] else None


def _marks(comparison: Mapping[str, Any], budget: Mapping[str, Any], cell: Cell) -> tuple[str, ...]:
    samples = own_samples(comparison, cell)
    over = (OVER,) if cell["key"] in budget.get("over", ()) else ()
    return over if samples is None else (*over, f"{samples} samples")


def decimals(value: Any, digits: int, sign: bool = False) -> str:
    """A number with so many digits behind the point, or a dash."""
    found = number(value)
    return NONE if found is None else f"{found:{'+' if sign else ''}.{digits}f}"


def perplexity(value: Any) -> str:
    """A perplexity: two decimals, none where it is beyond a thousand; the word where the model is lost."""
    if isinstance(value, float) and math.isinf(value):
        return "infinite"
    found = number(value)
    return NONE if found is None else f"{found:.0f}" if found >= 1e3 else f"{found:.2f}"


def interval(value: Any, text: Callable[[float], str]) -> str:
    """An interval in words, empty where there is none."""
    found = pair(value)
    return "" if found is None else f"{text(found[0])} to {text(found[1])}"


def probability(row: Row) -> str:
    """p against the best of the budget, as it is printed."""
    if "best" in row.roles:
        return "best"
    found = number((row.row.get("against_best") or {}).get("p"))
    return NONE if found is None else "< 0.001" if found < 0.001 else f"{found:.3f}"


@dataclass(frozen=True)
class Column:
    """A column of the table: its heading, what it means, the number to sort by, and how that is printed.

    `beside` is the interval that belongs to it.
    """

    key: str
    heading: str
    meaning: str
    value: Callable[[Row], float | None]
    text: Callable[[Row], str]
    beside: Callable[[Row], str] = lambda row: ""


def _measured(key: str) -> Callable[[Row], float | None]:
    return lambda row: number(row.cell["measured"][key]) if row.done and row.cell.get("measured") else None


def _of_cell(key: str) -> Callable[[Row], float | None]:
    return lambda row: number(row.cell.get(key)) if row.done else None


def _said(value: Callable[[Row], float | None], text: Callable[[float], str]) -> Callable[[Row], str]:
    def say(row: Row) -> str:
        found = value(row)
        return NONE if found is None else text(found)

    return say


def _column(
    key: str, heading: str, meaning: str, value: Callable[[Row], float | None], text: Callable[[float], str]
) -> Column:
    return Column(key, heading, meaning, value, _said(value, text))


def _evaluated() -> list[Column]:
    """The columns of what was measured on a text."""
    return [
        Column(
            "perplexity",
            "Perplexity",
            "on the test text, with its 95 % interval; less is better",
            lambda row: number(row.evaluation.get("perplexity")),
            lambda row: perplexity(row.evaluation.get("perplexity")),
            lambda row: interval(row.evaluation.get("perplexity_interval"), perplexity),
        ),
        Column(
            "gap",
            "Gap",
            "ln(perplexity / perplexity of the original), in nats a token; 0 has lost nothing",
            lambda row: row.gap,
            lambda row: decimals(row.gap, 4, sign=True),
            lambda row: interval(row.interval, lambda end: decimals(end, 4)),
        ),
        Column(
            "kl",
            "KL",
            "Kullback-Leibler divergence from the original's distribution, in nats a token; less is better",
            lambda row: number(row.evaluation.get("kl")),
            lambda row: decimals(row.evaluation.get("kl"), 4),
            lambda row: interval(row.evaluation.get("kl_interval"), lambda end: decimals(end, 4)),
        ),
        Column(
            "top1",
            "Top-1",
            "how often the likeliest token is the original's; more is better",
            lambda row: number(row.evaluation.get("top1_agreement")),
            _said(lambda row: number(row.evaluation.get("top1_agreement")), lambda share: f"{100 * share:.1f} %"),
            lambda row: interval(row.evaluation.get("top1_interval"), lambda end: f"{100 * end:.1f}"),
        ),
    ]


def _task(name: str) -> Column:
    def result(row: Row) -> Mapping[str, Any]:
        return ((row.cell.get("tasks") or {}).get(name) or {}) if row.done else {}

    def error(row: Row) -> str:
        found = number(result(row).get("stderr"))
        return "" if found is None else f"± {100 * found:.1f}"

    def value(row: Row) -> float | None:
        return number(result(row).get("acc"))

    meaning = f"accuracy on {name} ± its standard error; more is better"
    return Column(f"task-{name}", name, meaning, value, _said(value, lambda share: f"{100 * share:.1f} %"), error)


def columns(comparison: Mapping[str, Any]) -> list[Column]:
    """The columns of the table behind the name, those left out in which no cell has anything."""
    tasks = dict.fromkeys(name for cell in comparison["cells"] for name in (cell.get("tasks") or {}))
    all_of_them = [
        _column("bits", "Bits", "the bit budget", lambda row: number(row.cell["bits"]), lambda bits: f"{bits:.0f}"),
        _column(
            "true_bits",
            "True bits",
            "everything stored for a rounded weight: codes, scales, zero points, padding, online maps",
            _of_cell("true_bits"),
            lambda bits: f"{bits:.3f}",
        ),
        *_evaluated(),
        *map(_task, tasks),
        _column(
            "bytes",
            "Size",
            "of the files of the result, with 16 bits for every weight that is not rounded",
            _of_cell("bytes"),
            size,
        ),
        _column("minutes", "Minutes", "to quantize", _measured("seconds"), lambda seconds: f"{seconds / 60:.1f}"),
        _column("memory", "Memory", "the peak while quantizing", _measured("peak_memory_bytes"), size),
        _column(
            "forwards",
            "Forwards",
            "forward equivalents: the work, in passes of the calibration text through the model",
            _of_cell("forward_equivalents"),
            lambda count: f"{count:.1f}",
        ),
        _column(
            "proof",
            "Proof",
            "relative logit error of the transformed model before rounding",
            _of_cell("proof_error"),
            lambda error: f"{error:.1e}" if error else "0",
        ),
        Column(
            "p",
            "p",
            "probability of such a difference from the best of its budget by chance alone, paired over windows; for "
            "this pair only, not adjusted for having chosen",
            lambda row: number((row.row.get("against_best") or {}).get("p")),
            probability,
        ),
    ]
    shown = [row for test in tests(comparison) for row in rows(comparison, test)]
    return [column for column in all_of_them if any(column.text(row) != NONE for row in shown)]


def budgets(comparison: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    """The verdict: the budgets of as many bits together, one for each text."""
    found: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for budget in comparison["verdict"]:
        found[budget["bits"]].append(budget)
    return [found[bits] for bits in sorted(found)]
