"""What is predicted grows with what takes time; the figures themselves are looked at on a real model."""

import json
from pathlib import Path

import pytest
import tiny_models
from tiny_runs import with_text_repeated
from typer.testing import CliRunner

import gyroquant as gq
from gyroquant.cli import app
from gyroquant.inspection.dry_run import dry_run_job
from gyroquant.inspection.model import inspect_model
from gyroquant.pipeline.folds import measuring_passes
from gyroquant.pipeline.job import Job, prepare
from gyroquant.pipeline.resources import disk, estimate

BRIEF = ["weights.group_size=16", "calibration.nsamples=8", "calibration.seqlen=32"]


def job(folder: Path, corpus: Path, tmp_path: Path, recipe: str, *changes: str) -> Job:
    loaded = gq.load_recipe(recipe, [*BRIEF, *changes])
    return prepare(folder, tmp_path / "out", loaded, corpus, tokenizer=tiny_models.tokenizer())


def test_every_stage_is_told(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    for recipe, names in (
        ("rtn", ["quantize", "save"]),
        ("gyro-w2", ["prove", "allocate", "quantize", "save", "finetune"]),
        ("smoothquant", ["measure", "prove", "quantize", "save"]),
        ("spinquant", ["learn", "prove", "quantize", "save"]),
    ):
        changes = ["weights.allocate.budget=4"] if recipe == "gyro-w2" else []
        made = job(folders["llama"], corpus, tmp_path, recipe, *changes)
        found = dry_run_job(made)
        assert [stage.name for stage in found.stages] == [stage.name for stage in estimate(made).stages] == names
        assert all(stage.seconds is not None and stage.seconds >= 0 for stage in found.stages)
        assert found.peak_memory_bytes == max(stage.peak_memory_bytes for stage in found.stages)
        assert found.seconds == sum(stage.seconds or 0 for stage in found.stages)
        assert (found.disk_bytes, found.scratch_bytes) == disk(made)


def test_hidden_states_that_were_not_measured_are_added(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    peaks = {}
    for rows in (1, 10_000):
        made = job(folders["llama"], corpus, tmp_path, "gptq", "calibration.dtype=float32")
        made = with_text_repeated(made, rows)
        peaks[rows] = {stage.name: stage.peak_memory_bytes for stage in dry_run_job(made).stages}
    size = 10_000 * 8 * 32 * 64 * 4
    for name in ("quantize", "save"):
        assert peaks[10_000][name] - peaks[1][name] == pytest.approx(size, rel=0.15)


def test_a_dry_run_says_what_quantizing_takes(folders: dict[str, Path], corpus: Path) -> None:
    asked = ["inspect", str(folders["llama"]), "--recipe", "gsr", "--set", "weights.group_size=16", "--dry-run"]
    asked += ["--text", str(corpus), "--nsamples", "8", "--seqlen", "32"]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert done.exit_code == 0
    for word in ("prove", "quantize", "save", "whole run", "size of the result", "more during the run"):
        assert word in done.stdout
    assert "sites" not in done.stdout
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False).stdout)
    assert (found["outliers"], found["recipes"]) == ([], {})
    assert found["prediction"]["peak_memory_bytes"] > 10**8
    assert [stage["name"] for stage in found["prediction"]["stages"]] == ["prove", "quantize", "save"]
    with pytest.raises(gq.InputError, match="--recipe"):
        inspect_model(folders["llama"], dry_run=True)


def test_measured_maps_behind_each_other_take_several_passes() -> None:
    assert [measuring_passes(gq.load_recipe(name)) for name in ("quarot", "smoothquant", "perq", "duquant")] == [
        0,
        1,
        1,
        2,
    ]


def test_learning_is_counted_step_by_step(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    for recipe in ("spinquant", "optrot"):
        few, many = (
            dry_run_job(job(folders["llama"], corpus, tmp_path, recipe, f"learn.steps={steps}")).seconds
            for steps in (1, 2000)
        )
        assert many > 10 * few


def test_a_pass_that_measures_is_counted(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    seconds = {}
    for recipe in ("rtn", "smoothquant"):
        made = job(folders["llama"], corpus, tmp_path, recipe, "activations=null")
        if made.tokens is not None:
            made = with_text_repeated(made, 20_000)
        seconds[recipe] = dry_run_job(made).seconds
    assert seconds["smoothquant"] > 5 * seconds["rtn"]
    assert not (tmp_path / "out").exists()
