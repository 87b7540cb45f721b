"""What `gyroquant compare` prints at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gyroquant.benchmark.rows import decimals, rate
from gyroquant.benchmark.sizes import budget_of, budget_text, bytes_of, text, unit
from gyroquant.report.console import table


def compared(comparison: Mapping[str, Any], out: str) -> list[Any]:
    """The results of `compare`: a table and a verdict for each number of bits and text, then runs without a result."""
    by_key = {run["key"]: run for run in comparison["cells"]}
    shown: list[Any] = [f"note: {note}" for note in comparison["notes"]]
    kind = unit(comparison["cells"])
    header = ["", "size", "bits, all", "bits, layers", "perplexity", "95 %", "KL", "p against best", "proof", "minutes"]
    header += ["tokens/s"] if any(rate(run) for run in comparison["cells"]) else []
    for budget in comparison["verdict"]:
        rows = [_cells(by_key, row, budget, kind)[: len(header)] for row in budget["rows"]]
        base = comparison["original"]["tests"][budget["test"]]["perplexity"]
        title = f"{budget_text(budget_of(budget))} on {budget['test']}; the original has perplexity {base:.2f}"
        shown += [table(title, header, rows, right=range(1, len(header))), budget["text"], ""]
    missing: dict[tuple[str, str], list[str]] = {}
    for run in comparison["cells"]:
        if run["status"] != "done":
            missing.setdefault((run["status"], run["reason"]), []).append(run["label"])
    if missing:
        rows = [(", ".join(labels), *reason) for reason, labels in missing.items()]
        shown.append(table("without a result", ("", "", "reason"), rows))
    return [*shown, f"the page with all results: {out}/index.html"]


def _cells(
    by_key: Mapping[str, Mapping[str, Any]], row: Mapping[str, Any], budget: Mapping[str, Any], kind: str
) -> tuple[str, ...]:
    run = by_key[row["key"]]
    score = run["tests"][budget["test"]]
    low, high = score["perplexity_interval"]
    proof = "" if run["proof_error"] is None else f"{run['proof_error']:.0e}"
    against = "best" if row["key"] == budget["best"] else f"{row['against_best']['p']:.4f}"
    kl = "" if score["kl"] is None else f"{score['kl']:.3f}"
    name = run["label"] + (" *" if row["key"] in budget["front"] else "")
    size, whole, other = bytes_of(run, kind), run.get("whole_model_bits"), by_key.get(row.get("dominated_by") or "")
    marks = ["over the budget"] if row["key"] in budget["over"] else []
    marks += [f"dominated by {other['label']}"] if other else []
    return (
        name + (f" ({', '.join(marks)})" if marks else ""),
        "" if size is None else text(size),
        "" if whole is None else f"{whole:.3f}",
        f"{run['true_bits']:.3f}",
        f"{score['perplexity']:.4g}",
        f"{low:.4g} to {high:.4g}",
        kl,
        against,
        proof,
        f"{run['measured']['seconds'] / 60:.1f}",
        decimals(rate(run), 1),
    )


__all__ = ["compared"]
