"""The measurements of a report as a list, from which its tables and its exports are made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BOOTSTRAP = "percentile bootstrap over windows"


@dataclass(frozen=True)
class Measure:
    """One number about the rounded model.

    - key: its name in exports. name: its name in tables, with the unit.
    - value: the number, or None. original: the same of the original, or None. interval: a 95 % interval, or None.
    - least, most: the bounds of its scale. lower_is_better: whether a smaller number is closer to the original.
    - digits: decimals in tables.
    - method: how the interval was made. task: the zero-shot task it was measured in; None for the text.
    """

    key: str
    name: str
    value: float | None
    meaning: str
    original: float | None = None
    interval: Sequence[float] | None = None
    least: float = 0.0
    most: float = math.inf
    lower_is_better: bool = True
    digits: int = 4
    method: str = BOOTSTRAP
    task: str | None = None

    def cells(self) -> tuple[str, str, str, str]:
        """The row of a table: name, value, interval, the original's value."""
        span = "" if self.interval is None else " to ".join(decimals(x, self.digits) for x in self.interval)
        original = "" if self.original is None else decimals(self.original, self.digits)
        return self.name, decimals(self.value, self.digits), span, original


HEADINGS = ("measured", "rounded model", "95 % interval", "original")
BLOCK_HEADINGS = (
    "block",
    "relative error",
    "growth",
    "cosine",
    "own error",
    "own cosine",
    "linear R² original",
    "linear R² rounded",
)


def decimals(value: float | None, digits: int) -> str:
    """A number with so many decimals; a dash for None and for what is not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def measures(report: Mapping[str, Any]) -> list[Measure]:
    """The measurements of a report, in the order of its tables."""
    found = report["diagnosis"]
    sets, smooth, likely = found["prediction_sets"], found["smoothness"], found["candidates"]
    asked = f"{100 * found['coverage_asked']:g} %"
    return [
        Measure(
            "acceptance",
            "expected acceptance rate",
            found["acceptance"]["rate"],
            "1 minus the total variation between the next-token distributions of both models (SLQ, arXiv 2605.02404)",
            interval=found["acceptance"]["interval"],
            most=1.0,
            lower_is_better=False,
        ),
        Measure(
            "kl",
            "KL divergence (nats a token)",
            report["kl"],
            "KL divergence from the original's distribution to the rounded model's",
            interval=report["kl_interval"],
        ),
        Measure(
            "top1_agreement",
            "top-1 agreement",
            report["top1_agreement"],
            "share of positions at which both models have the same most likely token",
            interval=report["top1_interval"],
            most=1.0,
            lower_is_better=False,
        ),
        Measure(
            "perplexity",
            "perplexity",
            report["perplexity"],
            "exp of the mean negative log-likelihood of a token",
            interval=report["perplexity_interval"],
            least=1.0,
            digits=3,
        ),
        Measure(
            "smoothness_ratio",
            "smoothness ratio",
            smooth["ratio"],
            "norm of the loss's gradient at the input over that of the original (FINE, arXiv 2605.08894)",
            interval=smooth["interval"],
        ),
        Measure(
            "candidates",
            f"candidates (tokens with p > {likely['epsilon']:g})",
            likely["rounded"],
            "mean number of tokens whose probability is above the threshold",
            likely["original"],
            lower_is_better=False,
            digits=2,
        ),
        Measure(
            "prediction_set_size",
            f"prediction set size at {asked} (tokens)",
            sets["rounded"]["set_size"],
            "mean size of split conformal prediction sets (arXiv 2606.01850)",
            sets["original"]["set_size"],
            digits=2,
        ),
        Measure(
            "prediction_set_coverage",
            f"coverage reached ({asked} asked)",
            sets["rounded"]["coverage"],
            "share of measured tokens that are in their prediction set",
            sets["original"]["coverage"],
            most=1.0,
            lower_is_better=False,
        ),
        *_steps("continuation", "continuations", found["continuations"]),
        *(_steps("generation", "generations", found["generations"]) if "generations" in found else []),
    ]


def task_measures(report: Mapping[str, Any]) -> list[Measure]:
    """The accuracies in zero-shot tasks, if the report has any, in the order of its tables."""
    return [
        Measure(
            f"task_{task}",
            f"accuracy in {task}",
            score["acc"],
            f"share of right answers in the zero-shot task {task}, by the metric {score['metric']}",
            (score.get("original") or {}).get("acc"),
            score["interval"],
            most=1.0,
            lower_is_better=False,
            method="Wilson score interval" if "items" in score else "normal distribution with the standard error",
            task=task,
        )
        for task, score in report.get("tasks", {}).items()
    ]


def _steps(key: str, name: str, found: Mapping[str, Any]) -> list[Measure]:
    longest = max(found["lengths"])
    return [
        Measure(
            f"{key}s_different",
            f"{name} that differ, of {found['texts']}",
            found["different"],
            f"share of {name} of at most {longest} tokens in which a most likely token is not the original's",
            most=1.0,
        ),
        Measure(
            f"{key}s_first_difference",
            f"first step that differs in {name} (median)",
            found["median"],
            "median number of the first token that differs; a dash if less than half of the texts differ",
            least=1.0,
            lower_is_better=False,
            digits=1,
        ),
    ]


def block_cells(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table of blocks; the first is about the embeddings."""
    start, rows = report["diagnosis"]["embeddings"], report["diagnosis"]["blocks"]
    first = ("embeddings", decimals(start["relative_error"], 4), "-", decimals(start["cosine"], 4), *["-"] * 4)
    return [first, *(_block(row) for row in rows)]


def _block(row: Mapping[str, Any]) -> tuple[str, ...]:
    linear = row["linear_r2"]
    figures = (
        (row["relative_error"], 4),
        (row["growth"], 2),
        (row["cosine"], 4),
        (row["own_error"], 4),
        (row["own_cosine"], 4),
        (linear["original"], 3),
        (linear["rounded"], 3),
    )
    return (str(row["block"]), *(decimals(value, digits) for value, digits in figures))


def headline(report: Mapping[str, Any]) -> str:
    """The verdict in some words, with the block."""
    found = report["diagnosis"]["verdict"]
    at = {"collapse": " at block {}", "degradation": ", most through block {}"}.get(found["kind"], "")
    return f"{found['kind'].capitalize()}{at.format(found['block'])}"


def diagnosed(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """What a report adds to the printed table of `evaluate`: name, value and interval."""
    shown = ("kl", "top1_agreement", "perplexity")  # rows of every evaluation
    cells = [measure.cells() for measure in measures(result) if measure.key not in shown]
    rows = [("verdict", headline(result), ""), *((name, value, span) for name, value, span, _ in cells)]
    return [*rows, ("report", str(result["report"]), "")]


def facts(report: Mapping[str, Any]) -> str:
    """On what the report was measured, as a sentence."""
    return (
        f"{report['model']} against {report['against']}, on {report['predicted']} predicted tokens of "
        f"{report['text']['name']} in {report['windows']} windows of {report['window']}."
    )
