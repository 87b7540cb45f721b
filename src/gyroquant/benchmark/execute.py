"""Executes a comparison: runs what is missing of a grid of runs, makes the verdict, and writes the results."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gyroquant.benchmark.commands import ComparisonRequest
from gyroquant.benchmark.comparison import make_comparison, write_comparison
from gyroquant.benchmark.expected_time import expected_seconds
from gyroquant.benchmark.external_tools import ExternalTool, ExternalToolError, environment
from gyroquant.benchmark.kinds import EXTERNAL_TOOL, RECIPE
from gyroquant.benchmark.result_folder import ResultFolder
from gyroquant.benchmark.runs import ComparisonSpec, Conditions, Run, plan_runs, with_keys
from gyroquant.benchmark.shared_measurements import SharedMeasurements, plain_folder
from gyroquant.benchmark.sized_runs import SizedTool, plan_sized_runs, plan_sized_tools
from gyroquant.benchmark.texts import EvaluationText, Texts, read_texts, token_digest
from gyroquant.benchmark.tool_selection import selected
from gyroquant.benchmark.worker import run_in_worker
from gyroquant.errors import InputError
from gyroquant.evaluation.perplexity import DTYPES
from gyroquant.evaluation.tasks import TaskPlan, plan_tasks
from gyroquant.formats.output_folder import check_writable
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.fingerprint import fingerprint
from gyroquant.models.stores.source import open_original
from gyroquant.pipeline.validation import check_beside, check_seqlen
from gyroquant.recipes.schema import parse
from gyroquant.system.environment import versions
from gyroquant.system.files import locked
from gyroquant.system.progress import Progress
from gyroquant.system.worker_pool import Pool, Workers, make_pool

BASELINES = ("rtn", "gptq", "gptq-act-order")


@dataclass(frozen=True)
class Limits:
    """The limits of a comparison.

    budget: seconds for all runs. Default: no limit.
    workers: runs at once. Default: one.
    threads: threads of each run. Default: see `Workers`.
    ray: the address of a Ray cluster. Default: none.
    """

    budget: float | None = None
    workers: int | None = None
    threads: int | None = None
    ray: str | None = None


def run_comparison(
    model: str | Path,
    spec: ComparisonSpec,
    out: str | Path,
    text: str | Path,
    tests: Mapping[str, EvaluationText],
    *,
    dtype: str = "float32",
    limits: Limits = Limits(),
    environments: Path | None = None,
    make_environments: bool = False,
    merge: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs the missing runs of a comparison in the folder `out`, makes the verdict, writes and returns the comparison.

    See `gyroquant.benchmark.compare`.
    """
    progress, out = progress or Progress(), Path(out)
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is not supported for evaluation; use {' or '.join(DTYPES)}")
    if not tests:
        raise InputError("a comparison needs a text to measure on: give --test FILE")
    plan = plan_tasks(spec.tasks, spec.task_text, spec.task_limit, spec.task_seed) if spec.tasks else TaskPlan()
    workers = Workers(limits.workers, limits.threads, limits.ray)
    check_beside(out, model)
    check_writable(out.absolute().parent, out)
    store = open_original(model)
    check_seqlen(store.text_config, spec.seqlen)
    baselines = [name for name in BASELINES if name not in spec.recipes]
    spec = replace(spec, recipes=[*baselines, *spec.recipes])
    request = ComparisonRequest(str(model), spec, str(text), tests, dtype)
    runs, sized_tools = _planned(request, store)
    texts = read_texts(store, text, tests, spec.add_bos)
    plan.check_held_out(texts.calibration.about(), "this comparison")
    conditions = _conditions(store, spec, texts, dtype, plan)
    runs = [request.with_command(run, workers.each) for run in with_keys(runs, conditions)]
    with locked(out), _open_results(out) as results:
        for other in map(Path, merge):
            results.merge(other)
            if not any(ResultFolder(other).path(run.key).exists() for run in runs):
                progress.warn(
                    f"{other} has no result of this comparison: its results are of another model, text, recipe or "
                    "version"
                )
        shared = SharedMeasurements(out / "shared" / conditions.name, store, dtype)
        execution = _Execution(request, runs, results, shared, workers, limits.budget, progress, plan)
        execution.sized_tools = [replace(tool, runs=tuple(with_keys(tool.runs, conditions))) for tool in sized_tools]
        facts = execution.prepare(texts)
        execution.find_interpreters(environments, make_environments)
        execution.run_missing(out)
        rows = execution.rows(facts["forward_seconds"], texts.keys)
        comparison = make_comparison(request, store, conditions, texts, facts, rows, workers.each)
        write_comparison(out, comparison, progress)
        return comparison


def _planned(request: ComparisonRequest, store: WeightStore) -> tuple[list[Run], list[SizedTool]]:
    """All runs, at numbers of bits and within budgets of bytes, and the external tools within those budgets."""
    spec, given = request.spec, (request.model, request.calibration)
    runs = plan_runs(spec, given[0], store.graph, given[1]) if spec.widths else []
    tools = plan_sized_tools(spec, store)
    runs += plan_sized_runs(spec, given[0], store, given[1])
    return [*runs, *(run for tool in tools for run in tool.runs)], tools


