"""The head-to-head: a grid of cells, run where they are missing, judged, and written as JSON, Markdown and a page."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from gyroquant.calibration.text import load_text
from gyroquant.comparison.cells import Cell, Conditions, Wanted, grid, named
from gyroquant.comparison.command import again
from gyroquant.comparison.files import Results
from gyroquant.comparison.shared import Shared, Trial, own_grid, plain_folder
from gyroquant.comparison.verdict import verdict
from gyroquant.comparison.worker import run_cell
from gyroquant.environment import versions
from gyroquant.errors import InputError
from gyroquant.evaluation.perplexity import DTYPES
from gyroquant.evaluation.tasks import check_tasks
from gyroquant.files import locked, put_json
from gyroquant.models.fingerprint import fingerprint
from gyroquant.models.source import open_model
from gyroquant.models.store import WeightStore
from gyroquant.opponents import Opponent, OpponentError, environment
from gyroquant.pool import Pool, Workers, make_pool
from gyroquant.progress import Stages
from gyroquant.recipe import parse
from gyroquant.report.comparison_markdown import markdown
from gyroquant.report.page import write_page

FORMAT = 1
BASELINES = ("rtn", "gptq")


@dataclass(frozen=True)
class Limits:
    """How much may be used: `budget` seconds, `workers` at once of `threads` threads each, a Ray cluster's address."""

    budget: float | None = None
    workers: int | None = None
    threads: int | None = None
    ray: str | None = None


def run(
    model: str | Path,
    wanted: Wanted,
    out: str | Path,
    calibration: str | Path,
    tests: Mapping[str, Trial],
    *,
    dtype: str = "float32",
    limits: Limits = Limits(),
    environments: Path | None = None,
    make_environments: bool = False,
    merge: Iterable[str | Path] = (),
    progress: Stages | None = None,
) -> dict[str, Any]:
    """Runs what is missing of a comparison in the folder `out`, judges all of it, writes it there and returns it.

    See `gyroquant.comparison.compare`.
    """
    progress, out = progress or Stages(), Path(out)
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it can be {' or '.join(DTYPES)}")
    if not tests:
        raise InputError("a comparison needs a text to measure on: --test FILE")
    if wanted.tasks:
        check_tasks(wanted.tasks)
    store = open_model(model)
    baseline = [name for name in BASELINES if name not in wanted.recipes]
    wanted = replace(wanted, recipes=[*baseline, *wanted.recipes])
    conditions = _conditions(store, wanted, calibration, tests, dtype)
    cells = [named(cell, conditions) for cell in grid(wanted, str(model), store.graph)]
    with locked(out), _growing(out) as results:
        results.merge(map(Path, merge))
        shared = Shared(out / "shared" / conditions.name, store, dtype)
        work = _Run(str(model), cells, results, shared, limits, progress, conditions.tasks)
        facts = work.prepare(calibration, tests, wanted)
        work.find_programs(environments, make_environments)
        work.all(out)
        command = again(str(model), wanted, str(calibration), tests, dtype, limits.threads)
        comparison = _comparison(work, conditions, wanted, facts, str(calibration), command)
        _write(out, comparison, progress)
        return comparison


