"""The stages are one list: what is run, checked for memory and measured, and what users and the journal call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import FrozenInstanceError
from itertools import groupby
from pathlib import Path
from typing import Any

import fault_injection
import pytest
import tiny_models

import gyroquant as gq
from gyroquant.finetuning import scales
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.inspection import dry_run
from gyroquant.pipeline import resources
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.cost_probe import CostProbe, StageCost
from gyroquant.pipeline.job import Job, prepare
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.stages import STAGES, RunContext, Shortage, Stage
from gyroquant.system.progress import Advance, Progress

EVERYTHING = "learned, measured, tuned and finished"
BY_NAME = {stage.name: stage for stage in STAGES}


def job(folder: Path, corpus: Path, out: Path, name: str = "gptq", *changes: str, **options: Any) -> Job:
    recipe, settings = fault_injection.RECIPES.get(name, (name, fault_injection.SMALL))
    loaded = gq.load_recipe(recipe, [*settings, *changes])
    return prepare(folder, out, loaded, corpus, tokenizer=tiny_models.tokenizer(), **options)


class Extra(Stage):
    """A stage that somebody adds to the list."""

    name = "extra"

    def __init__(self) -> None:
        self.ran: list[Job] = []

    def run(self, context: RunContext) -> None:
        self.ran.append(context.job)

    def memory(self, model: MemoryModel) -> float:
        return 1 << 60

    def cost(self, probe: CostProbe) -> StageCost:
        return StageCost(12, 3.0)

    def remedies(self, job: Job, shortage: Shortage) -> list[str]:
        return ["leave the extra stage out"]


class Shown(Progress):
    """Notes the stages that are shown, and how many steps they were said to have and had."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Advance]:
        self.names.append(name)
        yield lambda: None


def test_a_stage_in_the_list_is_run_checked_and_measured(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, made = Extra(), job(folders["llama"], corpus, tmp_path / "out", "rtn")
    for module in (pipeline, resources, dry_run):
        monkeypatch.setattr(module, "STAGES", (extra, *STAGES))
    assert [stage.name for stage in resources.estimate(made).stages] == ["extra", "quantize", "save"]
    assert [stage.name for stage in dry_run.dry_run_job(made).stages] == ["extra", "quantize", "save"]
    with pytest.raises(gq.InputError, match=r"stage 'extra'.*: leave the extra stage out; free some memory"):
        pipeline.run(made)
    assert not extra.ran
    monkeypatch.setattr(Extra, "memory", lambda stage, model: None)
    pipeline.run(made)
    assert len(extra.ran) == 1


def test_progress_shows_the_stages_by_their_names_and_in_their_order(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    shown, order = Shown(), [stage.name for stage in STAGES]
    pipeline.run(job(folders["llama"], corpus, tmp_path / "out", EVERYTHING), shown)
    first, *rest = [name for name, _ in groupby(name.partition(":")[0] for name in shown.names)]
    assert first == "fingerprint the model"
    assert rest == [name for name in order if name not in ("windows", "allocate", "external solver", "save")]


def test_names_and_keys_tell_stages_apart() -> None:
    keys = [stage.journal_key for stage in STAGES if stage.journal_key]
    assert len(BY_NAME) == len(STAGES)
    assert len(set(keys)) == len(keys)
    assert all(type(stage).__doc__ for stage in STAGES)


def test_the_journal_keeps_what_stages_say_under_their_keys(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def died(folder: OutputFolder) -> None:
        raise MemoryError

    monkeypatch.setattr(OutputFolder, "commit", died)
    monkeypatch.setattr(scales, "_CHECKPOINT", 1)
    made = job(folders["llama"], corpus, tmp_path / "out", EVERYTHING)
    with pytest.raises(MemoryError):
        pipeline.run(made)
    kept = [path.name for path in (tmp_path / ".out.journal").iterdir()]
    for stage in STAGES:
        if stage.journal_key:
            assert any(name.startswith(stage.journal_key) for name in kept) == stage.applies(made), stage.name


@pytest.mark.parametrize("work", [pipeline.run, dry_run.dry_run_job, resources.estimate])
def test_nobody_changes_the_job(
    work: Callable[[Job], object], folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Though maps are measured and learned, and the means of keys are found: a job can be run again."""
    keys = ["kv_cache.bits=4", "kv_cache.center_keys=true"]
    made = job(folders["llama"], corpus, tmp_path / "out", EVERYTHING, *keys, overwrite=True)
    plan, grids, quantizers = made.plan, dict(made.grids), list(made.quantizers)
    work(made)
    assert made.plan is plan is made.spec.planned
    assert made.grids == grids == made.spec.grids
    assert all(now is before for now, before in zip(made.quantizers, quantizers, strict=True))
    assert tuple(quantizers) == made.spec.quantizers
    assert not made.state.results
    assert not made.state.warnings
    work(made)


def test_a_job_is_read_only(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    made = job(folders["llama"], corpus, tmp_path / "out")
    for owner, name in ((made, "tokens"), (made, "plan"), (made, "state"), (made.spec, "tokens"), (made.spec, "graph")):
        with pytest.raises((FrozenInstanceError, AttributeError)):
            setattr(owner, name, None)
    public = {name for name in vars(type(made.spec)) if not name.startswith("_")} | set(vars(made.spec))
    assert all(hasattr(made, name) for name in public - {"planned"})


@pytest.mark.parametrize(
    ("stage", "recipe", "changes", "options", "words"),
    [
        ("learn", "spinquant", [], {}, ["learn.objective=blocks", "--seqlen shorter than 32"]),
        ("prove", "gsr", [], {}, ["proof.nsamples=1"]),
        ("quantize", "gptq", [], {}, ["--offload DIR", "--nsamples 4"]),
        ("quantize", "gptq", [], {"offload": "hidden"}, []),
        (
            "finetune",
            "gptq",
            ["finetune.steps=4"],
            {"offload": "hidden"},
            ["--nsamples 4", "finetune=null", "--seqlen shorter"],
        ),
        ("save", "rtn", [], {}, []),
    ],
)
def test_a_stage_knows_what_lowers_its_memory(
    stage: str,
    recipe: str,
    changes: list[str],
    options: dict[str, Any],
    words: list[str],
    folders: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
) -> None:
    options = {name: tmp_path / value for name, value in options.items()}
    made = job(folders["llama"], corpus, tmp_path / "out", recipe, *changes, **options)
    hidden = resources.hidden_bytes(made)
    remedies = BY_NAME[stage].remedies(made, Shortage(hidden // 2, hidden))
    assert len(remedies) == len(words)
    assert all(word in remedy for word, remedy in zip(words, remedies, strict=True))
