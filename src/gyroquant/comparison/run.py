"""The head-to-head: a grid of cells, run where they are missing, judged, and written as JSON, Markdown and a page."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gyroquant.comparison.budget import expected_seconds
from gyroquant.comparison.cells import Cell, Conditions, Wanted, all_named, grid
from gyroquant.comparison.command import Asked
from gyroquant.comparison.files import Results
from gyroquant.comparison.outcome import outcome, write
from gyroquant.comparison.shared import Shared, plain_folder
from gyroquant.comparison.texts import Texts, Trial, read_texts, token_digest
from gyroquant.comparison.worker import run_cell
from gyroquant.environment import versions
from gyroquant.errors import InputError
from gyroquant.evaluation.perplexity import DTYPES
from gyroquant.evaluation.tasks import check_tasks
from gyroquant.export.folder import check_writable
from gyroquant.files import locked
from gyroquant.models.fingerprint import fingerprint
from gyroquant.models.source import open_original
from gyroquant.models.store import WeightStore
from gyroquant.opponents import Opponent, OpponentError, environment
from gyroquant.pool import Pool, Workers, make_pool
from gyroquant.progress import Stages
from gyroquant.recipe import parse
from gyroquant.refusals import check_beside, check_seqlen

BASELINES = ("rtn", "gptq", "gptq-act-order")


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
    workers = Workers(limits.workers, limits.threads, limits.ray)
    check_beside(out, model)
    check_writable(out.absolute().parent, out)
    store = open_original(model)
    check_seqlen(store.text_config, wanted.seqlen)
    baseline = [name for name in BASELINES if name not in wanted.recipes]
    wanted = replace(wanted, recipes=[*baseline, *wanted.recipes])
    asked = Asked(str(model), wanted, str(calibration), tests, dtype)
    cells = grid(wanted, asked.model, store.graph, asked.calibration)
    texts = read_texts(store, calibration, tests, wanted.add_bos)
    conditions = _conditions(store, wanted, texts, dtype)
    cells = [asked.with_command(cell, workers.each) for cell in all_named(cells, conditions)]
    with locked(out), _growing(out) as results:
        for other in map(Path, merge):
            results.merge(other)
            if not any(Results(other).path(cell.key).exists() for cell in cells):
                progress.warn(
                    f"{other} has no result of this comparison, but of another model, text, recipe or version"
                )
        shared = Shared(out / "shared" / conditions.name, store, dtype)
        work = _Run(asked, cells, results, shared, workers, limits.budget, progress, conditions.tasks)
        facts = work.prepare(texts)
        work.find_programs(environments, make_environments)
        work.all(out)
        rows = work.rows(facts["forward_seconds"], texts.keys)
        comparison = outcome(asked, store, conditions, texts, facts, rows, workers.each)
        write(out, comparison, progress)
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


def _conditions(store: WeightStore, wanted: Wanted, texts: Texts, dtype: str) -> Conditions:
    found = versions()
    return Conditions(
        model=fingerprint(store),
        calibration={"tokens": token_digest(texts.calibration.ids), "seqlen": wanted.seqlen}
        | ({"bos": list(texts.calibration.bos)} if texts.calibration.bos else {}),
        tests={
            key: {"window": texts.tests[name].ids.shape[1], "windows": len(texts.tests[name].ids)}
            for name, key in texts.keys.items()
        },
        dtype=dtype,
        versions={name: str(found[name]) for name in ("gyroquant", "torch", "transformers")},
        tasks=dict.fromkeys(wanted.tasks, wanted.task_limit or 0),
    )


class _Run:
    """A comparison that is being made."""

    def __init__(
        self,
        asked: Asked,
        cells: list[Cell],
        results: Results,
        shared: Shared,
        workers: Workers,
        budget: float | None,
        progress: Stages,
        tasks: Mapping[str, int],
    ):
        self.asked, self.cells, self.results, self.shared = asked, cells, results, shared
        self.workers, self.budget, self.progress, self.tasks = workers, budget, progress, tasks
        self.programs: dict[str, str] = {}
        self.refused: dict[str, str] = {cell.key: cell.refusal for cell in cells if cell.refusal}
        self.left: dict[str, str] = {}
        # By seed: files of as many windows as any recipe asks for, and of as many as are matched.
        self.calibration, self.matched = dict[int, Path](), dict[int, Path]()
        self.tests: dict[str, Path] = {}

    def prepare(self, texts: Texts) -> dict[str, Any]:
        """Makes what cells share; returns the original's measurements."""
        count, seqlen = self.asked.wanted.nsamples, self.asked.wanted.seqlen
        seeds = sorted({cell.seed for cell in self.cells})
        self.matched = {seed: self.shared.calibration(texts.calibration, count, seqlen, seed) for seed in seeds}
        for cell in self.cells:
            if cell.kind == "recipe" and not cell.refusal:
                own = parse(dict(cell.settings)).calibration
                if own.seqlen == seqlen:
                    count = max(count, own.nsamples)
                else:
                    self.refused[cell.key] = f"it calibrates on windows of {own.seqlen}, all others of {seqlen}"
        self.calibration = {seed: self.shared.calibration(texts.calibration, count, seqlen, seed) for seed in seeds}
        self.tests = {key: self.shared.test(texts.tests[name], self.progress) for name, key in texts.keys.items()}
        return self.shared.facts(self.matched[seeds[0]], self.tests, self.progress)

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
        pool = make_pool(run_cell, self.workers)
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
            left = None if self.budget is None else self.budget - (time.monotonic() - began)
            if left is not None and expected_seconds(cell.kind, cell.name, self._there()) > left:
                self.left[cell.key] = "there was no time for it in the budget; run the same command again"
                advance()
                continue
            log = (scratch.parent / "logs" / f"{cell.key}.log").absolute()
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
        model = self.asked.model
        spec = {
            "cell": cell.to_dict(),
            "settings": dict(cell.settings),
            "model": str(Path(model).absolute()) if Path(model).exists() else model,
            "calibration": str(self.calibration[cell.seed].absolute()),
            "matched": str(self.matched[cell.seed].absolute()),
            "tests": {key: str(path.absolute()) for key, path in self.tests.items()},
            "tasks": dict(self.tasks),
            "add_bos": self.asked.wanted.add_bos,
            "dtype": self.shared.dtype,
            "scratch": str(scratch.absolute()),
            "threads": threads,
        }
        if cell.kind == "opponent":
            spec["calibration"] = spec["matched"]
            spec["plain"] = str(plain_folder(self.shared).absolute())
            spec["python"] = self.programs[cell.name.partition(":")[0]]
        return spec

    def _there(self) -> list[dict[str, Any]]:
        found = [self.results.get(cell.key) for cell in self.cells]
        return [one for one in found if one is not None and one["status"] == "done"]

    def _largest(self) -> int:
        return max((one["measured"]["peak_memory_bytes"] for one in self._there()), default=0)

    def rows(self, forward_seconds: float, tests: Mapping[str, str]) -> list[dict[str, Any]]:
        """All cells with what came of them: `tests` are what results call the tests, by name, and `forward_seconds` a
        pass over the matched windows, for results that have none of their own.
        """
        rows = []
        for cell in self.cells:
            found = self.results.get(cell.key)
            ran_with = {} if found is None else found.get("versions", {})
            row = self.asked.with_command(cell, ran_with.get("threads", self.workers.each)).to_dict()
            if found is not None and found["status"] == "done":
                row = found | row
                row["tests"] = {name: found["tests"][key] for name, key in tests.items()}
                row["forward_equivalents"] = self._passes(found["measured"], forward_seconds)
            elif cell.key in self.refused:
                row |= {"status": "refused", "reason": self.refused[cell.key]}
            elif found is not None:
                row |= {"status": found["status"], "reason": found["reason"]}
            else:
                row |= {"status": "missing", "reason": self.left.get(cell.key, "it was not run")}
            rows.append(row)
        return rows

    def _passes(self, took: Mapping[str, float], forward_seconds: float) -> float:
        """Seconds of a cell in passes of the original over the windows that are matched now, which may be others than
        when the cell was run.
        """
        if "forward_seconds" in took:
            forward_seconds = took["forward_seconds"] * self.asked.wanted.nsamples / took["forward_windows"]
        return took["seconds"] / forward_seconds


__all__ = ["BASELINES", "Limits", "run"]
