"""What a comparison says in sentences around its tables, the same on the page and in the Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gyroquant.report.comparison_rows import OVER, by_seed, columns, interval, own_samples, perplexity, tests

COVERAGE = {2: 50, 3: 75, 4: 80, 5: 84, 6: 85, 8: 88, 10: 90, 15: 92, 20: 93, 30: 93}
"""Percent of samples of so many windows, normally distributed, whose bootstrap interval of 95 % holds the mean."""
_ENOUGH = 40  # windows from which on it does nearly as often as it says


def introduction(comparison: Mapping[str, Any]) -> str:
    """What was compared, in a sentence or two."""
    done = by_seed(comparison)
    runs, ours = sum(map(len, done)), sum(group[0]["kind"] == "recipe" for group in done)
    counted = [f"{ours} {'result' if ours == 1 else 'results'} of recipes"] if ours or not done else []
    counted += [f"{len(done) - ours} of other programs"] if len(done) > ours else []
    settings, texts = comparison["settings"], comparison["texts"]
    bits = ", ".join(map(str, settings["bits"]))
    seeds = f" ({runs} runs with all seeds)" if runs > len(done) else ""
    made = f"{' and '.join(counted)} at {bits} bits{seeds}"
    on = ", ".join(
        f"{one['name']} ({one['windows']} windows of {one['window']} tokens{_begins(one)})"
        for one in texts["tests"].values()
    )
    of = f"tokens of {texts['calibration']['name']}{_begins(texts['calibration'])}"
    samples = f"{settings['nsamples']} samples of {settings['seqlen']} {of}"
    if any(own_samples(comparison, cell) for group in done for cell in group):
        samples += ", unless the tables give another number of samples,"
    return f"{made}, each calibrated on {samples} and measured on {on}."


def _begins(text: Mapping[str, Any]) -> str:
    """What is said of windows of which each begins with special tokens."""
    return f", each of which begins with {text['bos']}" if text.get("bos") else ""


def counts(comparison: Mapping[str, Any]) -> str:
    """How many cells have no result, by the reason's kind; empty if all have."""
    states = [cell["status"] for cell in comparison["cells"] if cell["status"] != "done"]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def model_facts(comparison: Mapping[str, Any]) -> str:
    """The model in a line."""
    model = comparison["model"]
    weights = model["weights"]
    many = f"{weights / 1e9:.2f} G" if weights >= 1e9 else f"{weights / 1e6:.1f} M"
    return f"{model['model_type']}, {model['blocks']} blocks of hidden {model['hidden']}, {many} weights rounded"


def original_line(comparison: Mapping[str, Any], test: str) -> str:
    """The perplexity of the original, with its interval, or nothing."""
    found = comparison["original"]["tests"].get(test)
    if not found:
        return ""
    span = interval(found.get("perplexity_interval"), perplexity)
    return f"{perplexity(found['perplexity'])}{f' ({span})' if span else ''}"


def notes(comparison: Mapping[str, Any]) -> str:
    """What has to be known to read the tables of results."""
    shown = {column.key for column in columns(comparison)}
    lines = list(_intervals(comparison))
    if "p" in shown:
        lines.append(
            "p is for a row and the best of its budget alone; those of the verdict are adjusted for having chosen."
        )
    limits = {one["bits"]: one["limit"] for one in comparison["verdict"] if one.get("over")}
    if limits:
        said = ", ".join(f"{limit:.3f} at {bits} bits" for bits, limit in limits.items())
        lines.append(
            f"What is {OVER} (more true bits than {said}) is neither best nor recommended, and may be on the front."
        )
    if "bytes" in shown:
        lines.append(
            "Size takes 16 bits for every weight that is not rounded; a rotated model whose embedding and head were "
            "tied is larger, as R1 unties them."
        )
    return " ".join(lines)


def _intervals(comparison: Mapping[str, Any]) -> Iterable[str]:
    """How often intervals hold what they are for."""
    yield "Intervals are bootstraps over windows, for 95 %."
    few = {test: comparison["texts"]["tests"].get(test, {}).get("windows", _ENOUGH) for test in tests(comparison)}
    for test, count in few.items():
        if 1 < count < _ENOUGH:
            covered = COVERAGE[max(n for n in COVERAGE if n <= count)]
            on = f" (on {test})" if len(few) > 1 else ""
            yield f"Those from {count} windows{on} are narrow: they cover about {covered} %."
