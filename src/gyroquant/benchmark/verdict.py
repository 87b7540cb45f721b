"""The verdict of a comparison: paired tests, the Pareto front, and two answers in words.

The answers: which result to use, and whether rotating pays.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gyroquant.benchmark.cost_sentences import costs
from gyroquant.benchmark.kinds import EXTERNAL_TOOL, RECIPE
from gyroquant.benchmark.rows import perplexity, same
from gyroquant.benchmark.sizes import (
    ALIKE,
    ROOM,
    budget_of,
    budget_text,
    bytes_of,
    dominating,
    in_bytes,
    percent,
    text,
    unit,
)
from gyroquant.evaluation.paired import LEVEL, front, max_t, paired

Result = Mapping[str, Any]


def verdict(runs: Sequence[Result], original: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One verdict for every budget, of bits or of bytes, and every test. Runs that are not done or have a loss that is
    not finite do not count.

    Results are compared at equal bytes of all their weights. The limit of a number of bits is the most bytes of our
    recipes that rotate nothing, plus ROOM. A budget of bytes is its own limit. A result over the budget is a row and
    may be on the front, but it is neither best nor recommended. A row states by which result it is
    dominated (`dominating`), at whatever bits. Two questions are answered within the budget:

    - Which result to use: the one with the lowest loss among those that are significantly better than the baseline.
      If there is no such result, the baseline. The baseline is the best of our recipes that rotate nothing.
    - Whether rotating pays: the best result that rotates against the best result that does not, ours or an external
      tool's. If one of them has more bytes, each side is searched again, at whatever bits, for results that have no
      more bytes than the smaller one.

    Each p of an answer is adjusted for the selection (`max_t`). Each p in `rows` is for one pair of runs, unadjusted.
    All of them use the lowest seed of each run, so they do not include the randomness of a run itself. If there are
    several seeds, the text gives the range of both runs, and at how many seeds the answer is the same.
    """
    verdicts, kind = [], unit(runs)
    every = {test: _finite_runs([run for run in runs if run["status"] == "done"], test) for test in original}
    dominated = {test: dominating(_first_seeds(every[test]), test) for test in original}
    for budget in sorted(set(map(budget_of, runs))):
        for test in original:
            done = [c for c in runs if budget_of(c) == budget and c["status"] == "done" and test in c["tests"]]
            finite = [run for run in every[test] if budget_of(run) == budget]
            if finite:
                lost = sorted({run["name"] for run in done} - {run["name"] for run in finite})
                by_key = {run["key"]: run for run in every[test]}
                others = {key: by_key[other] for key, other in dominated[test].items()}
                field = _Field(finite, test, kind, others, every[test])
                verdicts.append(_budget(field, lost, original[test]))
    return verdicts


def _finite_runs(done: Sequence[Result], test: str) -> list[Result]:
    return [run for run in done if test in run["tests"] and _finite(run["tests"][test])]


def _first_seeds(runs: Sequence[Result]) -> list[Result]:
    """The lowest seed of each run."""
    first: dict[tuple[Any, ...], Result] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        first.setdefault(same(run), run)
    return list(first.values())


def _finite(score: Mapping[str, Any]) -> bool:
    return all(map(math.isfinite, [score["loss"], *score["window_losses"]]))


def _rotated(run: Result) -> bool:
    return bool(run.get("rotated", False))


@dataclass(frozen=True)
class _Contest:
    """Two runs on the same windows. `factor` is the perplexity of `higher` over that of `lower`.

    `more` is the share of bytes that `lower` takes above those of `higher`; negative if it takes fewer.
    """

    lower: Result
    higher: Result
    factor: float
    p: float
    more: float = 0.0

    @property
    def sizes(self) -> str:
        """How the bytes of `lower` differ from those of `higher`. Empty if they do not."""
        return "" if abs(self.more) <= ALIKE else f"{percent(self.more)} {'more' if self.more > 0 else 'fewer'} bytes"

    @property
    def significant(self) -> bool:
        return self.p < LEVEL


