"""Grids that code rows together, in whole runs: bits for each layer, finetuning, tables and heads, refusals."""

from pathlib import Path

import pytest
import tiny_models
import torch
from selection import some

import gyroquant as gq
from gyroquant.errors import InputError, RecipeError
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model

SHORT = ["calibration.nsamples=8", "calibration.seqlen=32", "proof.seqlen=32"]
TABLE = "embeddings={grid: trellis, bits: 3, sequence: 16, state_bits: 9}"
TILES = ["weights.sequence=16", "weights.state_bits=8", TABLE]


def run(model: str, out: Path, *changes: str) -> PackedStore:
    recipe = gq.load_recipe("gyro-w2x", [*SHORT, *TILES, "head={grid: e8p}", *changes])
    words = tiny_models.tokenizer()
    gq.quantize(tiny_models.build(model), recipe, [tiny_models.prose(3000)], out=out, tokenizer=words)
    store = open_model(out)
    assert isinstance(store, PackedStore)
    return store


@pytest.mark.parametrize("name", some(["llama_tied", "mixtral"], ["mixtral"]))
def test_a_whole_run_comes_back(name: str, tmp_path: Path) -> None:
    allocate = "weights.allocate={budget: 3, bits: [2, 4], nsamples: 2}"
    store = run(name, tmp_path / "out", allocate, "finetune={steps: 2, batch_size: 2, held_out: 2}")
    grids = {store.quantized(key).grid.grid for key in store.description["tensors"]}
    assert grids == ({"trellis"} if name == "llama_tied" else {"trellis", "e8p"})
    assert {store.quantized(key).grid.bits for key in store.description["tensors"]} >= {2, 4}
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    for key in store.description["tensors"]:
        decoded = store.graph.op(key).to_param(store.quantized(key).dequantize())
        assert torch.equal(loaded.get_parameter(key), decoded), key
    assert loaded(tiny_models.tokens(loaded)).logits.isfinite().all()


def test_formats_that_cannot_hold_them_say_so(tmp_path: Path) -> None:
    run("llama", tmp_path / "out", "weights.allocate=null", "finetune=null", "transform.R4=null")
    for kind in ("onnx", "gguf", "mlx", "openvino"):
        with pytest.raises(InputError, match=r"no type for the grid (trellis|e8p)"):
            gq.export(tmp_path / "out", kind, tmp_path / kind)
    assert gq.export(tmp_path / "out", "dense", tmp_path / "dense")["check"]["relative_logit_error"] < 5e-3


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["weights.sequence=48"], r"codes 48 rows together, and .* has (32|64)"),
        (["transform.attn_in={method: awq}"], "awq rounds weights one by one"),
        (["learn={sites: [R1], steps: 2, round_weights: true}"], "set learn.round_weights=false"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(changes: list[str], reason: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=reason):
        run("llama", tmp_path / "out", *changes)
    assert not (tmp_path / "out").exists()


def test_a_size_of_the_file_is_kept(tmp_path: Path) -> None:
    recipe = gq.load_recipe("gyro-w2x", [*SHORT, "weights.sequence=32", "weights.state_bits=8"], "light")
    words, text = tiny_models.tokenizer(), [tiny_models.prose(3000)]
    gq.quantize(tiny_models.build("llama_tied"), recipe, text, out=tmp_path / "out", tokenizer=words, size=30_000)
    store = open_model(tmp_path / "out")
    assert isinstance(store, PackedStore)
    widths = {store.quantized(key).grid.bits for key in store.description["tensors"]}
    assert len(widths) > 1
    assert 29_000 < (tmp_path / "out" / "model.safetensors").stat().st_size - 8 <= 31_000
