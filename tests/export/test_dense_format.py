"""Plain checkpoints hold the numbers that gyroquant itself decodes, and open where there is no gyroquant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file

import gyroquant as gq
from gyroquant import pipeline
from gyroquant.export.dense import Dense
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import check_fit, format_named, needs_of
from gyroquant.job import prepare
from gyroquant.models.source import open_model

ROTATED = {"R1": {"method": "hadamard", "random_signs": True}, "R2": {"method": "hadamard"}}
ALONE = """
import json, sys
sys.modules["gyroquant"] = None  # so that importing it raises
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    print(json.dumps(model(torch.tensor([[5, 17, 40, 8]])).logits.flatten().tolist()))
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices as small as these are not worth a second thread, least of all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rounded(
    source: Path, out: Path, *, transform: dict[str, Any] | None = None, corpus: Path | None = None, **weights: Any
) -> Path:
    """A folder as gyroquant writes it: a tiny model rounded to nearest."""
    save_dtype = weights.pop("save_dtype", "float32")
    settings = {"bits": 4, "group_size": 16, "symmetric": False, "scale": "minmax", "solver": "rtn"} | weights
    recipe = {"name": "test", "transform": transform or {}, "weights": settings}
    changes = ["calibration.nsamples=4", "calibration.seqlen=16", "calibration.dtype=float32"]
    pipeline.run(prepare(source, out, gq.load_recipe(recipe, changes), corpus, save_dtype=save_dtype))
    return out


def written(source: Path, out: Path) -> dict[str, Any]:
    """Writes a folder in the format; returns the facts."""
    store, format_ = open_model(source), format_named("dense")
    check_fit(format_, needs_of(store))  # type: ignore[arg-type]
    with OutputFolder(out) as folder:
        facts = format_.write(store, folder)  # type: ignore[arg-type]
        folder.commit()
    return facts


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return model(tiny.tokens(model)).logits


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "llama_bias", "qwen2", "qwen3", "gemma3", "qwen2_moe", "mixtral", "gpt2"]
)
def test_the_numbers_are_the_ones_we_decode(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    ours = rounded(folders[name], tmp_path / "ours", bits=3)
    facts = written(ours, tmp_path / "dense")
    assert facts == {"dtype": "float32", "largest_relative_deviation": 0.0}
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert stored.keys() == load_file(folders[name] / "model.safetensors").keys()
    assert torch.equal(logits(tmp_path / "dense"), logits(ours))
    assert not torch.equal(logits(ours), logits(folders[name]))
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in stored)
    for kind in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "dense" / kind).read_text() == (ours / kind).read_text()


def test_what_a_rotation_unties_stays_untied(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    ours = rounded(folders["llama_tied"], tmp_path / "ours", transform=ROTATED, corpus=corpus)
    written(ours, tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "dense" / "model.safetensors")
    assert torch.equal(logits(tmp_path / "dense"), logits(ours))


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_what_16_bits_cost_is_said(dtype: str, digits: int, folders: dict[str, Path], tmp_path: Path) -> None:
    ours = rounded(folders["llama"], tmp_path / "ours", bits=8, save_dtype=dtype)
    facts = written(ours, tmp_path / "dense")
    assert facts["dtype"] == dtype
    assert 2.0 ** -(digits + 1) < facts["largest_relative_deviation"] <= 2.0**-digits
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["dtype"] == dtype
    assert all(t.dtype == getattr(torch, dtype) for t in load_file(tmp_path / "dense" / "model.safetensors").values())
    assert torch.equal(logits(tmp_path / "dense", getattr(torch, dtype)), logits(ours, getattr(torch, dtype)))
    assert not torch.equal(logits(tmp_path / "dense"), logits(ours))


def test_rounded_weights_can_be_written_in_fp32(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = rounded(folders["llama"], tmp_path / "ours", bits=8, save_dtype="float16")
    monkeypatch.setattr(Dense, "dtype", torch.float32)
    assert written(ours, tmp_path / "dense")["largest_relative_deviation"] == 0.0
    assert torch.equal(logits(tmp_path / "dense"), logits(ours))


def test_it_opens_where_there_is_no_gyroquant(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    ours = rounded(folders["llama_tied"], tmp_path / "ours", transform=ROTATED, corpus=corpus, symmetric=True)
    written(ours, tmp_path / "dense")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "dense")]
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    with torch.no_grad():
        expected = gq.load(ours, dtype=torch.float32)(torch.tensor([[5, 17, 40, 8]])).logits.flatten()
    torch.testing.assert_close(torch.tensor(json.loads(shown)), expected, rtol=1e-6, atol=1e-6)


def test_a_model_without_a_tokenizer_is_written_without(folders: dict[str, Path], tmp_path: Path) -> None:
    ours = rounded(folders["llama"], tmp_path / "ours")
    for file in ours.glob("tokenizer*"):
        file.unlink()
    written(ours, tmp_path / "dense")
    assert {file.name for file in (tmp_path / "dense").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_every_grid_is_held(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = {"grid": "fp4", "group_size": 32, "bits": 4, "solver": "rtn"}
    recipe = gq.load_recipe({"name": "test", "weights": settings})
    pipeline.run(prepare(folders["llama"], tmp_path / "ours", recipe, save_dtype="float32"))
    written(tmp_path / "ours", tmp_path / "dense")
    assert torch.equal(logits(tmp_path / "dense"), logits(tmp_path / "ours"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ("transform.R4.method=hadamard", "plain safetensors has no place for the map that runs in front of"),
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
        written(tmp_path / "ours", tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
