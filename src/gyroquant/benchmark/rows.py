"""The results of a comparison as rows and columns. The page and the Markdown show the same numbers and words."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gyroquant.benchmark.kinds import EXTERNAL_TOOL
from gyroquant.benchmark.sizes import FILES, budget_of, budget_text, bytes_of, in_bytes, in_layers, unit
from gyroquant.benchmark.sizes import text as size_text
from gyroquant.system.environment import size

UNROTATED, OURS, PAPERS, EXTERNAL_TOOLS = "not rotated", "gyroquant's own", "recipes of papers", "external tools"
FAMILIES = (UNROTATED, OURS, PAPERS, EXTERNAL_TOOLS)
NONE = "-"
OVER = "over the budget"
DOMINATED = "dominated by"

RunResult = Mapping[str, Any]


def number(value: Any) -> float | None:
    """`value` as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def pair(value: Any) -> tuple[float, float] | None:
    """An interval. None if it is missing or an end is not a finite number."""
    if not isinstance(value, Sequence) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def family(run: RunResult) -> str:
    """The family of methods that a run belongs to, one of FAMILIES."""
    if run["kind"] == EXTERNAL_TOOL:
        return EXTERNAL_TOOLS
    if run["name"].startswith("gyro"):
        return OURS
    return PAPERS if run["rotated"] else UNROTATED


def tests(comparison: Mapping[str, Any]) -> list[str]:
    """The names of the texts that perplexity was measured on, those of the verdict first."""
    of_verdict = [budget["test"] for budget in comparison["verdict"]]
    return list(dict.fromkeys([*of_verdict, *comparison["texts"]["tests"]]))


def sizes(comparison: Mapping[str, Any]) -> list[int]:
    """The budgets: numbers of bits, then bytes (`sizes.in_bytes`), the smallest first."""
    return sorted(set(map(budget_of, [*comparison["cells"], *comparison["verdict"]])))


def same(run: RunResult) -> tuple[Any, ...]:
    """The identity of a run without its seed: runs that differ in their seed only have the same one."""
    own = run["kind"], run["name"], run["bits"], run["group_size"], run["symmetric"]
    return (*own, run["max_bytes"]) if run.get("max_bytes") else own


def by_seed(comparison: Mapping[str, Any], done: bool = True) -> list[list[RunResult]]:
    """The runs in groups that differ in their seed only, lowest seed first. With `done`, only runs with a result."""
    groups: dict[tuple[Any, ...], list[RunResult]] = defaultdict(list)
    for run in comparison["cells"]:
        if run["status"] == "done" or not done:
            groups[same(run)].append(run)
    return [sorted(group, key=lambda run: run["seed"]) for group in groups.values()]


def short(comparison: Mapping[str, Any], run: RunResult) -> str:
    """A name that is the same for all budgets: without the bits, and with the group size only if there are several."""
    kept = [other for other in comparison["cells"] if same(other)[:3] == same(run)[:3]]
    alike = {same(other)[3:5] for other in kept}
    name = str(run["name"]).removesuffix(f"-w{run['bits']}")
    if len(alike) == 1:
        return name
    scales = "a row" if run["group_size"] < 0 else f"g{run['group_size']}"
    return f"{name} {scales}{' symmetric' if run['symmetric'] else ''}"