@dataclass(frozen=True)
class _Rotation(_Contest):
    """The contest of the best run that rotates and the best run that does not.

    `room`: the most bytes that either could have, if they were searched at equal bytes.
    """

    room: float | None = None

    @property
    def lower_rotates(self) -> bool:
        return _rotated(self.lower)

    @property
    def rotated(self) -> Result:
        return self.lower if self.lower_rotates else self.higher

    @property
    def plain(self) -> Result:
        return self.higher if self.lower_rotates else self.lower

    @property
    def larger(self) -> bool:
        """Whether the lower run has more bytes, so that the contest is not at equal bytes."""
        return self.more > ALIKE and self.room is None

    @property
    def pays(self) -> bool:
        return self.lower_rotates and self.significant and not self.larger


class _Field:
    """The runs within one budget on one text: the lowest seed of each, the budget, the baseline and the best.

    runs: lowest seed of each, by rising loss.
    baseline: the best of our recipes that rotate nothing, or None.
    budget: a number of bits, or of bytes.
    limit: the most bytes within the budget, or None at a number of bits without a baseline.
    kind: what bytes are of (`sizes.unit`).
    dominated: by the key of a run, the run that dominates it.
    every: the same as `runs`, of all numbers of bits.
    over, within: the runs over the budget, and the others.
    candidates: the runs within the budget that are tested against the baseline. `adjusted` has their p by key.
    recommended: the first candidate that is significantly better than the baseline, else the baseline, else the best.
    """

    def __init__(
        self,
        runs: Sequence[Result],
        test: str,
        kind: str,
        dominated: Mapping[str, Result],
        every: Sequence[Result],
    ):
        self.test, self.all, self.kind, self.dominated = test, runs, kind, dominated
        self.runs, self.every = self._ranked(runs), self._ranked(every)
        plain = [run for run in self.runs if run["kind"] == RECIPE and not _rotated(run)]
        self.budget = budget_of(runs[0])
        if in_bytes(self.budget):
            self.limit: float | None = self.budget
            plain = [run for run in plain if self.size(run) <= self.budget]
        else:
            self.limit = max(map(self.size, plain)) * (1 + ROOM) if plain else None
        self.baseline = next(iter(plain), None)
        self.over = [run for run in self.runs if self.limit is not None and self.size(run) > self.limit]
        self.within = [run for run in self.runs if run not in self.over]
        self.best = next(iter(self.within), self.runs[0])
        # Another of our recipes that rotate nothing cannot be better than the best of them.
        self.candidates = [run for run in self.within if run not in plain]
        self.adjusted = self._max_t(self.candidates, self.baseline) if self.baseline else {}
        self.recommended = next(filter(self.better, self.candidates), self.baseline or self.best)

    def _ranked(self, runs: Sequence[Result]) -> list[Result]:
        """The lowest seed of each run, by rising loss."""
        return sorted(_first_seeds(runs), key=lambda run: (self.loss(run), run["key"]))

    def seeds(self, run: Result) -> dict[int, float]:
        """The perplexities of a run by seed."""
        alike = [other for other in self.all if same(other) == same(run)]
        return {other["seed"]: other["tests"][self.test]["perplexity"] for other in alike}

    def size(self, run: Result) -> float:
        """The bytes of a run. A run that does not state them is over every budget."""
        size = bytes_of(run, self.kind)
        return math.inf if size is None else size

    def loss(self, run: Result) -> float:
        return float(run["tests"][self.test]["loss"])

    def windows(self, run: Result) -> Sequence[float]:
        losses: Sequence[float] = run["tests"][self.test]["window_losses"]
        return losses

    def better(self, run: Result) -> bool:
        """Whether a candidate is significantly better than the baseline."""
        if self.baseline is None or self.loss(run) >= self.loss(self.baseline):
            return False
        return self.adjusted[run["key"]] < LEVEL

    def contest(self, first: Result, second: Result, sides: tuple[Sequence[Result], Sequence[Result]]) -> _Contest:
        """Compares one run of each side with the other. p is adjusted for the selection of the lower run from its side.

        The selection of the higher run needs no adjustment: it is the lowest of its side, which makes the test harder.
        """
        swap = self.loss(second) < self.loss(first)
        lower, higher = (second, first) if swap else (first, second)
        p = self._max_t(sides[swap], higher)[lower["key"]]
        more = self.size(lower) / self.size(higher) - 1
        return _Contest(lower, higher, _exponential(self.loss(higher) - self.loss(lower)), p, more)

    def other(self) -> _Contest | None:
        """The recommended run against the best of the other kind: recipes of ours, or external tools."""
        kind = self.recommended["kind"]
        sides = [c for c in self.within if c["kind"] == kind], [c for c in self.within if c["kind"] != kind]
        return self.contest(self.recommended, sides[1][0], sides) if sides[1] else None

    def rotation(self) -> _Rotation | None:
        """The best run that rotates against the best run that does not, or None if there are not both.

        At equal bytes if possible: if one has more bytes than the other and is better, each side is searched again for
        runs of no more bytes than the smaller one, at whatever bits.
        """
        sides = _sides(self.within)
        if not all(sides):
            return None
        contest = _Rotation(**vars(self.contest(sides[0][0], sides[1][0], sides)))
        if not contest.larger:
            return contest
        room = self.size(contest.higher) * (1 + ALIKE)
        sides = _sides([run for run in self.every if self.size(run) <= room])
        if not all(sides):
            return contest
        return _Rotation(**vars(self.contest(sides[0][0], sides[1][0], sides)), room=room)

    def _max_t(self, runs: Iterable[Result], against: Result) -> dict[str, float]:
        return max_t({run["key"]: self.windows(run) for run in runs}, self.windows(against))


