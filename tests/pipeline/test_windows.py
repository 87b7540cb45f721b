"""Calibration windows that are chosen by coverage or written by the model: from the recipe to the file."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_injection
import pytest
import tiny_models
import torch
from tiny_runs import SMALL

import gyroquant as gq
from gyroquant.calibration.coverage import channel_peaks, covering_windows, outliers
from gyroquant.calibration.self_text import first_tokens, written_windows
from gyroquant.calibration.text import TokenBatch
from gyroquant.inspection.dry_run import dry_run_job
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare
from gyroquant.pipeline.resources import estimate
from gyroquant.pipeline.stages import windows
from gyroquant.system.progress import Progress

CHOICES = {"coverage": ["calibration.choose=coverage"], "self": ["calibration.source=self"]}


@pytest.fixture
def heavy(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A model with outlier channels: a few channels of the embedding are large, each for some tokens."""
    model = tiny_models.build("llama", num_hidden_layers=1)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        for channel in range(6):
            table[channel :: 31 + channel, 3 + 7 * channel] = 100 + 10 * channel
    folder = tmp_path / "heavy"
    model.save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def job(model: Path, out: Path, choice: str, corpus: Path, *changes: str, recipe: str = "gptq", **options: Any) -> Job:
    loaded = gq.load_recipe(recipe, [*SMALL, *CHOICES[choice], *changes])
    text = corpus if choice == "coverage" else None
    return prepare(model, out, loaded, text, tokenizer=tiny_models.tokenizer(), **options)


def test_coverage_takes_the_windows_that_the_statistics_name(heavy: Path, corpus: Path, tmp_path: Path) -> None:
    made = job(heavy, tmp_path / "out", "coverage", corpus)
    plain = prepare(heavy, tmp_path / "o", gq.load_recipe("gptq", SMALL), corpus, tokenizer=tiny_models.tokenizer())
    assert made.candidates is not None
    assert plain.tokens is not None
    assert len(made.candidates) == 4 * 8
    assert torch.equal(made.candidates[:8], plain.tokens)  # the first ones are those drawn by chance
    tokens, facts = windows.made_windows(made, Progress())
    covers, weights = outliers(channel_peaks(made.store, made.candidates, torch.float32, torch.device("cpu")))
    assert torch.equal(tokens, made.candidates[covering_windows(covers, weights, 8)])
    assert facts["outlier_channels"] == len(weights) > 0
    assert facts["covered"] >= facts["covered_by_chance"]
    assert not torch.equal(tokens, plain.tokens)
    manifest = pipeline.run(made)
    assert manifest["windows"] == facts
    given = gq.load_recipe("gptq", SMALL)
    again = prepare(
        heavy, tmp_path / "given", given, TokenBatch("windows", "", tokens), tokenizer=tiny_models.tokenizer()
    )
    pipeline.run(again)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "given"))
    assert one == two