@dataclass(frozen=True)
class Row:
    """A run as measured on one text.

    run: the run as a comparison stores it.
    name: its label.
    family: one of FAMILIES.
    evaluation: its measurements on the text. Empty if there are none.
    row: its row in the verdict. Empty if it has none.
    gap: ln(perplexity / perplexity of the original), or None.
    roles: those of "recommended", "best" and "baseline" that the verdict gives it.
    marks: how it differs from the other rows: over the budget, dominated, another number of calibration windows.
    seed: its seed in words. Empty if there is one seed only.
    spread: the lowest and the highest perplexity over seeds, or None.
    """

    run: RunResult
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
        """Whether the run has a result."""
        return bool(self.run["status"] == "done")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the gap, paired over the windows of the text. None if the verdict does not have it."""
        return pair(self.row.get("gap_interval"))


def rows(comparison: Mapping[str, Any], test: str) -> list[Row]:
    """Every run on one text: by budget, then runs with a result by gap, then runs without."""
    original = number(comparison["original"]["tests"].get(test, {}).get("perplexity"))
    verdicts = {budget_of(budget): budget for budget in comparison["verdict"] if budget["test"] == test}
    labels = {run["key"]: str(run["label"]) for run in comparison["cells"]}
    result = []
    for group in by_seed(comparison, done=False):
        over_seeds = [number(_evaluation(run, test).get("perplexity")) for run in group]
        perplexities = [value for value in over_seeds if value is not None]
        for run in group:
            budget = verdicts.get(budget_of(run), {})
            row: Mapping[str, Any] = next((row for row in budget.get("rows", ()) if row["key"] == run["key"]), {})
            perplexity_of_run = number(_evaluation(run, test).get("perplexity"))
            gap = number(row.get("gap"))
            if gap is None and original and perplexity_of_run:
                gap = math.log(perplexity_of_run / original)
            result.append(
                Row(
                    run=run,
                    name=str(run["label"]),
                    family=family(run),
                    evaluation=_evaluation(run, test),
                    row=row,
                    gap=gap,
                    roles=_roles(budget, run),
                    marks=_marks(comparison, budget, run, labels.get(row.get("dominated_by"))),
                    seed=f"seed {run['seed']}" if len(group) > 1 else "",
                    spread=(min(perplexities), max(perplexities)) if len(perplexities) > 1 else None,
                )
            )
    return sorted(result, key=lambda row: (budget_of(row.run), not row.done, row.gap is None, row.gap or 0.0, row.name))


def _evaluation(run: RunResult, test: str) -> Mapping[str, Any]:
    evaluation = (run.get("tests") or {}).get(test) if run["status"] == "done" else None
    return evaluation or {}


def _roles(budget: Mapping[str, Any], run: RunResult) -> tuple[str, ...]:
    return tuple(role for role in ("recommended", "best", "baseline") if budget.get(role) == run["key"])


def own_samples(comparison: Mapping[str, Any], run: RunResult) -> int | None:
    """The number of calibration windows of a run, if it differs from that of the comparison. Else None."""
    nsamples = run.get("nsamples")
    return nsamples if nsamples is not None and nsamples != comparison["settings"]["nsamples"] else None


def _marks(
    comparison: Mapping[str, Any], budget: Mapping[str, Any], run: RunResult, dominating: str | None
) -> tuple[str, ...]:
    samples = own_samples(comparison, run)
    marks = [OVER] if run["key"] in budget.get("over", ()) else []
    marks += [f"{DOMINATED} {dominating}"] if dominating else []
    marks += [] if samples is None else [f"{samples} samples"]
    waiting = run.get("waiting") or ()
    return tuple([*marks, f"no result yet of {', '.join(waiting)}, which may be larger"] if waiting else marks)


def decimals(value: Any, digits: int, sign: bool = False) -> str:
    """A number with `digits` decimals, or a dash."""
    finite = number(value)
    return NONE if finite is None else f"{finite:{'+' if sign else ''}.{digits}f}"


def perplexity(value: Any) -> str:
    """A perplexity: two decimals, none from a thousand on, "infinite", or a dash."""
    if isinstance(value, float) and math.isinf(value):
        return "infinite"
    finite = number(value)
    return NONE if finite is None else f"{finite:.0f}" if finite >= 1e3 else f"{finite:.2f}"


def interval(value: Any, text: Callable[[float], str]) -> str:
    """An interval in words. Empty if there is none."""
    ends = pair(value)
    return "" if ends is None else f"{text(ends[0])} to {text(ends[1])}"


def probability(row: Row) -> str:
    """p against the best of the budget, as printed."""
    if "best" in row.roles:
        return "best"
    p = number((row.row.get("against_best") or {}).get("p"))
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    key: its name in code.
    heading, meaning: what the page shows of it.
    value: the number to sort by.
    text: that number as printed.
    beside: its interval as printed. Default: empty.
    """

    key: str
    heading: str
    meaning: str
    value: Callable[[Row], float | None]
    text: Callable[[Row], str]
    beside: Callable[[Row], str] = lambda row: ""