@contextmanager
def _open_results(out: Path) -> Iterator[ResultFolder]:
    """The results in a folder. An error gets the attribute `kept` if there are results. A new folder without results is
    deleted.
    """
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield ResultFolder(out)
    except BaseException as error:
        if (out / "cells").exists():
            error.kept = out  # type: ignore[attr-defined]
        elif new:
            shutil.rmtree(out, ignore_errors=True)
        raise


def _conditions(store: WeightStore, spec: ComparisonSpec, texts: Texts, dtype: str, plan: TaskPlan) -> Conditions:
    installed = versions()
    return Conditions(
        model=fingerprint(store),
        calibration={"tokens": token_digest(texts.calibration.ids), "seqlen": spec.seqlen}
        | ({"bos": list(texts.calibration.bos)} if texts.calibration.bos else {}),
        tests={
            key: {"window": texts.tests[name].ids.shape[1], "windows": len(texts.tests[name].ids)}
            for name, key in texts.keys.items()
        },
        dtype=dtype,
        versions={name: str(installed[name]) for name in ("gyroquant", "torch", "transformers")},
        tasks=dict.fromkeys(plan.harness, plan.limit or 0) | {entry.name: entry.sha256 for entry in plan.items},
    )


class _Execution:
    """The execution of a comparison.

    interpreters: the interpreters of external tools, by the name of the tool.
    refused: reasons by key, for runs that are not possible.
    skipped: reasons by key, for runs that the time budget left out.
    calibration, matched: by seed, the files of as many windows as any recipe needs, and of the matched windows.
    tests: the files of the tests, by key.
    items: the file of the items of offline tasks, if there are any.
    sized_tools: the external tools within budgets of bytes.
    """

    def __init__(
        self,
        request: ComparisonRequest,
        runs: list[Run],
        results: ResultFolder,
        shared: SharedMeasurements,
        workers: Workers,
        budget: float | None,
        progress: Progress,
        plan: TaskPlan,
    ):
        self.request, self.runs, self.results, self.shared = request, runs, results, shared
        self.workers, self.budget, self.progress, self.plan = workers, budget, progress, plan
        self.interpreters: dict[str, str] = {}
        self.refused: dict[str, str] = {run.key: run.refusal for run in runs if run.refusal}
        self.skipped: dict[str, str] = {}
        self.calibration, self.matched = dict[int, Path](), dict[int, Path]()
        self.tests: dict[str, Path] = {}
        self.items: Path | None = None
        self.sized_tools: list[SizedTool] = []

    def prepare(self, texts: Texts) -> dict[str, Any]:
        """Makes the files that runs share. Returns the original's measurements."""
        count, seqlen = self.request.spec.nsamples, self.request.spec.seqlen
        seeds = sorted({run.seed for run in self.runs})
        self.matched = {seed: self.shared.calibration(texts.calibration, count, seqlen, seed) for seed in seeds}
        for run in self.runs:
            if run.kind == RECIPE and not run.refusal:
                own = parse(dict(run.settings)).calibration
                if own.seqlen == seqlen:
                    count = max(count, own.nsamples)
                else:
                    self.refused[run.key] = (
                        f"it calibrates on windows of {own.seqlen} tokens, all other runs on {seqlen}"
                    )
        self.calibration = {seed: self.shared.calibration(texts.calibration, count, seqlen, seed) for seed in seeds}
        self.items = self.shared.items(self.plan.items)
        self.tests = {key: self.shared.test(texts.tests[name], self.progress) for name, key in texts.keys.items()}
        return self.shared.facts(self.matched[seeds[0]], self.tests, self.progress)

    def find_interpreters(self, folder: Path | None, make: bool) -> None:
        """Finds the interpreters of the external tools with missing runs. Refuses the runs of tools without one."""
        place, reasons = folder or environment.default_folder(), dict[str, str]()
        for run in [missing for missing in self.missing() if missing.kind == EXTERNAL_TOOL]:
            name = run.name.partition(":")[0]
            if name not in self.interpreters and name not in reasons:
                try:
                    python = environment.python_of(ExternalTool.registry[name], place, make, self.progress)
                    self.interpreters[name] = str(python)
                except ExternalToolError as error:
                    reasons[name] = str(error)
            if name in reasons:
                self.refused[run.key] = reasons[name]

    def missing(self) -> list[Run]:
        """The runs without a result: the first seed of every run first, then by bits or bytes, recipes before tools."""
        seeds = sorted({run.seed for run in self.runs})
        missing = [run for run in self.runs if run.key not in self.refused and not self._done(run)]
        return sorted(
            missing, key=lambda run: (seeds.index(run.seed), run.max_bytes or run.size.bits, run.kind == EXTERNAL_TOOL)
        )

    def _done(self, run: Run) -> bool:
        result = self.results.get(run.key)
        return result is not None and result["status"] == "done"

    def run_missing(self, out: Path) -> None:
        """Runs the missing runs, several at once if the pool has room, until the time budget is spent."""
        waiting = self.missing()
        if not waiting:
            return
        scratch = out / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)  # files of a killed comparison; the lock excludes a running one
        scratch.mkdir()
        pool = make_pool(run_in_worker, self.workers)
        began, running = time.monotonic(), dict[Future[dict[str, Any]], Run]()
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
        waiting: list[Run],
        running: dict[Future[dict[str, Any]], Run],
        scratch: Path,
        began: float,
        advance: Callable[[], None],
    ) -> None:
        """Starts runs while there is room and time. Skips those for which no time is left."""
        peak = self._peak_memory()
        while waiting and len(running) < pool.slots(peak):
            run = waiting.pop(0)
            left = None if self.budget is None else self.budget - (time.monotonic() - began)
            if left is not None and expected_seconds(run.kind, run.name, self._results()) > left:
                self.skipped[run.key] = "there was no time for it in the budget; run the same command again"
                advance()
                continue
            log = (scratch.parent / "logs" / f"{run.key}.log").absolute()
            running[pool.submit(self._work(run, scratch, pool.threads), log)] = run

    def _take(self, run: Run, future: Future[dict[str, Any]]) -> None:
        try:
            result = future.result()
        except Exception as error:  # a cluster raises many kinds of errors for a lost run
            result = run.to_dict() | {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
        if result["status"] != "done":
            self.progress.warn(f"{run.label}: {result['reason']}")
        self.results.put(result)

    def _work(self, run: Run, scratch: Path, threads: int) -> dict[str, Any]:
        model = self.request.model
        work = {
            "run": run.to_dict(),
            "settings": dict(run.settings),
            "model": str(Path(model).absolute()) if Path(model).exists() else model,
            "calibration": str(self.calibration[run.seed].absolute()),
            "matched": str(self.matched[run.seed].absolute()),
            "tests": {key: str(path.absolute()) for key, path in self.tests.items()},
            "tasks": dict.fromkeys(self.plan.harness, self.plan.limit or 0),
            "items": None if self.items is None else str(self.items.absolute()),
            "add_bos": self.request.spec.add_bos,
            "speed": bool(self.request.spec.sizes),
            "dtype": self.shared.dtype,
            "scratch": str(scratch.absolute()),
            "threads": threads,
        }
        if run.kind == EXTERNAL_TOOL:
            work["calibration"] = work["matched"]
            work["plain"] = str(plain_folder(self.shared).absolute())
            work["python"] = self.interpreters[run.name.partition(":")[0]]
        return work

    def _results(self) -> list[dict[str, Any]]:
        results = [self.results.get(run.key) for run in self.runs]
        return [result for result in results if result is not None and result["status"] == "done"]

    def _peak_memory(self) -> int:
        return max((result["measured"]["peak_memory_bytes"] for result in self._results()), default=0)

    def rows(self, forward_seconds: float, tests: Mapping[str, str]) -> list[dict[str, Any]]:
        """All runs with their results, or the reasons why they have none.

        forward_seconds: seconds of one pass over the matched windows, for results without a measurement of their own.
        tests: the keys of the tests in the results, by name.
        """
        rows = [self._row(run, forward_seconds, tests) for run in self.runs if not run.candidate]
        for budget in self.request.spec.budgets:
            for tool in self.sized_tools:
                settings = [self._row(run, forward_seconds, tests) for run in tool.runs]
                rows += selected(tool.name, settings, budget, tool.least, tool.problem)
        return rows

    def _row(self, run: Run, forward_seconds: float, tests: Mapping[str, str]) -> dict[str, Any]:
        """A run with its result, or with the reason why it has none."""
        result = self.results.get(run.key)
        ran_with = {} if result is None else result.get("versions", {})
        row = self.request.with_command(run, ran_with.get("threads", self.workers.each)).to_dict()
        if result is not None and result["status"] == "done":
            row = result | row
            row["tests"] = {name: result["tests"][key] for name, key in tests.items()}
            row["forward_equivalents"] = self._forward_equivalents(result["measured"], forward_seconds)
        elif run.key in self.refused:
            row |= {"status": "refused", "reason": self.refused[run.key]}
        elif result is not None:
            row |= {"status": result["status"], "reason": result["reason"]}
        else:
            row |= {"status": "missing", "reason": self.skipped.get(run.key, "it was not run")}
        return row

    def _forward_equivalents(self, measured: Mapping[str, float], forward_seconds: float) -> float:
        """Seconds of a run over the seconds of one pass of the original over the matched windows.

        The number of matched windows may have changed since the run, so the time of its own pass is scaled.
        """
        if "forward_seconds" in measured:
            forward_seconds = measured["forward_seconds"] * self.request.spec.nsamples / measured["forward_windows"]
        return measured["seconds"] / forward_seconds


__all__ = ["BASELINES", "Limits", "run_comparison"]
