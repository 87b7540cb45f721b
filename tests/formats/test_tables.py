"""Exports hold rounded embeddings and heads in their own types, or as plain numbers that they name with their cost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf_reading
import pytest
import saved_models
import tiny_models
import torch
from safetensors.torch import load_file

import gyroquant as gq
from gyroquant.formats.base import Layer, ModelRequirements, check_fit, format_named, requirements_of
from gyroquant.formats.dense import Dense
from gyroquant.formats.export import export, formats
from gyroquant.formats.ties import without_ties
from gyroquant.grids import IntegerGrid
from gyroquant.models.stores.packed import PackedStore
from gyroquant.pipeline.export_requirements import check_job
from gyroquant.pipeline.job import prepare

IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q5_0": 6, "Q8_0": 8, "Q2_0": 42}
TABLE = "model.embed_tokens.weight"
R1 = {"R1": {"method": "hadamard"}}


def table(bits: int, group_size: int, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    """The section of a recipe that rounds the embeddings."""
    return {"embeddings": {"bits": bits, "group_size": group_size, "symmetric": symmetric} | more}


def in_gguf(store: PackedStore, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Exports to GGUF, checked by a program. Returns the manifest and the tensors in the file."""
    manifest = export(store.folder, "gguf", out)
    return manifest, gguf_reading.read_back(out / "model.gguf")[1]


@pytest.mark.parametrize(
    ("grid", "kind"),
    [
        (table(2, 64), "Q2_0"),
        (table(3, 32, False), "Q4_0"),
        (table(4, 32), "Q4_0"),
        (table(4, -1, midrise=True), "Q5_0"),
        (table(5, 32), "Q5_0"),
        (table(6, -1, False), "Q8_0"),
        (table(8, 32), "Q8_0"),
    ],
)
def test_gguf_holds_the_codes_of_a_tied_table(grid: dict[str, Any], kind: str, tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("llama_tied"), tmp_path / "ours", more=grid)
    manifest, tensors = in_gguf(store, tmp_path / "gguf")
    number, values = tensors["token_embd.weight"]
    assert number == IDS[kind]
    assert (values == store.read([TABLE])[TABLE].numpy()).all()
    assert "output.weight" not in tensors  # tied, as llama.cpp reads it
    assert "decoded" not in manifest["facts"]
    assert manifest["check"]["relative_logit_error"] < 1e-5


@pytest.mark.parametrize("grid", [table(8, 32, False), table(4, 16)], ids=["8 bits asymmetric", "groups of 16"])
def test_a_table_that_no_type_holds_is_decoded_and_named(grid: dict[str, Any], tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("llama_tied"), tmp_path / "ours", more=grid)
    manifest, tensors = in_gguf(store, tmp_path / "gguf")
    number, values = tensors["token_embd.weight"]
    exact = store.read([TABLE])[TABLE]
    assert number == IDS["F16"]
    assert (values == exact.half().float().numpy()).all()
    said = manifest["facts"]["decoded"][TABLE]
    packed = 96 * (64 + 2 * 3) if grid == table(8, 32, False) else 96 * (32 + 2 * 4)
    assert said.startswith(f"as F16, {2 * 96 * 64} bytes in place of {packed}: GGUF (llama.cpp) has no type for ")
    error = float((exact.half().float() - exact).abs().max() / exact.abs().max())
    assert manifest["facts"]["deviation"] == pytest.approx(error)
    assert torch.equal(format_named("gguf").weight_in_file(store, TABLE), torch.from_numpy(values))


def test_a_layer_in_a_block_that_no_type_holds_is_refused() -> None:
    layer = Layer("model.layers.0.mlp.up_proj.weight", IntegerGrid(bits=4, group_size=16), 64)
    with pytest.raises(gq.InputError, match="has no type for 4-bit asymmetric weights in groups of 16"):
        check_fit(format_named("gguf"), ModelRequirements("llama", (layer,)))


def test_gguf_holds_a_rounded_head_of_its_own(tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_models.build("llama"), tmp_path / "ours", ignore=[], more=table(8, 32))
    manifest, tensors = in_gguf(store, tmp_path / "gguf")
    assert tensors["output.weight"][0] == IDS["Q4_0"]
    assert tensors["token_embd.weight"][0] == IDS["Q8_0"]
    assert (tensors["output.weight"][1] == store.read(["lm_head.weight"])["lm_head.weight"].numpy()).all()
    assert manifest["facts"]["types"] == {"Q4_0": 15, "F32": 5, "Q8_0": 1}
    assert manifest["check"]["relative_logit_error"] < 1e-5


