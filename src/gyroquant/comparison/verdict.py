"""What a comparison found: paired tests, the Pareto front, and in plain words what to use; it may be no rotation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gyroquant.evaluation.paired import front, paired
from gyroquant.report.comparison_rows import perplexity

Result = Mapping[str, Any]


def verdict(cells: Sequence[Result], original: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A judgement for every number of bits and every test; cells that are not done do not count.

    Rotation is judged against the best of our recipes that rotates nothing.
    """
    judged = []
    for bits in sorted({cell["bits"] for cell in cells}):
        for test in original:
            there = [cell for cell in cells if cell["bits"] == bits and cell["status"] == "done"]
            if there:
                judged.append(_budget(bits, test, there, original[test]))
    return judged


def _budget(bits: int, test: str, cells: Sequence[Result], original: Mapping[str, Any]) -> dict[str, Any]:
    first = _one_a_seed(cells, test)
    loss = {cell["key"]: cell["tests"][test]["loss"] for cell in first}
    by_key = {cell["key"]: cell for cell in first}
    best = by_key[min(loss, key=lambda key: (loss[key], key))]
    plain = [cell for cell in first if not cell["rotated"] and cell["kind"] == "recipe"]
    baseline = min(plain, key=lambda cell: (loss[cell["key"]], cell["key"]), default=None)
    rows = [_row(cell, best, baseline, original, test, cells) for cell in sorted(first, key=lambda c: loss[c["key"]])]
    points = {cell["key"]: (cell["true_bits"], loss[cell["key"]] - original["loss"]) for cell in first}
    recommended, text = _words(best, baseline, first, loss, test)
    return {
        "bits": bits,
        "test": test,
        "baseline": None if baseline is None else baseline["key"],
        "best": best["key"],
        "recommended": recommended["key"],
        "command": recommended["command"],
        "front": front(points),
        "rows": rows,
        "text": text,
    }


def _one_a_seed(cells: Sequence[Result], test: str) -> list[Result]:
    """The cells of the lowest seed."""
    found: dict[tuple[Any, ...], Result] = {}
    for cell in sorted(cells, key=lambda cell: cell["seed"]):
        if test in cell["tests"]:
            found.setdefault(_family(cell), cell)
    return list(found.values())


def _family(cell: Result) -> tuple[Any, ...]:
    return cell["kind"], cell["name"], cell["bits"], cell["group_size"], cell["symmetric"]


def _row(
    cell: Result,
    best: Result,
    baseline: Result | None,
    original: Mapping[str, Any],
    test: str,
    cells: Sequence[Result],
) -> dict[str, Any]:
    def against(other: Result) -> dict[str, Any]:
        return paired(cell["tests"][test]["window_losses"], other["tests"][test]["window_losses"])

    gap = paired(cell["tests"][test]["window_losses"], original["window_losses"])
    seeds = [
        one["tests"][test]["perplexity"] for one in cells if _family(one) == _family(cell) and test in one["tests"]
    ]
    return {
        "key": cell["key"],
        "gap": gap["difference"],
        "gap_interval": gap["interval"],
        "against_best": against(best),
        "against_baseline": None if baseline is None else against(baseline),
        "spread": [min(seeds), max(seeds)] if len(seeds) > 1 else None,
    }


def _words(
    best: Result, baseline: Result | None, cells: Sequence[Result], loss: Mapping[str, float], test: str
) -> tuple[Result, str]:
    """What to use, and why."""

    def said(cell: Result) -> str:
        score = cell["tests"][test]
        low, high = score["perplexity_interval"]
        scores = f"{perplexity(score['perplexity'])}, {perplexity(low)} to {perplexity(high)}"
        return f"{cell['name']} ({scores}, {cell['true_bits']:.3f} bits)"

    lines = [f"Lowest perplexity: {said(best)}."]
    chosen = best
    if baseline is None:
        lines.append("Without a recipe that rotates nothing there is nothing to tell whether rotating paid.")
    elif best is baseline:
        lines.append("Do not rotate: nothing here is better than rounding the model as it is.")
    else:
        test_result = paired(best["tests"][test]["window_losses"], baseline["tests"][test]["window_losses"])
        factor = math.exp(-test_result["difference"])
        what = f"{said(baseline)}, the best that rotates nothing"
        if test_result["significant"]:
            lines.append(
                f"Its perplexity is {factor:.2f} times lower than that of {what} (p = {test_result['p']:.4f})."
            )
        else:
            lines.append(f"That is not significantly better than {what}: do not rotate, or measure on more text.")
            chosen = baseline
    lines += _ours(chosen, cells, loss, said, test)
    return chosen, " ".join(lines)


def _ours(chosen: Result, cells: Sequence[Result], loss: Mapping[str, float], said: Any, test: str) -> list[str]:
    """What is best of ours, where another program won, and what is best of the others, where ours did."""
    other = "recipe" if chosen["kind"] == "opponent" else "opponent"
    rest = [cell for cell in cells if cell["kind"] == other]
    if not rest:
        return []
    nearest = min(rest, key=lambda cell: (loss[cell["key"]], cell["key"]))
    result = paired(nearest["tests"][test]["window_losses"], chosen["tests"][test]["window_losses"])
    who = "Best of our recipes" if other == "recipe" else "Best of the other programs"
    weight = "significantly" if result["significant"] else "not significantly"
    sign = "worse" if result["difference"] > 0 else "better"
    return [f"{who}: {said(nearest)}, {weight} {sign}."]
