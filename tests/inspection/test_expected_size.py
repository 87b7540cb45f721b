"""What is expected of a recipe is what its result takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tiny_runs import SMALL, run
from typer.testing import CliRunner

import gyroquant as gq
from gyroquant.cli import app
from gyroquant.inspection.expected_size import expected_size
from gyroquant.pipeline.job import Job, prepare

TABLE = ("embeddings.bits=8", "embeddings.group_size=16", "keep_ties=true")


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("rtn-w4", ()),
        ("gsr-w2", ()),
        ("gsr-w2", TABLE),
        ("gsr-w2", (*TABLE[:2], "head={bits: 6, group_size: 16}")),
        ("quarot", ()),
        ("gptq-w3", ("weights.symmetric=true",)),
    ],
)
def test_expected_sizes_are_those_of_the_result(
    name: str, recipe: str, changes: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    model = tiny_models.build(name)
    loaded = gq.load_recipe(recipe, [*SMALL, *changes])
    job = prepare(model, tmp_path / "out", loaded, corpus, tokenizer=tiny_models.tokenizer())
    expected = expected_size(Job.begin(job.spec))
    manifest: Any = run(model, tmp_path / "out", recipe, corpus, *changes)
    bits = manifest["bits"]
    for part, size in bits["bytes"].items():
        assert expected["bytes"][part] == pytest.approx(size, rel=0.01), part
    assert expected["bytes"]["head"] == bits["bytes"]["head"]
    assert expected["per_weight"] == pytest.approx(bits["per_weight"], rel=0.01)
    assert expected["whole_model"] == pytest.approx(bits["whole_model"], rel=0.01)


def test_an_allocation_is_expected_to_fill_its_budget(corpus: Path, tmp_path: Path) -> None:
    changes = ("weights.allocate.budget=4", "weights.group_size=16")
    model = tiny_models.build("llama_tied")
    loaded = gq.load_recipe("rtn-w4", [*SMALL, *changes])
    job = prepare(model, tmp_path / "out", loaded, corpus, tokenizer=tiny_models.tokenizer())
    expected = expected_size(Job.begin(job.spec))
    assert expected["per_weight"] == pytest.approx(4, rel=1e-3)
    manifest: Any = run(model, tmp_path / "out", "rtn-w4", corpus, *changes)
    assert manifest["bits"]["per_weight"] == pytest.approx(4, rel=0.1)


def test_maps_that_are_not_chosen_yet_are_named(corpus: Path, tmp_path: Path) -> None:
    loaded = gq.load_recipe("duquant", SMALL)
    model = tiny_models.build("llama")
    job = prepare(model, tmp_path / "out", loaded, corpus, tokenizer=tiny_models.tokenizer())
    assert expected_size(Job.begin(job.spec))["not_counted"] == ["online maps that are chosen from statistics"]


def test_a_dry_run_tells_them(folders: dict[str, Path], corpus: Path) -> None:
    asked = ["inspect", str(folders["llama"]), "--recipe", "rtn", "--set", "weights.group_size=16", "--dry-run"]
    asked += ["--text", str(corpus), "--nsamples", "8", "--seqlen", "32"]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    for word in ("expected", "bits per weight, whole model", "weights in the file", "layers ", "embeddings "):
        assert word in done.stdout, word
    data = json.loads(CliRunner().invoke(app, [*asked, "--json"], catch_exceptions=False).stdout)
    assert set(data["expected"]) == {"per_weight", "whole_model", "bytes", "not_counted"}
    assert data["bytes"]["embeddings"] == 96 * 64 * 4
    assert data["whole_model_bits_per_weight"] == 32