@pytest.mark.parametrize("grid", [table(8, 32), table(4, -1, False)], ids=["groups", "one group a row"])
def test_rows_of_zeros_stay_zeros(grid: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_models.build("llama_tied")
    with torch.no_grad():
        model.get_input_embeddings().weight[90:] = 0
    store = saved_models.rounded(model, tmp_path / "ours", more=grid)
    assert not in_gguf(store, tmp_path / "gguf")[1]["token_embd.weight"][1][90:].any()
    export(store.folder, "compressed-tensors", tmp_path / "ct")
    assert not load_file(tmp_path / "ct" / "model.safetensors")[TABLE][90:].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_packs_the_head_and_decodes_the_table(symmetric: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = tiny_models.build("llama")
    store = saved_models.rounded(
        model, tmp_path / "ours", ignore=[], symmetric=symmetric, save_dtype="float16", more=table(8, 32)
    )
    manifest = export(store.folder, "compressed-tensors", tmp_path / "ct")
    stored = load_file(tmp_path / "ct" / "model.safetensors")
    assert "lm_head.weight_packed" in stored
    assert "lm_head.weight" not in stored
    assert torch.equal(stored[TABLE], store.read([TABLE])[TABLE].half())
    said = manifest["facts"]["decoded"][TABLE]
    assert said.startswith(f"as float16, {2 * 96 * 64} bytes in place of {96 * (64 + 2 * 2)}: ")
    assert manifest["check"]["relative_logit_error"] < 2e-3


@pytest.mark.parametrize(
    ("weights", "head", "reason"),
    [
        ({"symmetric": False}, {"symmetric": True}, "as if it had the grid of the layers in the blocks"),
        ({"symmetric": True}, {"symmetric": False}, "cannot open an asymmetric grid next to a symmetric one"),
    ],
)
def test_a_head_that_transformers_would_misread_is_decoded(
    weights: dict[str, Any], head: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    overrides = [{"layers": ["lm_head"]} | head]
    store = saved_models.rounded(tiny_models.build("llama"), tmp_path / "o", ignore=[], overrides=overrides, **weights)
    manifest = export(store.folder, "compressed-tensors", tmp_path / "ct")
    assert reason in manifest["facts"]["decoded"]["lm_head.weight"]
    assert manifest["check"]["relative_logit_error"] < 2e-3


def test_gptq_decodes_embeddings_and_heads(tmp_path: Path) -> None:
    store = saved_models.rounded(
        tiny_models.build("llama"), tmp_path / "ours", ignore=[], save_dtype="float16", more=table(5, 16)
    )
    manifest = export(store.folder, "gptq", tmp_path / "gptq")
    stored = load_file(tmp_path / "gptq" / "model.safetensors")
    for name in (TABLE, "lm_head.weight"):
        assert torch.equal(stored[name], store.read([name])[name].half())
        assert "in the blocks only" in manifest["facts"]["decoded"][name]
    assert not any(name.startswith("lm_head.q") for name in stored)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackedStore]:
    """Models with tied heads under a fused R1: with a norm without and with biases, and with multipliers."""
    root, more = tmp_path_factory.mktemp("kept"), table(8, 32) | {"keep_ties": True}
    return {
        name: saved_models.rounded(tiny_models.build(name), root / name, R1, save_dtype="float16", more=more)
        for name in ("llama_tied", "gpt2", "granite")
    }


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "granite"])
def test_a_kept_tie_becomes_a_head_of_its_own(name: str, kept: dict[str, PackedStore], tmp_path: Path) -> None:
    store = kept[name]
    assert len(requirements_of(store).tie_points) == len(store.online) == 2
    untied = without_ties(store, requirements_of(store).tie_points)
    head = untied.graph.outer.linears[-1].weight
    assert untied.online == ()
    assert not untied.tied
    assert untied.shapes.keys() == {*store.shapes, head}
    manifest, tensors = in_gguf(store, tmp_path / "gguf")
    rows, columns = untied.shapes[head]
    assert tensors["output.weight"][0] == IDS["F16"]
    assert tensors["token_embd.weight"][0] == IDS["Q8_0"]
    assert manifest["facts"]["untied"] == f"{head} in 16 bits, {2 * rows * columns} bytes"
    assert 0 < manifest["facts"]["deviation"] < 2.0**-11
    assert manifest["check"]["relative_logit_error"] < 1e-3


