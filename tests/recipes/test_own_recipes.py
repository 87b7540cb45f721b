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


def test_a_model_that_does_not_allow_a_map_does_without(corpus: Path, tmp_path: Path) -> None:
    """The norms of Gemma 3 stand between a layer and the sum, so that R1 cannot be fused."""
    model, out = tiny_models.build("gemma3"), tmp_path / "out"
    recipe = gq.load_recipe("gyro-w4", [*SMALL, "weights.group_size=16", "finetune=null"])
    manifest = pipeline.run(prepare(model, out, recipe, corpus, tokenizer=tiny_models.tokenizer()))
    (note,) = manifest["warnings"]
    assert note.startswith("R1 is left out: gemma3_text: ")
    assert manifest["rotation"] == "unrotated"
    assert {site["site"].split(":")[0].split(" ")[0] for site in manifest["sites"]} >= {"R2", "R4"}
    assert manifest["bits"]["embeddings"]["per_weight"] < 7
    with pytest.raises(gq.UnsupportedModelError, match="cannot pass it"):
        prepare(model, out, gq.load_recipe("gsr", SMALL), corpus, tokenizer=tiny_models.tokenizer(), overwrite=True)
    assert gq.load_recipe(recipe.to_dict()) == recipe
    with pytest.raises(gq.RecipeError, match="optional"):
        gq.load_recipe("gyro-w4", ["transform.R1.optional=maybe"])
