"""The recipes of our own, whole: every station of theirs in one run, and the result loaded back."""

from pathlib import Path

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

SMALL = ["calibration.nsamples=12", "calibration.seqlen=32", "calibration.dtype=float32", "finetune.steps=4"]
BITS = {"gyro-w2": 2.29, "gyro-w3": 3.29, "gyro-w4": 5.25, "gyro-w4a4kv4": 4.25}  # tiny rows make scales dear


@pytest.mark.parametrize("name", BITS)
def test_it_runs_from_text_to_a_model_that_generates(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    groups = ["weights.group_size=16"] if name == "gyro-w4" else []
    recipe, out = gq.load_recipe(name, [*SMALL, *groups]), tmp_path / "out"
    manifest = pipeline.run(prepare(folders["llama"], out, recipe, corpus, tokenizer=tiny_models.tokenizer()))
    assert 0 < manifest["proof"]["relative_logit_error"] < 1e-5
    assert manifest["bits"]["per_weight"] < BITS[name] + 0.03  # signs of the online map
    assert manifest["warnings"] == []
    assert len(manifest["finetuned"]["losses"]) == 4
    if name in ("gyro-w2", "gyro-w3"):
        given = set(manifest["allocation"]["bits"].values())
        assert len(given) > 1
        assert given <= set(recipe.weights.allocate.bits)
    ids = torch.tensor([[3, 4, 5]])
    made = gq.load(out).generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape[1] > 3