def _sides(runs: Sequence[Result]) -> tuple[list[Result], list[Result]]:
    """The runs that rotate, and those that do not."""
    return [run for run in runs if _rotated(run)], [run for run in runs if not _rotated(run)]


def _span(run: Result, perplexities: Sequence[float]) -> str:
    low, high = perplexity(min(perplexities)), perplexity(max(perplexities))
    return f"{run['name']} {low}" + f" to {high}" * (low != high)


def _of(run: Result) -> str:
    """The budget of a run, as text: W2, or 50.0 MB."""
    return budget_text(budget_of(run)) if run.get("max_bytes") else f"W{run['bits']}"


def _exponential(value: float) -> float:
    return math.exp(min(value, 700.0))  # stays finite, so that JSON can hold it


def _budget(field: _Field, lost: Sequence[str], original: Mapping[str, Any]) -> dict[str, Any]:
    baseline, recommended, rotation = field.baseline, field.recommended, field.rotation()
    words = _Words(field)
    other = field.other()
    pairs = [(recommended, baseline)] if baseline not in (None, recommended) else []
    pairs += [(contest.lower, contest.higher) for contest in (other, rotation) if contest]
    lines = [[*words.use(), *words.others(other)], words.rotation(rotation), words.seeds(pairs), words.limits(lost)]
    own: dict[str, Any] = {"bits": field.budget}
    if in_bytes(field.budget):
        named = [recommended, *(run for pair in pairs for run in pair), *([baseline] if baseline else [])]
        lines.insert(1, costs(named))
        own = {"bits": None, "max_bytes": field.budget}
    return own | {
        "test": field.test,
        "limit": field.limit,
        "unit": field.kind,
        "over": [run["key"] for run in field.over],
        "baseline": None if baseline is None else baseline["key"],
        "best": field.best["key"],
        "recommended": recommended["key"],
        "command": recommended["command"],
        "home": recommended.get("home"),
        "rotation": _rotation(rotation),
        "front": front({run["key"]: (field.size(run), field.loss(run)) for run in field.runs}),
        "rows": [_row(run, field, original) for run in field.runs],
        "text": "\n".join(" ".join(line) for line in lines if line),
    }


def _rotation(contest: _Rotation | None) -> dict[str, Any] | None:
    """The answer about rotations. `factor`: how many times lower the perplexity is with them (below 1: higher).

    `equal_bytes`: whether the result with the lower perplexity has no more bytes than the other.
    """
    if contest is None:
        return None
    return {
        "rotated": contest.rotated["key"],
        "plain": contest.plain["key"],
        "factor": contest.factor if contest.lower_rotates else 1 / contest.factor,
        "p": contest.p,
        "significant": contest.significant,
        "pays": contest.pays,
        "equal_bytes": not contest.larger,
    }


