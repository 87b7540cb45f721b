"""What runs share is what each would have made for itself."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import gyroquant as gq
from gyroquant.benchmark.shared_measurements import (
    SharedMeasurements,
    brief,
    measured,
    own_grid,
    plain_folder,
    read_tokens,
)
from gyroquant.benchmark.texts import EvaluationText, Texts, read_texts
from gyroquant.evaluation.perplexity import last_hidden
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.fingerprint import fingerprint
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.system.progress import Progress


def texts(store: WeightStore, corpus: Path, windows: int = 2) -> Texts:
    return read_texts(store, corpus, {"test": EvaluationText(str(corpus), 32, windows)})


def test_what_is_drawn_is_kept_to_six_digits() -> None:
    data = {"name": "1.23456789", "block": 1234567, "mass": {"16": (1.23456789, 0.0)}, "decibels": None}
    brief_one = {"name": "1.23456789", "block": 1234567, "mass": {"16": [1.23457, 0.0]}, "decibels": None}
    assert brief([data]) == [brief_one]


def test_calibration_tokens_are_those_that_a_run_takes_from_the_text(
    tmp_path: Path, folders: dict[str, Path], corpus: Path
) -> None:
    store = open_model(folders["llama"])
    text = texts(store, corpus).calibration
    batch = read_tokens(SharedMeasurements(tmp_path / "shared", store, "float32").calibration(text, 8, 32, 0))
    recipe = gq.load_recipe("gptq", ["calibration.nsamples=5", "calibration.seqlen=32", "weights.group_size=16"])
    job = prepare(folders["llama"], tmp_path / "a", recipe, corpus)
    again = prepare(folders["llama"], tmp_path / "b", recipe, batch)
    assert job.tokens is not None
    assert torch.equal(job.tokens, again.tokens)
    assert (again.text.name, again.text.sha256) == (job.text.name, job.text.sha256)
    with pytest.raises(gq.InputError, match="8 windows of 32 tokens, not as 9 windows of 32"):
        batch.take(9, 32)


def test_everybody_calibrates_on_windows_that_begin_with_bos(
    tmp_path: Path, folders: dict[str, Path], corpus: Path
) -> None:
    """The file that other programs read holds the windows which a run of ours takes from the text."""
    folder = tmp_path / "model"
    shutil.copytree(folders["llama"], folder)
    tiny_models.beginning().save_pretrained(folder)
    store = open_model(folder)
    file = SharedMeasurements(tmp_path / "shared", store, "float32").calibration(
        texts(store, corpus).calibration, 5, 32, 0
    )
    recipe = gq.load_recipe("gptq", ["calibration.nsamples=5", "calibration.seqlen=32", "weights.group_size=16"])
    job = prepare(folder, tmp_path / "a", recipe, corpus)
    assert torch.equal(load_file(file)["tokens"], job.tokens)
    assert job.tokens is not None
    assert job.tokens[:, 0].eq(1).all()
    assert read_tokens(file).bos == job.bos == (1,)
    test = SharedMeasurements(tmp_path / "shared", store, "float32").test(
        texts(store, corpus, 5).tests["test"], Progress()
    )
    wanted = gq.evaluate(folder, corpus, window=32, windows=5)
    assert measured(store, None, test, "float32")["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


def test_a_measurement_is_that_of_evaluate(tmp_path: Path, folders: dict[str, Path], corpus: Path) -> None:
    store, other = open_model(folders["llama"]), open_model(tiny_models.build("llama", seed=3))
    shared = SharedMeasurements(tmp_path / "shared", store, "float32")
    batch = texts(store, corpus, 5).tests["test"]
    file = shared.test(batch, Progress())
    found = measured(other, store, file, "float32")
    wanted = gq.evaluate(other.model, corpus, store.folder, window=32, windows=5, tokenizer=store.tokenizer())
    for key in ("perplexity", "kl", "top1_agreement"):
        assert found[key] == pytest.approx(wanted[key], rel=1e-6)
    assert sum(found["window_losses"]) / 5 == pytest.approx(wanted["loss"], rel=1e-6)
    assert len(found["window_kl"]) == 5
    file.touch()
    stamp = file.stat().st_mtime_ns
    assert shared.test(batch, Progress()) == file
    assert file.stat().st_mtime_ns == stamp
    assert shared.test(replace(batch, ids=batch.ids.flip(0)), Progress()) != file


def test_known_hidden_states_are_really_used(folders: dict[str, Path], tmp_path: Path, corpus: Path) -> None:
    store = open_model(folders["llama"])
    shared = SharedMeasurements(tmp_path, store, "float32")
    file = shared.test(texts(store, corpus).tests["test"], Progress())
    ids = tiny_models.tokens(store.skeleton(), 2, 32)
    save_file({"ids": ids, "hidden": last_hidden(store, ids).flip(0).contiguous()}, file)
    assert measured(open_model(folders["llama"]), store, file, "float32")["kl"] > 0.01  # those of the other window


def test_a_fingerprint_is_of_the_weights_not_of_the_files(tmp_path: Path, folders: dict[str, Path]) -> None:
    here = fingerprint(open_model(folders["llama"]))
    model = tiny_models.build("llama")
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert fingerprint(open_model(tmp_path / "again")) == here
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    assert fingerprint(open_model(model)) != here


def test_weights_on_a_coarse_grid_are_told(folders: dict[str, Path]) -> None:
    assert own_grid(open_model(folders["llama"])) == []
    model = tiny_models.build("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (p for p in layer.parameters() if p.dim() == 2):
                groups = weight.view(-1, 32)
                step = groups.abs().amax(1, keepdim=True) / 7
                weight.copy_(((groups / step).round() * step).view_as(weight))
    (note,) = own_grid(open_model(model))
    assert "rounding to 4 bits in groups of 32 costs it nothing" in note


def test_a_gguf_file_becomes_a_folder_that_others_open(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert plain_folder(SharedMeasurements(tmp_path, open_model(folders["llama"]), "float32")) == folders["llama"]
    model = tiny_models.build("llama_tied")
    recipe = gq.load_recipe("rtn", ["weights.bits=8", "weights.group_size=32", "weights.symmetric=true"])
    model.save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    pipeline.run(prepare(tmp_path / "model", tmp_path / "out", recipe))
    gq.export(tmp_path / "out", "gguf", tmp_path / "gguf", check=False)
    store = open_model(tmp_path / "gguf" / "model.gguf")
    monkeypatch.setattr(store, "tokenizer", tiny_models.tokenizer)  # GGUF has no name for the tiny one
    made = plain_folder(SharedMeasurements(tmp_path / "shared", store, "float32"))
    assert fingerprint(open_model(made)) == fingerprint(store)
    assert open_model(made).tied == store.tied
