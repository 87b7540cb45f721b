"""The sizes by which the results of a comparison are compared: bytes of all weights, and bits of the rounded layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from gyroquant.evaluation.paired import LEVEL, paired

ROOM = 0.02
"""The share of bytes that a result may take above our recipes that rotate nothing and still be within the budget.

Online maps and another format of scales take a percent. The next larger type of an external tool takes a tenth, and
would win by its size alone.
"""

ALIKE = 0.01
"""Results whose bytes differ by less than this share have equal bytes."""

View = Literal["bytes", "bits"]
VIEWS: tuple[View, ...] = ("bytes", "bits")

WEIGHTS, FILES = "weight_bytes", "bytes"
"""What bytes can be of: the weights, or all files of a result, which is all that older results state."""

LEAST_BUDGET = 1000
"""A budget is a number of bits if it is below this, else a number of bytes: no weight has so many bits, and no model so
few bytes.
"""

Result = Mapping[str, Any]


def budget_of(entry: Result) -> int:
    """The budget of a run or of a verdict: its bytes if it has a budget of bytes, else its number of bits."""
    return int(entry.get("max_bytes") or entry["bits"])


def in_bytes(budget: int) -> bool:
    """Whether a budget is one of bytes."""
    return budget >= LEAST_BUDGET


def budget_text(budget: int) -> str:
    """A budget as text: 2 bits, or 50.0 MB."""
    return text(budget) if in_bytes(budget) else f"{budget} bit{'s' * (budget != 1)}"


def unit(runs: Iterable[Result]) -> str:
    """What is compared: WEIGHTS if all runs with a result state them, else FILES."""
    done = [run for run in runs if run["status"] == "done"]
    return WEIGHTS if done and all(run.get(WEIGHTS) for run in done) else FILES


def bytes_of(run: Result, kind: str) -> float | None:
    """The bytes of a run. None if it does not state them."""
    value = run.get(kind)
    if isinstance(value, Mapping):
        value = value.get("total")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        return None
    return float(value)


def text(value: float) -> str:
    """A size as text, fine enough to tell results apart: 1.234 GB, 90.6 MB, 7.1 kB."""
    for name, one, digits in (("GB", 1e9, 3), ("MB", 1e6, 1)):
        if value >= one:
            return f"{value / one:.{digits}f} {name}"
    return f"{value / 1e3:.1f} kB"


def enough(value: float) -> str:
    """A size as text that is at least `value`, to a thousandth of a MB: 50.001 MB."""
    return f"{math.ceil(value / 1e3) / 1e3:.3f} MB"


def exact(value: int) -> str:
    """A number of bytes as an option takes it: 50MB, or 50000001B."""
    for name, one in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if value % one == 0:
            return f"{value // one}{name}"
    return f"{value}B"


def percent(share: float) -> str:
    """A share as text, without its sign."""
    return f"{abs(100 * share):.0f} %"


def in_layers(run: Result) -> str:
    """The bytes of the layers of a run, as text. Empty if it does not state them."""
    stated = run.get(WEIGHTS) or {}
    return f"{text(stated['layers'])} in layers" if stated.get("layers") else ""


def dominating(runs: Sequence[Result], test: str) -> dict[str, str]:
    """The runs that another one makes pointless on a text: their keys, each with the key of the other.

    The other one has fewer bytes, and a perplexity that is not significantly higher; or it has equal bytes and a
    perplexity that is significantly lower. Each test is of one pair of runs, unadjusted. With so few windows that
    nothing can be significant, there are none.
    """
    kind, pairs = unit(runs), dict[str, str]()
    sized = [(run, size) for run in runs if (size := bytes_of(run, kind)) is not None]

    def loss(run: Result) -> float:
        return float(run["tests"][test]["loss"])

    for run, size in sized:
        windows = run["tests"][test]["window_losses"]
        if 2.0 ** (1 - len(windows)) >= LEVEL:
            continue
        smaller = [other for other, its in sized if its * (1 + ALIKE) < size]
        equal = [other for other, its in sized if other is not run and abs(its / size - 1) <= ALIKE]
        for others, is_smaller in ((smaller, True), (equal, False)):
            best = min(others, key=loss, default=None)
            if best is None:
                continue
            differ = paired(windows, best["tests"][test]["window_losses"])["significant"]
            lower = loss(best) < loss(run)
            if (lower and differ) or (is_smaller and (lower or not differ)):
                pairs[run["key"]] = best["key"]
                break
    return pairs