def _row(run: Result, field: _Field, original: Mapping[str, Any]) -> dict[str, Any]:
    def against(other: Result) -> dict[str, Any]:
        return paired(field.windows(run), field.windows(other))

    gap = paired(field.windows(run), original["window_losses"]) if _finite(original) else {}
    seeds = field.seeds(run).values()
    return {
        "key": run["key"],
        "gap": gap.get("difference"),
        "gap_interval": gap.get("interval"),
        "against_best": against(field.best),
        "against_baseline": None if field.baseline is None else against(field.baseline),
        "adjusted_p": field.adjusted.get(run["key"]),
        "spread": [min(seeds), max(seeds)] if len(seeds) > 1 else None,
        "dominated_by": field.dominated[run["key"]]["key"] if run["key"] in field.dominated else None,
    }


class _Words:
    """A verdict in words. The first mention of a run has its numbers."""

    def __init__(self, field: _Field):
        self.field = field
        self.mentioned: set[str] = set()

    def mention(self, run: Result) -> str:
        """The name of a run. The first time also perplexity, interval, bytes and true bits."""
        name = str(run["name"])
        if run["key"] in self.mentioned:
            return name
        self.mentioned.add(run["key"])
        score = run["tests"][self.field.test]
        low, high = map(perplexity, score["perplexity_interval"])
        size = f"{text(self.field.size(run))} at {run['true_bits']:.3f} bits"
        return f"{name} ({perplexity(score['perplexity'])}, {low} to {high}, {size})"

    def use(self) -> list[str]:
        """Which result to use and why, and which has the lowest mean loss if that is another one."""
        field, best, baseline = self.field, self.field.best, self.field.baseline
        if baseline is None:
            nothing = "baseline" if in_bytes(field.budget) else "budget and no baseline"
            return [
                f"Lowest perplexity: {self.mention(best)}.",
                f"No recipe of ours that rotates nothing has a result, so there is no {nothing}.",
            ]
        chosen, count = field.recommended, len(field.candidates)
        if chosen is baseline:
            lines = [f"Use {self.mention(baseline)}, the best of our recipes that rotate nothing."]
            if best is baseline:
                lines.append("No other result within the budget has a lower perplexity.")
                return [*lines, *self._larger(), *self._dominating(baseline)]
        else:
            factor = _exponential(field.loss(baseline) - field.loss(chosen))
            lines = [
                f"Use {self.mention(chosen)}: its perplexity is {factor:.2f} times lower than that of "
                f"{self.mention(baseline)}, the best of our recipes that rotate nothing "
                f"(p = {field.adjusted[chosen['key']]:.4f}{f', adjusted for {count} candidates' * (count > 1)})."
            ]
        if best is not chosen:
            lines.append(
                f"The lowest perplexity is that of {self.mention(best)}, but it is not significantly lower than that "
                f"of {self.mention(baseline)} (p = {field.adjusted[best['key']]:.4f}): measure on more text."
            )
        return [*lines, *self._larger(), *self._dominating(chosen)]

    def _dominating(self, chosen: Result) -> list[str]:
        """The result that dominates the recommended one, at whatever bits."""
        other = self.field.dominated.get(chosen["key"])
        if other is None:
            return []
        smaller = "is smaller" if self.field.size(other) < self.field.size(chosen) else "takes the same bytes"
        way = "has a lower" if self.field.loss(other) < self.field.loss(chosen) else "has no significantly higher"
        return [f"But {self.mention(other)}, of {_of(other)}, {smaller} and {way} perplexity."]

    def _larger(self) -> list[str]:
        """The best result over the budget, if it is better than the best within."""
        field = self.field
        if not field.over or field.loss(field.over[0]) >= field.loss(field.best):
            return []
        assert field.limit is not None
        return [f"Lower perplexity, but over the budget of {text(field.limit)}: {self.mention(field.over[0])}."]

    def others(self, contest: _Contest | None) -> list[str]:
        """The best of our recipes if an external tool is recommended, and the other way round."""
        if contest is None:
            return []
        chosen = self.field.recommended
        nearest, way = (contest.higher, "worse") if contest.lower is chosen else (contest.lower, "better")
        side = "our recipes" if chosen["kind"] == EXTERNAL_TOOL else "the external tools"
        weight = "significantly" if contest.significant else "not significantly"
        share = self.field.size(nearest) / self.field.size(chosen) - 1
        size = f" at {percent(share)} {'more' if share > 0 else 'fewer'} bytes" if abs(share) > ALIKE else ""
        return [f"Best of {side}: {self.mention(nearest)}, {weight} {way}{size} (p = {contest.p:.4f})."]

    def rotation(self, contest: _Rotation | None) -> list[str]:
        """Whether rotating pays."""
        if contest is None:
            missing = "that does not rotate" if any(map(_rotated, self.field.within)) else "that rotates"
            if any(map(_rotated, self.field.over)) and missing == "that rotates":
                return [
                    "Whether rotating pays at these bytes is not known: every result that rotates is over the budget. "
                    "If R1 unties a head, keep_ties=true keeps the two one matrix."
                ]
            return [f"Whether rotating pays is not known: there is no result {missing}."]
        if contest.larger:
            lower, higher = contest.lower, contest.higher
            return [
                f"Whether rotating pays at equal bytes is not known: {self.mention(lower)} has {contest.factor:.2f} "
                f"times lower perplexity than {self.mention(higher)}, and {contest.sizes}."
            ]
        way = "lower" if contest.lower_rotates else "higher"
        fact = (
            f"{self.mention(contest.rotated)}, the best result with rotation, has {contest.factor:.2f} times {way} "
            f"perplexity than {self.mention(contest.plain)}, the best result without"
        )
        if contest.room is not None:
            fact += f", of all with at most {text(contest.room)}"
        elif contest.sizes:
            fact += f", and the better one has {contest.sizes}"
        if contest.pays and (contest.room is not None or _rotated(self.field.recommended)):
            where = "" if contest.room is None else " at equal bytes"
            return [f"Rotating pays{where}: {fact} (p = {contest.p:.4f})."]
        if contest.pays:  # significantly the best of the candidates that rotate, but not of all candidates
            return [
                f"Rotating pays, narrowly: {fact} (p = {contest.p:.4f}, adjusted for the candidates that rotate, not "
                "for all candidates)."
            ]
        advice = "Do not rotate"
        if _rotated(self.field.recommended):  # it beats our baseline, but an external tool does about as well
            advice += f" if you can use {contest.plain['name']}"
        if not contest.significant:
            advice += ", or measure on more text"
        negation = "" if contest.significant else "not "
        return [f"{advice}: {fact}, which is {negation}significant (p = {contest.p:.4f})."]

    def seeds(self, pairs: Iterable[tuple[Result, Result]]) -> list[str]:
        """The contests of an answer, seed by seed.

        All runs of a seed calibrate on the same windows, so runs are compared at the same seed. A run with one seed
        only is compared with every seed of the other.
        """
        lines = {}
        for first, second in pairs:
            better, worse = sorted((first, second), key=self.field.loss)
            low, high = self.field.seeds(better), self.field.seeds(worse)
            if len(low) == 1:
                low = dict.fromkeys(high, low[better["seed"]])
            elif len(high) == 1:
                high = dict.fromkeys(low, high[worse["seed"]])
            seeds = low.keys() & high.keys()
            if len(seeds) < 2:
                continue
            lower = sum(low[seed] < high[seed] for seed in seeds)
            spans = (_span(run, [values[seed] for seed in seeds]) for run, values in ((better, low), (worse, high)))
            where = "at each seed" if lower == len(seeds) else f"at {lower} only, so chance decides the order"
            lines[better["key"], worse["key"]] = (
                f"Over {len(seeds)} seeds: {', '.join(spans)}; {better['name']} is lower {where}."
            )
        return list(lines.values())

    def limits(self, lost: Sequence[str]) -> list[str]:
        """The limits of the verdict: too few windows, and runs that it leaves out."""
        count = len(self.field.windows(self.field.best))
        lines = []
        if 2.0 ** (1 - count) >= LEVEL:
            lines.append(f"With so few windows ({count}), no difference can be significant: measure on more text.")
        if lost:
            lines.append(f"Left out, because their losses are not finite: {', '.join(lost)}.")
        return lines
