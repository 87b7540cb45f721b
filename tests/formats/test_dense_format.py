"""Plain checkpoints hold the numbers that gyroquant itself decodes, and open where there is no gyroquant."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import saved_models
import torch
from safetensors.torch import load_file
from saved_models import logits, logits_without_us, our_logits

import gyroquant as gq
from gyroquant.formats.dense import Dense
from gyroquant.formats.export import open_saved
from gyroquant.models.stores.packed import PackedStore
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

ROTATED = {"R1": {"method": "hadamard", "random_signs": True}, "R2": {"method": "hadamard"}}


def rounded(source: Any, out: Path, **settings: Any) -> PackedStore:
    return saved_models.rounded(
        source, out, **{"group_size": 16, "symmetric": False, "save_dtype": "float32"} | settings
    )


written = partial(saved_models.written, "dense")


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "llama_bias", "qwen2", "qwen3", "gemma3", "qwen2_moe", "mixtral", "gpt2"]
)
def test_the_numbers_are_the_ones_we_decode(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    ours = rounded(folders[name], tmp_path / "ours", bits=3)
    facts = written(ours, tmp_path / "dense")
    assert facts == {"dtype": "float32", "largest_relative_deviation": 0.0, "deviation": 0.0}
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert stored.keys() == load_file(folders[name] / "model.safetensors").keys()
    assert torch.equal(logits(tmp_path / "dense"), logits(ours.folder))
    assert not torch.equal(logits(ours.folder), logits(folders[name]))
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in stored)
    for kind in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "dense" / kind).read_text() == (ours.folder / kind).read_text()


def test_what_a_rotation_unties_stays_untied(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = rounded(folders["llama_tied"], tmp_path / "ours", transform=ROTATED)
    written(ours, tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "dense" / "model.safetensors")
    assert torch.equal(logits(tmp_path / "dense"), logits(ours.folder))


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_what_16_bits_cost_is_said(dtype: str, digits: int, folders: dict[str, Path], tmp_path: Path) -> None:
    ours = rounded(folders["llama"], tmp_path / "ours", bits=8, save_dtype=dtype)
    facts = written(ours, tmp_path / "dense")
    assert facts["dtype"] == dtype
    assert 2.0 ** -(digits + 1) < facts["largest_relative_deviation"] <= 2.0**-digits
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == dtype
    assert all(t.dtype == getattr(torch, dtype) for t in load_file(tmp_path / "dense" / "model.safetensors").values())
    assert torch.equal(logits(tmp_path / "dense", dtype=dtype), logits(ours.folder, dtype=dtype))
    assert not torch.equal(logits(tmp_path / "dense"), logits(ours.folder))


def test_rounded_weights_can_be_written_in_fp32(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = rounded(folders["llama"], tmp_path / "ours", bits=8, save_dtype="float16")
    monkeypatch.setattr(Dense, "dtype", torch.float32)
    assert written(ours, tmp_path / "dense")["largest_relative_deviation"] == 0.0
    assert torch.equal(logits(tmp_path / "dense"), logits(ours.folder))


def test_it_opens_where_there_is_no_gyroquant(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = rounded(folders["llama_tied"], tmp_path / "ours", transform=ROTATED, symmetric=True)
    written(ours, tmp_path / "dense")
    ids = [5, 17, 40, 8]
    expected = our_logits(ours.folder, ids)
    torch.testing.assert_close(logits_without_us(tmp_path / "dense", ids), expected, rtol=1e-6, atol=1e-6)


def test_a_model_without_a_tokenizer_is_written_without(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = rounded(folders["llama"], tmp_path / "ours")
    for file in ours.folder.glob("tokenizer*"):
        file.unlink()
    written(ours, tmp_path / "dense")
    assert {file.name for file in (tmp_path / "dense").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_every_grid_is_held(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"weights": {"grid": "fp4", "group_size": 32, "bits": 4, "solver": "rtn"}}
    pipeline.run(prepare(folders["llama"], tmp_path / "ours", recipe, save_dtype="float32"))
    written(open_saved(tmp_path / "ours"), tmp_path / "dense")
    assert torch.equal(logits(tmp_path / "dense"), logits(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ("transform.R4.method=hadamard", "plain safetensors cannot run the online map before"),
        ("activations={bits: 8}", "plain safetensors does not round activations as this recipe does"),
        ("kv_cache={bits: 8}", "plain safetensors does not round the KV cache as this recipe does"),
    ],
)
def test_what_runs_with_a_model_is_refused(
    changes: str, reason: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    small = [
        "weights.group_size=16",
        "weights.scale=minmax",
        "calibration.nsamples=4",
        "calibration.seqlen=16",
        changes,
    ]
    pipeline.run(prepare(folders["llama"], tmp_path / "ours", gq.load_recipe("rtn", small), corpus))
    with pytest.raises(gq.InputError, match=reason):
        written(open_saved(tmp_path / "ours"), tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
