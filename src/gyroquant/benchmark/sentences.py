"""The sentences around the tables of a comparison. The page and the Markdown have the same ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gyroquant.benchmark.kinds import RECIPE
from gyroquant.benchmark.rows import OVER, by_seed, columns, interval, own_samples, perplexity, tests
from gyroquant.benchmark.sizes import FILES, WEIGHTS, budget_of, budget_text, in_bytes, text, unit

COVERAGE = {2: 50, 3: 75, 4: 80, 5: 84, 6: 85, 8: 88, 10: 90, 15: 92, 20: 93, 30: 93}
"""By number of windows: the percentage of normally distributed samples whose 95 % bootstrap interval holds the mean."""
_ENOUGH = 40  # windows at which the coverage is close to 95 %


def introduction(comparison: Mapping[str, Any]) -> str:
    """What was compared, in two sentences."""
    done = by_seed(comparison)
    runs, ours = sum(map(len, done)), sum(group[0]["kind"] == RECIPE for group in done)
    counts = [f"{ours} {'result' if ours == 1 else 'results'} of recipes"] if ours or not done else []
    counts += [f"{len(done) - ours} of external tools"] if len(done) > ours else []
    settings, texts = comparison["settings"], comparison["texts"]
    bits = f"{', '.join(map(str, settings['bits']))} bits" if settings["bits"] else ""
    within = ", ".join(map(text, settings.get("sizes") or ()))
    budgets = " and ".join(filter(None, (f"at {bits}" * bool(bits), f"within {within}" * bool(within))))
    seeds = f" ({runs} runs with all seeds)" if runs > len(done) else ""
    results = f"{' and '.join(counts)} {budgets}{seeds}"
    tests = ", ".join(
        f"{test['name']} ({test['windows']} windows of {test['window']} tokens{_begins(test)})"
        for test in texts["tests"].values()
    )
    tokens = f"tokens of {texts['calibration']['name']}{_begins(texts['calibration'])}"
    samples = f"{settings['nsamples']} samples of {settings['seqlen']} {tokens}"
    if any(own_samples(comparison, run) for group in done for run in group):
        samples += ", unless the tables give another number of samples,"
    return f"{results}, each calibrated on {samples} and measured on {tests}."


def _begins(text: Mapping[str, Any]) -> str:
    """The words for windows that begin with special tokens. Empty if they do not."""
    return f", each beginning with {text['bos']}" if text.get("bos") else ""


def counts(comparison: Mapping[str, Any]) -> str:
    """How many runs have no result, by status. Empty if all have one."""
    states = [run["status"] for run in comparison["cells"] if run["status"] != "done"]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def model_facts(comparison: Mapping[str, Any]) -> str:
    """The model in a line."""
    model = comparison["model"]
    weights = model["weights"]
    count = f"{weights / 1e9:.2f} G" if weights >= 1e9 else f"{weights / 1e6:.1f} M"
    return f"{model['model_type']}, {model['blocks']} blocks of hidden size {model['hidden']}, {count} weights rounded"


def original_line(comparison: Mapping[str, Any], test: str) -> str:
    """The perplexity of the original, with its interval. Empty if it was not measured on `test`."""
    score = comparison["original"]["tests"].get(test)
    if not score:
        return ""
    span = interval(score.get("perplexity_interval"), perplexity)
    return f"{perplexity(score['perplexity'])}{f' ({span})' if span else ''}"


def notes(comparison: Mapping[str, Any]) -> str:
    """The notes below the tables of results: intervals, p, the budget, sizes."""
    shown = {column.key for column in columns(comparison)}
    lines = list(_intervals(comparison))
    if "p" in shown:
        lines.append(
            "Each p in a table is for one row and the best of its budget. The p values of the verdict are adjusted for "
            "the selection."
        )
    limits = {budget_of(one): _limit(one) for one in comparison["verdict"] if one.get("over")}
    if limits:
        budgets = ", ".join(
            limit if in_bytes(budget) else f"{limit} at {budget_text(budget)}" for budget, limit in limits.items()
        )
        lines.append(f"A result {OVER} (more than {budgets}) is neither best nor recommended. It may be on the front.")
    if any(row.get("dominated_by") for one in comparison["verdict"] for row in one["rows"]):
        lines.append(
            "A result is dominated if another one, of whatever bits, has fewer bytes and a perplexity that is not "
            "significantly higher, or equal bytes and a perplexity that is significantly lower."
        )
    if any(run.get("max_bytes") for run in comparison["cells"]):
        lines.append(_WITHIN)
    if "tokens" in shown:
        lines.append(
            "Tokens a second are those of our own folders in transformers in fp32, with one text, beside the original "
            "in turns. External tools have runtimes of their own, which are not measured here."
        )
    if "bytes" in shown:
        lines.append(_SIZES[unit(comparison["cells"])])
    return " ".join(lines)


def _limit(budget: Mapping[str, Any]) -> str:
    """The budget of a verdict, as text. Comparisons of the last release have one in true bits."""
    return text(budget["limit"]) if "unit" in budget else f"{budget['limit']:.3f} true bits"


_WITHIN = (
    "Within a budget of bytes, each recipe has bits that are chosen for layers, embedding and head, and each external "
    "tool the largest of its settings that fits."
)
_SIZES = {
    WEIGHTS: (
        "The size is that of all weights in the file, with embedding and head as each tool leaves them by default, and "
        "at most 16 bits for a weight that is not rounded. R1 unties a head that is tied to the embedding, unless "
        "keep_ties is set: then the two are larger."
    ),
    FILES: (
        "The size is that of all files, with 16 bits for every weight that is not rounded. If embedding and head were "
        "tied, a rotated model is larger, because R1 unties them."
    ),
}


def _intervals(comparison: Mapping[str, Any]) -> Iterable[str]:
    """What the intervals are, and how often those from few windows hold the mean."""
    yield "Intervals are 95 % bootstraps over windows."
    few = {test: comparison["texts"]["tests"].get(test, {}).get("windows", _ENOUGH) for test in tests(comparison)}
    for test, count in few.items():
        if 1 < count < _ENOUGH:
            covered = COVERAGE[max(n for n in COVERAGE if n <= count)]
            on = f" (on {test})" if len(few) > 1 else ""
            yield f"Intervals from {count} windows{on} are too narrow: they cover about {covered} %."
