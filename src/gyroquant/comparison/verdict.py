"""What a comparison found: paired tests, the Pareto front, and in plain words what to use; it may be no rotation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_RESAMPLES = 10_000
_LEVEL = 0.95
_EXHAUSTIVE = 13  # windows whose signs are turned in all ways

Result = Mapping[str, Any]


def paired(first: Sequence[float], second: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Whether two models differ on the same windows: the mean difference in nats a token, the interval of 95 % from a
    bootstrap over windows, and the two-sided p of a test that turns the signs of windows' differences at random.

    That test is exact however few windows there are: of n the smallest p is 2^(1 - n). `significant` is p < 0.05.
    """
    gaps = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    low, high = _bounds(_resampled(gaps, seed))
    p = _turned(gaps, seed)
    return {"difference": float(gaps.mean()), "interval": [low, high], "p": p, "significant": p < 1 - _LEVEL}


def _turned(gaps: Tensor, seed: int) -> float:
    """How often a mean is as far from 0 when signs are turned: all ways of them, or as many at random, and this one."""
    count = len(gaps)
    if count <= _EXHAUSTIVE:
        signs = 1 - 2 * ((torch.arange(2**count)[:, None] >> torch.arange(count)) & 1)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = 1 - 2 * torch.randint(0, 2, (_RESAMPLES, count), generator=generator)
        signs[0] = 1
    means = (signs * gaps).mean(1).abs()
    return float((means >= float(gaps.mean().abs()) * (1 - 1e-12)).double().mean())


def _resampled(values: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(0, len(values), (_RESAMPLES, len(values)), generator=generator)
    return values[picks].mean(1)


def _bounds(means: Tensor) -> tuple[float, float]:
    tail = (1 - _LEVEL) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=means.dtype))
    return float(low), float(high)


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The keys of which no other has both fewer bits and a smaller gap, by their bits; points are (bits, gap)."""
    kept: list[str] = []
    lowest = math.inf
    for key in sorted(points, key=lambda key: (points[key], key)):
        if points[key][1] < lowest:
            kept.append(key)
            lowest = points[key][1]
    return kept


def verdict(cells: Sequence[Result], original: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A judgement for every number of bits and every test; cells that are not done do not count.

    Rotation is judged against the best of our recipes that changes no basis.
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
    plain = [cell for cell in first if not cell["transformed"] and cell["kind"] == "recipe"]
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
        scores = f"{number(score['perplexity'])}, {number(low)} to {number(high)}"
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
        what = f"{said(baseline)}, the best that changes no basis"
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


def number(value: float) -> str:
    """A perplexity for people."""
    if value >= 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"
