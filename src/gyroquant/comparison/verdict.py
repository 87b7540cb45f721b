"""What a comparison found: paired tests, the Pareto front, and in plain words what to use and whether rotating pays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gyroquant.evaluation.paired import LEVEL, front, max_t, paired
from gyroquant.report.comparison_rows import perplexity, same

ROOM = 0.1
"""Bits a weight that a result may take above our recipes that rotate nothing and still be of their budget: rotations
that are stored take a few hundredths of a bit, another format of scales or padded rows a few more. The next larger type
of a program, which would win by its size, takes half a bit.
"""

Result = Mapping[str, Any]


def verdict(cells: Sequence[Result], original: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A judgement for every number of bits and every test; cells that are not done, or that have a loss which is not
    finite, do not count.

    The budget is the most true bits that a recipe of ours which rotates nothing takes, and ROOM; what is larger is a
    row and may be on the front, but neither best nor recommended. Two questions are answered within it. What to use: of
    what is significantly better than the baseline, the best of our recipes that rotate nothing, that of the lowest
    loss; the baseline if there is nothing such. Whether rotating pays: the best result that rotates against the best
    that does not, ours or another program's. Each p of an answer is adjusted for having chosen (`max_t`); those in
    `rows` are for one pair of cells each. Both are of the lowest seed, and know nothing of a run's own chance: where
    there are several seeds, the words say how far those of the two reach, and at how many the answer is the same.
    """
    judged = []
    for bits in sorted({cell["bits"] for cell in cells}):
        for test in original:
            there = [c for c in cells if c["bits"] == bits and c["status"] == "done" and test in c["tests"]]
            sound = [cell for cell in there if _finite(cell["tests"][test])]
            if sound:
                lost = sorted({cell["name"] for cell in there} - {cell["name"] for cell in sound})
                judged.append(_budget(bits, _Field(sound, test), lost, original[test]))
    return judged


def _finite(score: Mapping[str, Any]) -> bool:
    return all(map(math.isfinite, [score["loss"], *score["window_losses"]]))


def _rotated(cell: Result) -> bool:
    return bool(cell.get("rotated", False))


@dataclass(frozen=True)
class _Contest:
    """Two cells on the same windows: `factor` is by how much the perplexity of `higher` exceeds that of `lower`."""

    lower: Result
    higher: Result
    factor: float
    p: float

    @property
    def significant(self) -> bool:
        return self.p < LEVEL


@dataclass(frozen=True)
class _Rotation(_Contest):
    """The contest of the best that rotates and the best that does not."""

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
    def pays(self) -> bool:
        return self.lower_rotates and self.significant


class _Field:
    """The cells of a number of bits as measured on one text, the lowest seed of each, and who stands where."""

    def __init__(self, cells: Sequence[Result], test: str):
        self.test, self.all = test, cells
        first: dict[tuple[Any, ...], Result] = {}
        for cell in sorted(cells, key=lambda cell: cell["seed"]):
            first.setdefault(same(cell), cell)
        self.cells = sorted(first.values(), key=lambda cell: (self.loss(cell), cell["key"]))
        plain = [cell for cell in self.cells if cell["kind"] == "recipe" and not _rotated(cell)]
        self.baseline = next(iter(plain), None)
        self.limit = max(cell["true_bits"] for cell in plain) + ROOM if plain else None
        self.over = [cell for cell in self.cells if self.limit is not None and cell["true_bits"] > self.limit]
        self.within = [cell for cell in self.cells if cell not in self.over]
        self.best = self.within[0]
        # Another of our recipes that rotate nothing cannot be better than the best of them.
        self.candidates = [cell for cell in self.within if cell not in plain]
        self.adjusted = self._max_t(self.candidates, self.baseline) if self.baseline else {}
        self.recommended = next(filter(self.better, self.candidates), self.baseline or self.best)

    def seeds(self, cell: Result) -> dict[int, float]:
        """The perplexities of a cell by seed."""
        alike = [one for one in self.all if same(one) == same(cell)]
        return {one["seed"]: one["tests"][self.test]["perplexity"] for one in alike}

    def loss(self, cell: Result) -> float:
        return float(cell["tests"][self.test]["loss"])

    def windows(self, cell: Result) -> Sequence[float]:
        found: Sequence[float] = cell["tests"][self.test]["window_losses"]
        return found

    def better(self, cell: Result) -> bool:
        """Whether a candidate is significantly better than the baseline."""
        if self.baseline is None or self.loss(cell) >= self.loss(self.baseline):
            return False
        return self.adjusted[cell["key"]] < LEVEL

    def contest(self, first: Result, second: Result, sides: tuple[Sequence[Result], Sequence[Result]]) -> _Contest:
        """One cell of each side against the other; p is adjusted for having chosen the lower one from its side.

        Having chosen the higher one, as the lowest of its side, needs no adjustment: it speaks against the lower.
        """
        swap = self.loss(second) < self.loss(first)
        lower, higher = (second, first) if swap else (first, second)
        p = self._max_t(sides[swap], higher)[lower["key"]]
        return _Contest(lower, higher, _exponential(self.loss(higher) - self.loss(lower)), p)

    def other(self) -> _Contest | None:
        """The recommended against the best of the other kind: of programs where it is ours, of ours where it is one."""
        kind = self.recommended["kind"]
        sides = [c for c in self.within if c["kind"] == kind], [c for c in self.within if c["kind"] != kind]
        return self.contest(self.recommended, sides[1][0], sides) if sides[1] else None

    def rotation(self) -> _Rotation | None:
        """The best that rotates against the best that does not, where there are both."""
        sides = [cell for cell in self.within if _rotated(cell)], [cell for cell in self.within if not _rotated(cell)]
        return _Rotation(**vars(self.contest(sides[0][0], sides[1][0], sides))) if all(sides) else None

    def _max_t(self, cells: Iterable[Result], against: Result) -> dict[str, float]:
        return max_t({cell["key"]: self.windows(cell) for cell in cells}, self.windows(against))