def _measured(key: str) -> Callable[[Row], float | None]:
    return lambda row: number(row.run["measured"][key]) if row.done and row.run.get("measured") else None


def _of_run(key: str) -> Callable[[Row], float | None]:
    return lambda row: number(row.run.get(key)) if row.done else None


def _printed(value: Callable[[Row], float | None], text: Callable[[float], str]) -> Callable[[Row], str]:
    def printed(row: Row) -> str:
        number_of_row = value(row)
        return NONE if number_of_row is None else text(number_of_row)

    return printed


def _column(
    key: str, heading: str, meaning: str, value: Callable[[Row], float | None], text: Callable[[float], str]
) -> Column:
    return Column(key, heading, meaning, value, _printed(value, text))


def _evaluated() -> list[Column]:
    """The columns of the measurements on a text."""
    return [
        Column(
            "perplexity",
            "Perplexity",
            "on the test text, with its 95 % interval; lower is better",
            lambda row: number(row.evaluation.get("perplexity")),
            lambda row: perplexity(row.evaluation.get("perplexity")),
            lambda row: interval(row.evaluation.get("perplexity_interval"), perplexity),
        ),
        Column(
            "gap",
            "Gap",
            "ln(perplexity / perplexity of the original), in nats per token; 0 means no loss",
            lambda row: row.gap,
            lambda row: decimals(row.gap, 4, sign=True),
            lambda row: interval(row.interval, lambda end: decimals(end, 4)),
        ),
        Column(
            "kl",
            "KL",
            "Kullback-Leibler divergence from the original's distribution, in nats per token; lower is better",
            lambda row: number(row.evaluation.get("kl")),
            lambda row: decimals(row.evaluation.get("kl"), 4),
            lambda row: interval(row.evaluation.get("kl_interval"), lambda end: decimals(end, 4)),
        ),
        Column(
            "top1",
            "Top-1",
            "how often the most likely token is the same as the original's; higher is better",
            lambda row: number(row.evaluation.get("top1_agreement")),
            _printed(lambda row: number(row.evaluation.get("top1_agreement")), lambda share: f"{100 * share:.1f} %"),
            lambda row: interval(row.evaluation.get("top1_interval"), lambda end: f"{100 * end:.1f}"),
        ),
    ]


def _task(name: str) -> Column:
    def result(row: Row) -> Mapping[str, Any]:
        return ((row.run.get("tasks") or {}).get(name) or {}) if row.done else {}

    def error(row: Row) -> str:
        stderr = number(result(row).get("stderr"))
        return "" if stderr is None else f"± {100 * stderr:.1f}"

    def value(row: Row) -> float | None:
        return number(result(row).get("acc"))

    meaning = f"accuracy on {name} ± its standard error; higher is better"
    return Column(f"task-{name}", name, meaning, value, _printed(value, lambda share: f"{100 * share:.1f} %"), error)


def _budget(comparison: Mapping[str, Any]) -> Column:
    """The column of the budget."""

    def value(row: Row) -> float | None:
        return number(budget_of(row.run))

    if any(map(in_bytes, sizes(comparison))):
        meaning = "the budget, in bytes of all weights or in bits of the layers"
        return _column("bits", "Budget", meaning, value, lambda budget: budget_text(int(budget)))
    return _column("bits", "Bits", "the bit budget", value, lambda bits: f"{bits:.0f}")


