"""Additive codebooks in whole runs: a set for each layer, for all experts, for a table; bits, exports, refusals."""

from pathlib import Path

import pytest
import tiny_models
import torch

import gyroquant as gq
from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import AdditiveGrid
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model

SHORT = ["calibration.nsamples=8", "calibration.seqlen=32", "proof.seqlen=32"]
TABLE = "embeddings={grid: additive, bits: 3, codebook_bits: 8}"


def run(model: str, out: Path, *changes: str) -> PackedStore:
    recipe = gq.load_recipe("aqlm", [*SHORT, *changes], "light")
    words = tiny_models.tokenizer()
    gq.quantize(tiny_models.build(model), recipe, [tiny_models.prose(3000)], out=out, tokenizer=words)
    store = open_model(out)
    assert isinstance(store, PackedStore)
    return store


ALLOCATE = "weights.allocate={budget: 25, bits: [2, 4], nsamples: 2, costs: gradient}"


@pytest.mark.parametrize(
    ("name", "changes", "bits"),
    [
        ("llama_tied", [TABLE, ALLOCATE, "finetune={steps: 2, batch_size: 2, held_out: 2}"], {2, 3, 4}),
        ("mixtral", ["weights.solver=gptq"], {2}),
    ],
)
def test_a_whole_run_comes_back(name: str, changes: list[str], bits: set[int], tmp_path: Path) -> None:
    store = run(name, tmp_path / "out", *changes)
    weights = {key: store.quantized(key) for key in store.description["tensors"]}
    assert {weight.grid.grid for weight in weights.values()} == {"additive"}
    assert {weight.grid.bits for weight in weights.values()} == bits
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    for key, weight in weights.items():
        assert torch.equal(loaded.get_parameter(key), store.graph.op(key).to_param(weight.dequantize())), key
    assert loaded(tiny_models.tokens(loaded)).logits.isfinite().all()


def test_guided_groups_of_rows_share_the_codebooks(tmp_path: Path) -> None:
    store = run("llama", tmp_path / "out", "weights.guided={groups: 2}")
    assert all(store.quantized(key).dequantize().isfinite().all() for key in store.description["tensors"])


def test_every_layer_has_its_own_codebooks_and_formats_that_cannot_hold_them_say_so(tmp_path: Path) -> None:
    store, books = run("llama", tmp_path / "out"), []
    for key in store.description["tensors"]:
        grid = store.quantized(key).grid
        assert isinstance(grid, AdditiveGrid)
        books.append(grid.books)
    assert len(books) == 14
    assert all(not torch.equal(a, b) for i, a in enumerate(books) for b in books[:i])
    for kind in ("compressed-tensors", "executorch", "gguf", "gptq", "mlx", "onnx", "openvino"):
        with pytest.raises(InputError, match="additive"):
            gq.export(tmp_path / "out", kind, tmp_path / kind)
    assert gq.export(tmp_path / "out", "dense", tmp_path / "dense")["check"]["relative_logit_error"] < 5e-3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["transform.attn_in={method: awq}"], "awq scales the weights"),
        (["transform.R1=hadamard", "learn={sites: [R1], steps: 2, round_weights: true}"], "learn.round_weights=false"),
        (["activations={grid: additive}"], "not for activations"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(changes: list[str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=reason):
        run("llama", tmp_path / "out", *changes)
    assert not (tmp_path / "out").exists()