def _span(cell: Result, found: Sequence[float]) -> str:
    low, high = perplexity(min(found)), perplexity(max(found))
    return f"{cell['name']} {low}" + f" to {high}" * (low != high)


def _exponential(value: float) -> float:
    return math.exp(min(value, 700.0))  # a hopeless model still gets a number that JSON can hold


def _budget(bits: int, field: _Field, lost: Sequence[str], original: Mapping[str, Any]) -> dict[str, Any]:
    baseline, recommended, rotation = field.baseline, field.recommended, field.rotation()
    words = _Words(field)
    other = field.other()
    pairs = [(recommended, baseline)] if baseline not in (None, recommended) else []
    pairs += [(contest.lower, contest.higher) for contest in (other, rotation) if contest]
    lines = [*words.use(), *words.others(other)], words.rotation(rotation), words.seeds(pairs), words.limits(lost)
    return {
        "bits": bits,
        "test": field.test,
        "limit": field.limit,
        "over": [cell["key"] for cell in field.over],
        "baseline": None if baseline is None else baseline["key"],
        "best": field.best["key"],
        "recommended": recommended["key"],
        "command": recommended["command"],
        "home": recommended.get("home"),
        "rotation": _rotation(rotation),
        "front": front({cell["key"]: (cell["true_bits"], field.loss(cell)) for cell in field.cells}),
        "rows": [_row(cell, field, original) for cell in field.cells],
        "text": "\n".join(" ".join(line) for line in lines if line),
    }


def _rotation(found: _Rotation | None) -> dict[str, Any] | None:
    """The answer about rotations; `factor` is how many times lower perplexity is with them (below 1: higher)."""
    if found is None:
        return None
    return {
        "rotated": found.rotated["key"],
        "plain": found.plain["key"],
        "factor": found.factor if found.lower_rotates else 1 / found.factor,
        "p": found.p,
        "significant": found.significant,
        "pays": found.pays,
    }


def _row(cell: Result, field: _Field, original: Mapping[str, Any]) -> dict[str, Any]:
    def against(other: Result) -> dict[str, Any]:
        return paired(field.windows(cell), field.windows(other))

    gap = paired(field.windows(cell), original["window_losses"]) if _finite(original) else {}
    seeds = field.seeds(cell).values()
    return {
        "key": cell["key"],
        "gap": gap.get("difference"),
        "gap_interval": gap.get("interval"),
        "against_best": against(field.best),
        "against_baseline": None if field.baseline is None else against(field.baseline),
        "adjusted_p": field.adjusted.get(cell["key"]),
        "spread": [min(seeds), max(seeds)] if len(seeds) > 1 else None,
    }