@contextmanager
def _growing(out: Path) -> Iterator[Results]:
    """The results in a folder; what ends work on them says that they are kept, or leaves no new folder without any."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield Results(out)
    except BaseException as error:
        if (out / "cells").exists():
            error.kept = out  # type: ignore[attr-defined]
        elif new:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _conditions(
    store: WeightStore, wanted: Wanted, calibration: str | Path, tests: Mapping[str, Trial], dtype: str
) -> Conditions:
    found = versions()
    return Conditions(
        model=fingerprint(store),
        calibration={"sha256": load_text(calibration).sha256, "seqlen": wanted.seqlen, "seed": 0},
        tests={
            name: {
                "sha256": load_text(test.source, split="test").sha256,
                "window": test.window,
                "windows": test.windows,
            }
            for name, test in tests.items()
        },
        dtype=dtype,
        versions={name: str(found[name]) for name in ("gyroquant", "torch", "transformers")},
        tasks=dict.fromkeys(wanted.tasks, wanted.task_limit or 0),
    )


class _Run:
    """A comparison that is being made."""

    def __init__(
        self,
        model: str,
        cells: list[Cell],
        results: Results,
        shared: Shared,
        limits: Limits,
        progress: Stages,
        tasks: Mapping[str, int],
    ):
        self.model, self.cells, self.results, self.shared = model, cells, results, shared
        self.limits, self.progress, self.tasks = limits, progress, tasks
        self.programs: dict[str, str] = {}
        self.refused: dict[str, str] = {cell.key: cell.refusal for cell in cells if cell.refusal}
        self.left: dict[str, str] = {}
        self.calibration = self.matched = Path()  # as many windows as any recipe asks for, and as many as are matched
        self.tests: dict[str, Path] = {}

    def prepare(self, text: str | Path, tests: Mapping[str, Trial], wanted: Wanted) -> dict[str, Any]:
        """Makes what cells share; returns the original's measurements."""
        count = wanted.nsamples
        for cell in self.cells:
            if cell.kind == "recipe" and not cell.refusal:
                own = parse(dict(cell.settings)).calibration
                count = max(count, own.nsamples)
                if own.seqlen != wanted.seqlen:
                    self.refused[cell.key] = f"it calibrates on windows of {own.seqlen}, all others of {wanted.seqlen}"
        self.calibration = self.shared.calibration(text, count, wanted.seqlen, 0)
        self.matched = self.shared.calibration(text, wanted.nsamples, wanted.seqlen, 0)
        self.tests = {name: self.shared.test(name, test, self.progress) for name, test in tests.items()}
        return self.shared.facts(self.matched, self.tests, self.progress)

    def find_programs(self, folder: Path | None, make: bool) -> None:
        """Finds the interpreters of opponents that have something to run; who has none is refused with the reason."""
        place, absent = folder or environment.default_folder(), dict[str, str]()
        for cell in [one for one in self.missing() if one.kind == "opponent"]:
            name = cell.name.partition(":")[0]
            if name not in self.programs and name not in absent:
                try:
                    program = environment.python_of(Opponent.kinds[name], place, make, self.progress)
                    self.programs[name] = str(program)
                except OpponentError as error:
                    absent[name] = str(error)
            if name in absent:
                self.refused[cell.key] = absent[name]

    def missing(self) -> list[Cell]:
        """The cells that have to be run, the most telling first: low bits, and one seed of everything before others."""
        seeds = sorted({cell.seed for cell in self.cells})
        there = [cell for cell in self.cells if cell.key not in self.refused and not self._done(cell)]
        return sorted(there, key=lambda cell: (seeds.index(cell.seed), cell.size.bits, cell.kind == "opponent"))

    def _done(self, cell: Cell) -> bool:
        found = self.results.get(cell.key)
        return found is not None and found["status"] == "done"

    def all(self, out: Path) -> None:
        """Runs what is missing, several at once where the pool has room, until the budget is spent."""
        waiting = self.missing()
        if not waiting:
            return
        scratch = out / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed run has left: the folder is locked
        scratch.mkdir()
        pool = make_pool(run_cell, Workers(self.limits.workers, self.limits.threads, self.limits.ray))
        began, running = time.monotonic(), dict[Future[dict[str, Any]], Cell]()
        try:
            with self.progress.stage("compare", len(waiting)) as advance:
                while waiting or running:
                    self._fill(pool, waiting, running, scratch, began, advance)
                    if running:
                        done, _ = wait(running, return_when=FIRST_COMPLETED)
                        for future in done:
                            self._take(running.pop(future), future)
                            advance()
        finally:
            pool.close()

    def _fill(
        self,
        pool: Pool,
        waiting: list[Cell],
        running: dict[Future[dict[str, Any]], Cell],
        scratch: Path,
        began: float,
        advance: Callable[[], None],
    ) -> None:
        """Starts cells while there is room and time; those for which there is no time any more are given up."""
        peak = self._largest()
        while waiting and len(running) < pool.slots(peak):
            cell = waiting.pop(0)
            left = None if self.limits.budget is None else self.limits.budget - (time.monotonic() - began)
            if left is not None and self._expected(cell) > left:
                self.left[cell.key] = "there was no time for it in the budget; run the same command again"
                advance()
                continue
            log = scratch.parent / "logs" / f"{cell.key}.log"
            running[pool.submit(self._spec(cell, scratch, pool.threads), log)] = cell

    def _take(self, cell: Cell, future: Future[dict[str, Any]]) -> None:
        try:
            result = future.result()
        except Exception as error:  # a cluster that lost a cell for good says so in many ways
            result = cell.to_dict() | {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        if result["status"] != "done":
            self.progress.warn(f"{cell.label}: {result['reason']}")
        self.results.put(result)

    def _spec(self, cell: Cell, scratch: Path, threads: int) -> dict[str, Any]:
        spec = {
            "cell": cell.to_dict(),
            "settings": dict(cell.settings),
            "model": str(Path(self.model).absolute()) if Path(self.model).exists() else self.model,
            "calibration": str(self.calibration.absolute()),
            "tests": {name: str(path.absolute()) for name, path in self.tests.items()},
            "tasks": dict(self.tasks),
            "dtype": self.shared.dtype,
            "scratch": str(scratch.absolute()),
            "threads": threads,
        }
        if cell.kind == "opponent":
            spec["calibration"] = str(self.matched.absolute())
            spec["plain"] = str(plain_folder(self.shared).absolute())
            spec["python"] = self.programs[cell.name.partition(":")[0]]
        return spec

    def _there(self) -> list[dict[str, Any]]:
        found = [self.results.get(cell.key) for cell in self.cells]
        return [one for one in found if one is not None and one["status"] == "done"]

    def _largest(self) -> int:
        return max((one["measured"]["peak_memory_bytes"] for one in self._there()), default=0)

    def _expected(self, cell: Cell) -> float:
        """Seconds that a cell may take: as long as others of its name did, or its kind; 0 when nothing is known."""
        there = [one for one in self._there() if one["kind"] == cell.kind]
        same = [one for one in there if one["name"] == cell.name]
        return median(one["measured"]["seconds"] for one in same or there) if there else 0.0

    def rows(self, forward_seconds: float) -> list[dict[str, Any]]:
        """All cells with what came of them."""
        rows = []
        for cell in self.cells:
            found = self.results.get(cell.key)
            row = cell.to_dict()
            if found is not None and found["status"] == "done":
                row = found | row
                row["forward_equivalents"] = found["measured"]["seconds"] / forward_seconds
            elif cell.key in self.refused:
                row |= {"status": "refused", "reason": self.refused[cell.key]}
            elif found is not None:
                row |= {"status": found["status"], "reason": found["reason"]}
            else:
                row |= {"status": "missing", "reason": self.left.get(cell.key, "it was not run")}
            rows.append(row)
        return rows


def _comparison(
    run: _Run, conditions: Conditions, wanted: Wanted, facts: Mapping[str, Any], calibration: str, command: str
) -> dict[str, Any]:
    store, graph = run.shared.store, run.shared.store.graph
    cells = run.rows(facts["forward_seconds"])
    return {
        "format": FORMAT,
        "name": Path(run.model).name,
        "made": date.today().isoformat(),
        "command": command,
        "model": {
            "label": Path(store.label).name,
            "sha256": conditions.model,
            "model_type": graph.config.model_type,
            "blocks": len(graph.blocks),
            "hidden": graph.hidden,
            "weights": sum(math.prod(op.shape) for block in graph.blocks for op in block.linears if op.entry.quantize),
        },
        "texts": {
            "calibration": {"name": Path(calibration).name, **conditions.calibration},
            "tests": {name: _text(name, about, facts) for name, about in conditions.tests.items()},
        },
        "settings": {key: _plain(value) for key, value in vars(wanted).items()} | {"dtype": run.shared.dtype},
        "versions": versions(),
        "notes": own_grid(store),
        "original": {key: facts[key] for key in ("tests", "outliers")},
        "cells": cells,
        "verdict": verdict(cells, facts["tests"]),
    }


def _text(name: str, about: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A text that is measured on, with how much of it really is."""
    count = len(facts["tests"][name]["window_losses"])
    return {"name": name.rpartition(", ")[0] or name, **about, "windows": count, "tokens": count * about["window"]}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


def _write(out: Path, comparison: Mapping[str, Any], progress: Stages) -> None:
    put_json(out / "comparison.json", comparison)
    (out / "comparison.md").write_text(markdown(comparison), encoding="utf-8")
    try:
        write_page(comparison, out / "index.html")
    except InputError as error:  # the numbers are there, whatever the page lacks
        progress.warn(f"there is no page: {error}")


__all__ = ["BASELINES", "Limits", "run"]