def test_a_head_that_fp16_cannot_hold_is_fp32(tmp_path: Path) -> None:
    model = tiny_models.build("llama_tied")
    with torch.no_grad():
        model.model.norm.weight.fill_(3e7)
    more = table(8, 32) | {"keep_ties": True}
    store = saved_models.rounded(model, tmp_path / "ours", R1, save_dtype="float32", more=more)
    manifest, tensors = in_gguf(store, tmp_path / "gguf")
    assert tensors["output.weight"][0] == IDS["F32"]
    assert manifest["facts"]["untied"] == f"lm_head.weight in 32 bits, {4 * 96 * 64} bytes"
    assert manifest["check"]["relative_logit_error"] < 1e-5


def test_the_decoder_of_a_model_that_takes_images_is_untied(tmp_path: Path) -> None:
    more = table(8, 32) | {"keep_ties": True}
    store = saved_models.rounded(tiny_models.build("mistral3"), tmp_path / "ours", R1, save_dtype="float16", more=more)
    manifest = export(store.folder, "dense", tmp_path / "dense")
    assert manifest["facts"]["untied"].startswith("lm_head.weight")
    assert manifest["check"]["relative_logit_error"] < 2e-3


@pytest.mark.parametrize("name", ["llama_tied", "mistral3"])
def test_a_quantization_may_ask_for_an_export_that_unties(name: str, tmp_path: Path) -> None:
    chosen = saved_models.recipe(R1) | table(8, 32) | {"keep_ties": True}
    model, text = tiny_models.build(name), [tiny_models.prose(3000)]
    job = prepare(model, tmp_path / "ours", chosen, text, tokenizer=tiny_models.tokenizer())
    check_job("dense", job)
    with pytest.raises(gq.InputError, match=r"does not support|cannot hold the rounded embedding"):
        check_job("executorch", job)


@pytest.mark.parametrize("format_name", ["dense", "compressed-tensors"])
def test_checkpoints_untie_too(format_name: str, kept: dict[str, PackedStore], tmp_path: Path) -> None:
    manifest = export(kept["llama_tied"].folder, format_name, tmp_path / "x")
    stored = load_file(tmp_path / "x" / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.float16
    assert manifest["facts"]["untied"].startswith("lm_head.weight in 16 bits")
    assert manifest["check"]["relative_logit_error"] < 2e-3


class Tied(Dense, variant=True):
    """A format without a place for another head."""

    capabilities = replace(Dense.capabilities, unties=False)


def test_a_refusal_names_formats_that_change_nothing(kept: dict[str, PackedStore]) -> None:
    with pytest.raises(gq.InputError, match=r"Formats that hold it as it is: onnx, openvino\."):
        check_fit(Tied(), requirements_of(kept["llama_tied"]))


def test_the_list_of_formats_says_what_would_change(kept: dict[str, PackedStore]) -> None:
    entries = {entry["format"]: entry for entry in formats(kept["llama_tied"].folder)}
    (untied,) = entries["gguf"]["changes"]
    assert untied.startswith("the tied head becomes a matrix of its own, in 16 bits")
    decoded, also_untied = entries["gptq"]["changes"]
    assert decoded.startswith("model.embed_tokens.weight becomes plain numbers (readers of a GPTQ checkpoint expect")
    assert also_untied == untied
    assert entries["openvino"]["changes"] == []


def test_what_cannot_be_untied_is_refused(kept: dict[str, PackedStore], tmp_path: Path) -> None:
    (reason,) = Tied().incompatibilities(requirements_of(kept["llama_tied"]))
    assert reason.endswith("cannot run the online map before model.norm; set keep_ties=false")
    more = table(8, 32) | {"keep_ties": True}
    model = tiny_models.build("cohere", tie_word_embeddings=True)
    store = saved_models.rounded(model, tmp_path / "ours", R1, more=more)
    with pytest.raises(gq.InputError, match=r"takes the embedding as the head of cohere.*leave R1 out"):
        export(store.folder, "gguf", tmp_path / "gguf")