class _Words:
    """A verdict in words; a cell is told with its numbers where it is first named."""

    def __init__(self, field: _Field):
        self.field = field
        self.told: set[str] = set()

    def said(self, cell: Result) -> str:
        """A cell by its name, the first time with perplexity, interval and true bits."""
        name = str(cell["name"])
        if cell["key"] in self.told:
            return name
        self.told.add(cell["key"])
        score = cell["tests"][self.field.test]
        low, high = map(perplexity, score["perplexity_interval"])
        return f"{name} ({perplexity(score['perplexity'])}, {low} to {high}, {cell['true_bits']:.3f} bits)"

    def use(self) -> list[str]:
        """What to use and why, and what has the lowest mean where that is something else."""
        field, best, baseline = self.field, self.field.best, self.field.baseline
        if baseline is None:
            return [
                f"Lowest perplexity: {self.said(best)}.",
                "Without a recipe of ours that rotates nothing there is no budget to keep to and nothing to test it "
                "against.",
            ]
        chosen, count = field.recommended, len(field.candidates)
        if chosen is baseline:
            lines = [f"Use {self.said(baseline)}, the best of our recipes that rotate nothing."]
            if best is baseline:
                return [*lines, "Nothing of the budget has a lower perplexity.", *self._larger()]
        else:
            factor = _exponential(field.loss(baseline) - field.loss(chosen))
            lines = [
                f"Use {self.said(chosen)}: its perplexity is {factor:.2f} times lower than that of "
                f"{self.said(baseline)}, the best of our recipes that rotate nothing "
                f"(p = {field.adjusted[chosen['key']]:.4f}{f', adjusted for {count} candidates' * (count > 1)})."
            ]
        if best is not chosen:
            lines.append(
                f"The lowest perplexity is that of {self.said(best)}, but it is not significantly lower than that of "
                f"{self.said(baseline)} (p = {field.adjusted[best['key']]:.4f}): measure on more text."
            )
        return lines + self._larger()

    def _larger(self) -> list[str]:
        """What is better and larger than the budget."""
        field = self.field
        if not field.over or field.loss(field.over[0]) >= field.loss(field.best):
            return []
        return [f"Lower still, but over the budget of {field.limit:.3f} bits: {self.said(field.over[0])}."]

    def others(self, found: _Contest | None) -> list[str]:
        """What is best of ours where another program is recommended, and of the others where ours is."""
        if found is None:
            return []
        chosen = self.field.recommended
        nearest, way = (found.higher, "worse") if found.lower is chosen else (found.lower, "better")
        who = "our recipes" if chosen["kind"] == "opponent" else "the other programs"
        weight = "significantly" if found.significant else "not significantly"
        return [f"Best of {who}: {self.said(nearest)}, {weight} {way} (p = {found.p:.4f})."]

    def rotation(self, found: _Rotation | None) -> list[str]:
        """Whether rotating pays."""
        if found is None:
            what = "that does not rotate" if any(map(_rotated, self.field.within)) else "that rotates"
            return [f"Whether rotating pays is not known: there is no result {what}."]
        way = "lower" if found.lower_rotates else "higher"
        fact = (
            f"{self.said(found.rotated)}, the best that rotates, has {found.factor:.2f} times {way} perplexity than "
            f"{self.said(found.plain)}, the best that does not"
        )
        if found.pays and _rotated(self.field.recommended):
            return [f"Rotating pays: {fact} (p = {found.p:.4f})."]
        if found.pays:  # of all candidates it is not significantly the best, of those that rotate it is
            return [
                f"Rotating pays, narrowly: {fact} (p = {found.p:.4f}, adjusted for those that rotate and not for all "
                "candidates)."
            ]
        advice = "Do not rotate"
        if _rotated(self.field.recommended):  # it beats our own, but a program does about as well without
            advice += f" where {found.plain['name']} will do"
        if not found.significant:
            advice += ", or measure on more text"
        return [f"{advice}: {fact}, which is {'' if found.significant else 'not '}significant (p = {found.p:.4f})."]

    def seeds(self, pairs: Iterable[tuple[Result, Result]]) -> list[str]:
        """What the seeds say of the contests of an answer. Both sides of a seed have calibrated on the same windows, so
        that they are compared seed by seed; what has only one is held against every seed of the other.
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
            spans = (_span(one, [found[seed] for seed in seeds]) for one, found in ((better, low), (worse, high)))
            said = "at each" if lower == len(seeds) else f"at {lower} only: chance turns this round"
            lines[better["key"], worse["key"]] = (
                f"Over {len(seeds)} seeds: {', '.join(spans)}; {better['name']} is lower {said}."
            )
        return list(lines.values())

    def limits(self, lost: Sequence[str]) -> list[str]:
        """What the verdict cannot say."""
        count = len(self.field.windows(self.field.best))
        lines = []
        if 2.0 ** (1 - count) >= LEVEL:
            lines.append(f"No difference on so few windows ({count}) can be significant: measure on more text.")
        if lost:
            lines.append(f"Left out, as losses are not finite: {', '.join(lost)}.")
        return lines
