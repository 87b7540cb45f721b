"""Tables of embeddings that are rounded, tied to the head or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from selection import some
from tiny_runs import SMALL, run

import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline import tables
from gyroquant.pipeline.job import prepare
from gyroquant.system.progress import Advance, Progress

TABLE = ("embeddings.bits=8", "embeddings.group_size=16", "keep_ties=true")


def error(model: Any, folder: Path) -> float:
    ids = tiny_models.tokens(model)
    loaded = gq.load(folder, dtype=torch.float32)
    with torch.no_grad():
        expected, logits = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    return float((logits - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", some(["llama_tied", "gpt2", "opt", "granite"], ["llama_tied", "opt"]))
def test_one_table_serves_embedding_and_head_after_a_rotation(name: str, corpus: Path, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    manifest: Any = run(model, tmp_path / "out", "gsr-w4", corpus, "weights.bits=8", *TABLE)
    assert manifest["untied"] == []
    loaded = gq.load(tmp_path / "out")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert error(model, tmp_path / "out") < 0.03
    bits = manifest["bits"]
    assert bits["whole_model"] < 10.5
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    untied: Any = run(model, tmp_path / "untied", "gsr-w4", corpus, "weights.bits=8")
    assert untied["untied"]
    assert stored < sum(path.stat().st_size for path in (tmp_path / "untied").glob("*.safetensors"))


def test_rows_that_r1_does_not_turn_have_a_map_of_their_own(corpus: Path, tmp_path: Path) -> None:
    """Two channels of the table are large. A Hadamard spreads them, so that 4 bits lose less."""
    model, errors = tiny_models.build("gemma3"), {}
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3:5] *= 20
    section = "embeddings={bits: 4, group_size: -1, symmetric: true, scale: mse}"
    for name, step in (("turned", "{method: hadamard, optional: true}"), ("plain", "null")):
        changes = ("weights.bits=8", section, f"transform.embeddings={step}")
        manifest: Any = run(model, tmp_path / name, "gptq-w4", corpus, *changes)
        assert manifest["untied"] == []
        errors[name] = error(model, tmp_path / name)
    loaded = gq.load(tmp_path / "turned")
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert errors["turned"] < 0.6 * errors["plain"]


def test_a_tied_table_is_rounded_for_its_head(corpus: Path, tmp_path: Path) -> None:
    """At few bits, GPTQ on the inputs of the head beats rounding to nearest where it counts."""
    model = tiny_models.build("llama_tied")
    few = ("weights.bits=8", "embeddings.bits=3", "embeddings.group_size=16", "keep_ties=true")
    reports: dict[str, Any] = {}
    for solver in ("gptq", "rtn"):
        manifest: Any = run(model, tmp_path / solver, f"{solver}-w4", corpus, "weights.measure=true", *few)
        reports[solver] = manifest["layers"][-1]
        assert reports[solver]["name"] == "model.embed_tokens"
    assert reports["gptq"]["output_error"] < 0.95 * reports["rtn"]["output_error"]


@pytest.mark.parametrize("grid", ["group_size: 16", "group_size: -1, symmetric: true, midrise: true, scale: mse"])
@pytest.mark.parametrize("name", ["llama_tied", "llama"])
def test_rows_of_zeros_stay_zeros(name: str, grid: str, corpus: Path, tmp_path: Path) -> None:
    """Padding of the vocabulary, and tokens that were added and never trained. Other rows do not suffer from them."""
    model = tiny_models.build(name)
    with torch.no_grad():
        model.get_input_embeddings().weight[90:] = 0
        model.get_input_embeddings().weight[80] *= 100
        model.get_output_embeddings().weight[90:] = 0
    sections = [f"{section}={{bits: 4, {grid}}}" for section in ("embeddings", "head")]
    run(model, tmp_path / "out", "gptq-w4", corpus, *sections, "weights.refine={passes: 2}")
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    for rounded, original in zip(
        (loaded.get_input_embeddings(), loaded.get_output_embeddings()),
        (model.get_input_embeddings(), model.get_output_embeddings()),
        strict=True,
    ):
        assert float(rounded.weight[90:].detach().abs().max()) < 1e-6  # a mid-rise grid has no 0
        assert "midrise" in grid or not rounded.weight[90:].any()
        gap = (rounded.weight[:90] - original.weight[:90]).norm(dim=1) / original.weight[:90].norm(dim=1)
        assert float(gap.detach().max()) < 0.35


def test_a_table_of_its_own_is_rounded_to_nearest(corpus: Path, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    manifest: Any = run(model, tmp_path / "out", "gsr-w4", corpus, "weights.bits=8", *TABLE[:2])
    assert error(model, tmp_path / "out") < 0.03
    assert manifest["bits"]["embeddings"]["weights"] == 96 * 64


def test_what_does_not_fit_is_refused_before_any_work(corpus: Path, tmp_path: Path) -> None:
    model = tiny_models.build("llama_tied")
    with pytest.raises(gq.RecipeError, match="set keep_ties=true"):
        run(model, tmp_path / "out", "gsr-w4", corpus, *TABLE[:2])
    with pytest.raises(gq.GyroquantError, match=r"48.*model\.embed_tokens"):
        run(model, tmp_path / "out", "rtn-w4", corpus, "embeddings.bits=4", "embeddings.group_size=48")
    assert not (tmp_path / "out").exists()


class Counted(Progress):
    """Has the number of steps of each stage as announced, and as done."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.done: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str, steps: int) -> Iterator[Advance]:
        self.steps[name], self.done[name] = steps, 0

        def advance() -> None:
            self.done[name] += 1

        yield advance


@pytest.mark.parametrize("name", ["llama_tied", "llama"])
def test_tables_are_rounded_in_parts(name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is that of a whole table, and progress tells of each part."""
    steps = {}
    for rows in (1 << 20, 32):
        monkeypatch.setattr(tables, "_ROWS", rows)
        progress = Counted()
        loaded = gq.load_recipe("gptq-w4", [*SMALL, *TABLE])
        model, out, tokenizer = tiny_models.build(name), tmp_path / str(rows), tiny_models.tokenizer()
        pipeline.run(prepare(model, out, loaded, corpus, tokenizer=tokenizer), progress)
        assert progress.done == progress.steps
        steps[rows] = progress.steps["quantize"]
    assert steps[32] == steps[1 << 20] + tiny_models.build(name).config.vocab_size // 32 - 1
    whole, parts = (load_file(tmp_path / str(rows) / "model.safetensors") for rows in steps)
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
