"""K-quants and IQ types in whole runs: bits for each layer, finetuning, tables, and rows that 256 does not divide."""

import json
from collections import Counter
from pathlib import Path

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.errors import RecipeError
from gyroquant.grids import KQuantGrid, SuperBlockGrid
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model

SHORT = ["calibration.nsamples=8", "calibration.seqlen=32", "proof.seqlen=32"]
ALLOCATE = "weights.allocate={budget: 3.6, bits: [2, 3, 4], nsamples: 2, costs: gradient}"
FINETUNE = "finetune={steps: 2, batch_size: 2, held_out: 2}"


def run(model: torch.nn.Module, out: Path, *changes: str) -> PackedStore:
    recipe = gq.load_recipe("gyro-gguf", [*SHORT, ALLOCATE, FINETUNE, *changes])
    gq.quantize(model, recipe, [tiny_models.prose(3000)], out=out, tokenizer=tiny_models.tokenizer())
    store = open_model(out)
    assert isinstance(store, PackedStore)
    return store


def kinds(store: PackedStore) -> dict[str, str]:
    """The types of llama.cpp, or the kinds of other grids, by the names of the weights."""
    grids = {name: store.quantized(name).grid for name in store.description["tensors"]}
    return {name: g.type_name if isinstance(g, SuperBlockGrid) else g.grid for name, g in grids.items()}


def test_a_whole_run_goes_to_gguf(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    store = run(tiny_models.build("llama_tied", **wide), tmp_path / "out")
    assert len({kind for name, kind in kinds(store).items() if "layers" in name}) > 1
    manifest = gq.export(store.folder, "gguf", tmp_path / "gguf")
    assert manifest["check"]["relative_logit_error"] < 1e-4
    assert "Q6_K" in manifest["facts"]["types"]
    assert "F16" not in manifest["facts"]["types"]


def test_rows_that_do_not_fit_get_the_nearest_grid_that_does(tmp_path: Path) -> None:
    store = run(tiny_models.build("llama_tied", hidden_size=64, intermediate_size=256), tmp_path / "out")
    assert {kind for name, kind in kinds(store).items() if "down_proj" in name} <= {"IQ2_XS", "IQ3_XXS", "IQ4_XS"}
    assert {kind for name, kind in kinds(store).items() if "up_proj" in name} <= {"lookup", "integer"}
    told = json.loads((store.folder / "gyroquant.json").read_text())["warnings"]
    assert any(
        "does not fit rows of 64" in text and "get the nearest that does: lookup, 4 bits" in text for text in told
    )
    check = gq.export(store.folder, "gguf", tmp_path / "gguf")["check"]
    assert check["relative_logit_error"] < 1e-4


def test_rows_that_no_grid_fits_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a super-block of 256 does not divide the 48 inputs of .*q_proj"):
        run(
            tiny_models.build("llama", hidden_size=48, num_attention_heads=4, head_dim=12),
            tmp_path / "out",
            "transform={}",
        )


@pytest.mark.parametrize(
    ("columns", "kinds"), [(576, "integer lookup lookup integer integer"), (96, "lookup lookup lookup integer integer")]
)
def test_the_nearest_grid_is_one_that_gguf_files_hold(columns: int, kinds: str) -> None:
    grids = [KQuantGrid(bits=bits).for_columns(columns) for bits in (2, 3, 4, 5, 6)]
    assert [grid.grid for grid in grids] == kinds.split()
    assert Counter(grid.bits for grid in grids)[8] == 1
    assert KQuantGrid(bits=2).for_columns(512) == KQuantGrid(bits=2)