def test_the_model_writes_its_own_windows(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    made = job(folders["llama"], tmp_path / "out", "self", corpus, "transform.R1.method=hadamard")
    tokens, facts = windows.made_windows(made, Progress())
    model, tokenizer = tiny_models.build("llama").eval(), tiny_models.tokenizer()
    special = sorted(tokenizer.all_special_ids)
    first, seeds = first_tokens(model.config.vocab_size, special, 8, 0)
    assert torch.equal(tokens, written_windows(model, first, seeds, 32, 0, made.bos, special))
    manifest = pipeline.run(made)
    assert manifest["windows"] == facts
    assert manifest["text"] is None
    assert manifest["proof"]["tokens"] == 2 * 32
    other = job(folders["llama"], tmp_path / "other", "self", corpus, "calibration.seed=5")
    assert not torch.equal(windows.made_windows(other, Progress())[0], tokens)
    checked = gq.verify(tmp_path / "out", proof=True, against=folders["llama"])
    assert checked["problems"] == []


@pytest.mark.parametrize("choice", CHOICES)
def test_a_killed_run_ends_with_the_same_bytes(
    choice: str, heavy: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the second part: the first two are not made again."""
    monkeypatch.setattr(windows, "AT_ONCE", 2)
    name = "channel_peaks" if choice == "coverage" else "written_windows"
    real, calls, limit = getattr(windows, name), itertools.count(), [2]

    def dying(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(calls) == limit[0]:
            raise KeyboardInterrupt
        result: torch.Tensor = real(*args, **kwargs)
        return result

    pipeline.run(job(heavy, tmp_path / "whole", choice, corpus))
    monkeypatch.setattr(windows, name, dying)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(job(heavy, tmp_path / "out", choice, corpus))
    limit[0] = -1
    before = next(calls)
    pipeline.run(job(heavy, tmp_path / "out", choice, corpus))
    assert next(calls) - before - 1 == 4 - 2
    whole, out = (fault_injection.content(tmp_path / folder) for folder in ("whole", "out"))
    assert whole == out


@pytest.mark.parametrize("choice", CHOICES)
def test_the_dry_run_and_the_memory_check_know_the_stage(
    choice: str, heavy: Path, corpus: Path, tmp_path: Path
) -> None:
    made = job(heavy, tmp_path / "out", choice, corpus)
    needed = {stage.name: stage.peak_memory_bytes for stage in estimate(made).stages}
    measured = {stage.name: stage.seconds for stage in dry_run_job(made).stages}
    assert needed["windows"] > 0
    assert (measured["windows"] or 0) > 0
    assert made.state.tokens is None


REFUSED: list[tuple[list[str], Any, Any, str]] = [
    (["calibration.source=self"], "text", "tokenizer", r"source=self the model writes .* corpus.txt is given"),
    (["calibration.source=self"], None, None, "source=self needs the model's tokenizer"),
    (["calibration.choose=coverage"], "tokens", "tokenizer", "choose=coverage .* given as windows of tokens"),
    (
        ["calibration.choose=coverage", "calibration.candidates=4000"],
        "text",
        "tokenizer",
        r"among 4000 times 8 windows, and corpus.txt has only \d+ of 32 tokens: .* lower calibration.candidates",
    ),
]


@pytest.mark.parametrize(("changes", "text", "tokenizer", "reason"), REFUSED, ids=lambda case: str(case)[:30])
def test_what_cannot_be_is_refused_before_any_work(
    changes: list[str], text: Any, tokenizer: Any, reason: str, corpus: Path, tmp_path: Path
) -> None:
    given = {"text": corpus, "tokens": TokenBatch("the ids", "", torch.ones(8, 32, dtype=torch.long)), None: None}[text]
    folder = tmp_path / "model"
    tiny_models.build("llama").save_pretrained(folder)
    recipe = gq.load_recipe("gptq", [*SMALL, *changes])
    with pytest.raises(gq.InputError, match=reason):
        prepare(folder, tmp_path / "out", recipe, given, tokenizer=tokenizer and tiny_models.tokenizer())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["calibration.source=self", "calibration.choose=coverage"], "choose: coverage needs a text"),
        (["calibration.source=self", "calibration.text=a.txt"], "the model writes the text: leave text out"),
        (["calibration.candidates=8"], "candidates is for choose: coverage"),
        (["calibration.choose=cover"], "coverage"),
    ],
)
def test_contradictions_are_refused(changes: list[str], reason: str) -> None:
    with pytest.raises(gq.RecipeError, match=reason):
        gq.load_recipe("gptq", changes)


@pytest.mark.parametrize("choice", CHOICES)
def test_models_in_memory_are_refused_by_name(choice: str) -> None:
    with pytest.raises(
        gq.InputError, match=r"transform\(\.\.\.\) draws windows .* set calibration\.(choose|source) to"
    ):
        gq.transform(tiny_models.build("llama"), gq.load_recipe("gsr", CHOICES[choice]))


def test_defaults_are_left_out_of_a_recipe() -> None:
    new = {"source", "choose", "candidates"}
    assert not new & gq.load_recipe("gptq").to_dict()["calibration"].keys()
    changed: Callable[[str], Any] = lambda choice: gq.load_recipe("gptq", CHOICES[choice])  # noqa: E731
    for choice in CHOICES:
        assert gq.load_recipe(changed(choice).to_dict()) == changed(choice)


def test_recipes_that_need_no_text_write_none(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    made = job(folders["llama"], tmp_path / "out", "self", corpus, recipe="rtn")
    assert made.tokens is None
    assert "windows" not in pipeline.run(made)