def rate(run: RunResult) -> float | None:
    """The tokens a second that the result of a run writes, or None."""
    return number((run.get("speed") or {}).get("decode_tokens_per_second"))


def rate_share(run: RunResult) -> float | None:
    """The rate of a run's result over that of the original, measured in turns with it, or None."""
    theirs = number((run.get("speed") or {}).get("original_decode_tokens_per_second"))
    ours = rate(run)
    return ours / theirs if ours and theirs else None


def _rate() -> Column:
    """The column of tokens a second."""

    def beside(row: Row) -> str:
        share = rate_share(row.run)
        maps = (row.run.get("speed") or {}).get("online_maps", 0)
        words = f"{maps} online map{'s' * (maps != 1)}" if maps else "no online maps"
        return "" if share is None else f"{share:.2f} of the original's, {words}"

    return Column(
        "tokens",
        "Tokens/s",
        "tokens a second that the result writes in transformers in fp32, where the cost of its online maps shows; "
        "beside it the share of the original's rate, measured in turns. Results of external tools are not run there",
        lambda row: rate(row.run) if row.done else None,
        lambda row: decimals(rate(row.run) if row.done else None, 1),
        beside,
    )


def _size(kind: str) -> Column:
    """The column of bytes."""
    meaning = "bytes of all weights in the file: layers, embeddings, head and the rest"
    if kind == FILES:
        meaning = "bytes of the result's files, with 16 bits for every weight that is not rounded"

    def value(row: Row) -> float | None:
        return bytes_of(row.run, kind) if row.done else None

    return Column(
        "bytes", "Size", meaning, value, _printed(value, size_text), lambda row: in_layers(row.run) if row.done else ""
    )


def columns(comparison: Mapping[str, Any]) -> list[Column]:
    """The columns of the table after the name, without those that are empty for all runs."""
    tasks = dict.fromkeys(name for run in comparison["cells"] for name in (run.get("tasks") or {}))
    all_columns = [
        _budget(comparison),
        _size(unit(comparison["cells"])),
        _column(
            "whole_bits",
            "Bits, all",
            "bits of everything that is stored, per weight of the original",
            _of_run("whole_model_bits"),
            lambda bits: f"{bits:.3f}",
        ),
        _column(
            "true_bits",
            "Bits, layers",
            "all stored bits per rounded weight: codes, scales, zero points, padding, online maps",
            _of_run("true_bits"),
            lambda bits: f"{bits:.3f}",
        ),
        *_evaluated(),
        *map(_task, tasks),
        _column("minutes", "Minutes", "time to quantize", _measured("seconds"), lambda seconds: f"{seconds / 60:.1f}"),
        _rate(),
        _column("memory", "Memory", "peak memory while quantizing", _measured("peak_memory_bytes"), size),
        _column(
            "forwards",
            "Forwards",
            "forward equivalents: the time over that of one pass of the calibration text through the original",
            _of_run("forward_equivalents"),
            lambda count: f"{count:.1f}",
        ),
        _column(
            "proof",
            "Proof",
            "relative logit error of the folded model before rounding",
            _of_run("proof_error"),
            lambda error: f"{error:.1e}" if error else "0",
        ),
        Column(
            "p",
            "p",
            "probability of such a difference from the best of the same budget by chance alone, paired over windows; "
            "for this pair only, not adjusted for the selection",
            lambda row: number((row.row.get("against_best") or {}).get("p")),
            probability,
        ),
    ]
    shown = [row for test in tests(comparison) for row in rows(comparison, test)]
    return [column for column in all_columns if any(column.text(row) != NONE for row in shown)]


def budgets(comparison: Mapping[str, Any]) -> list[list[Mapping[str, Any]]]:
    """The verdict in groups of the same budget, each with one entry per text."""
    by_bits: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for budget in comparison["verdict"]:
        by_bits[budget_of(budget)].append(budget)
    return [by_bits[bits] for bits in sorted(by_bits)]
