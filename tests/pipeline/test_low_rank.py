"""Whole runs with low-rank branches: what is saved, loaded, exported, counted, continued and refused."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from saved_models import logits, written
from tiny_runs import SMALL, run, streamed_logits

import gyroquant as gq
from gyroquant.calibration.stream import Stream
from gyroquant.errors import GyroquantError, InputError, RecipeError, UnsupportedModelError
from gyroquant.formats.base import Format, format_named, requirements_of
from gyroquant.inspection.expected_size import expected_size
from gyroquant.models.execution.low_rank import LowRankBranch
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import quantize_model as blocks
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.export_requirements import check_job
from gyroquant.pipeline.job import Job, prepare

BRANCH = ["weights.bits=2", "weights.low_rank.rank=4"]
ROUNDED_INPUTS = "activations={bits: 4, group_size: -1}"
RUNS = {
    "after": ["weights.low_rank.position=after"],
    "after, corrected": [
        "weights.target={}",
        "weights.refine.passes=1",
        "weights.tune.iters=2",
        "weights.tune.batch_size=2",
    ],
    "inside, qronos": ["weights.low_rank.position=inside", "weights.solver=qronos"],
    "before": ["weights.low_rank={rank: 4, position: before, metric: plain}", "transform.R4.method=hadamard"],
    "arhq": ["weights.low_rank={rank: 4, position: before, metric: activation_residual}", ROUNDED_INPUTS],
    "regression": ["weights.low_rank={rank: 4, metric: output_error}", ROUNDED_INPUTS, "kv_cache={bits: 4}"],
}


def packed(folder: Path) -> PackedStore:
    store = open_model(folder)
    assert isinstance(store, PackedStore)
    return store


@pytest.mark.parametrize("name", RUNS)
def test_what_is_loaded_is_what_was_rounded(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The codes, the branches, and the logits, block by block and from transformers."""
    kept: dict[str, Any] = {}
    original = blocks.quantize_block

    def keep(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        kept.update({name: layer.weight for name, layer in result[0].layers.items()})
        return result

    monkeypatch.setattr(blocks, "quantize_block", keep)
    out = tmp_path / "out"
    manifest: Any = run(folders["llama_bias"], out, "gptq", corpus, *BRANCH, *RUNS[name])
    store = packed(out)
    assert kept.keys() == store.description["tensors"].keys()
    for key, weight in kept.items():
        again = store.quantized(key)
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.merged(), weight.merged())
        assert weight.low_rank.product().any()
    model = gq.load(out, dtype=torch.float32)
    ids = tiny_models.tokens(model)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, streamed_logits(out, ids))
    assert not torch.equal(model.get_parameter(next(iter(kept))), store.quantized(next(iter(kept))).merged())
    with pytest.raises(GyroquantError, match="runs maps or rounding online"):
        model.save_pretrained(tmp_path / "again")
    assert manifest["bits"]["per_weight"] == store.bits_per_weight()


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_conv1d_and_fused_layers_have_branches_too(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    run(folders[name], tmp_path / "out", "gptq", corpus, *BRANCH, save_dtype="float32")
    store, model = packed(tmp_path / "out"), gq.load(tmp_path / "out", dtype=torch.float32)
    ids = tiny_models.tokens(model)
    merged = transformers.AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    with torch.no_grad():
        for key in store.description["tensors"]:
            merged.get_parameter(key).copy_(store.graph.op(key).to_param(store.quantized(key).merged()))
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_the_next_block_is_calibrated_on_what_the_branches_give(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs: list[torch.Tensor] = []
    original = blocks.quantize_block

    def keep(job: Any, index: int, tensors: Any, stream: Any, *args: Any) -> Any:
        inputs.append(stream.hidden.clone())
        return original(job, index, tensors, stream, *args)

    monkeypatch.setattr(blocks, "quantize_block", keep)
    recipe = gq.load_recipe("gptq", [*SMALL, *BRANCH, ROUNDED_INPUTS, "weights.true_sequential=true"])
    out, options = tmp_path / "out", {"tokenizer": tiny_models.tokenizer(), "save_dtype": "float32"}
    job = prepare(folders["llama"], out, recipe, corpus, **options)
    pipeline.run(job)
    store = packed(out)
    assert job.tokens is not None
    stream = Stream(BlockRunner.of(store), job.tokens, store.read(store.graph.outer_params()))
    assert stream.hidden is not None
    assert torch.equal(stream.hidden, inputs[0])
    operations = store.graph.in_block(0, store.online)
    plain = [op for op in operations if not isinstance(op, LowRankBranch)]
    tensors, without = store.read(store.graph.block_params(0)), copy(stream)
    without.hidden = stream.hidden.clone()
    for running, online in ((without, plain), (stream, operations)):
        with attached(store.skeleton(), online):
            running.run(0, tensors)
    torch.testing.assert_close(stream.hidden, inputs[1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without.hidden, inputs[1], atol=1e-2)


def test_a_branch_lowers_the_error_of_every_layer(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    errors = {}
    for name, changes in {
        "none": [],
        "after": BRANCH[1:],
        "inside": [*BRANCH[1:], "weights.low_rank.position=inside"],
    }.items():
        manifest: Any = run(
            folders["llama"], tmp_path / name, "gptq", corpus, "weights.bits=2", "calibration.inputs=original", *changes
        )
        errors[name] = {layer["name"]: layer["output_error"] for layer in manifest["layers"]}
    for name, plain in errors["none"].items():
        assert errors["after"][name] < plain
        assert errors["inside"][name] < plain


@pytest.mark.parametrize("place", ["before", "inside"])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(
    place: str, folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*BRANCH, f"weights.low_rank.position={place}", "weights.target={}"]
    run(folders["llama"], tmp_path / "whole", "gptq", corpus, *changes)
    original = blocks.quantize_block

    def stop(job: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return original(job, index, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(blocks, "quantize_block", stop)
        run(folders["llama"], tmp_path / "stopped", "gptq", corpus, *changes)
    run(folders["llama"], tmp_path / "stopped", "gptq", corpus, *changes)
    one, two = (tmp_path / name for name in ("whole", "stopped"))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert (one / "config.json").read_bytes() == (two / "config.json").read_bytes()


def test_bits_and_bytes_are_counted_and_expected_exactly(corpus: Path, tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    manifests: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    for name, changes in {"plain": BRANCH[:1], "branch": BRANCH}.items():
        job = prepare(
            model,
            tmp_path / name,
            gq.load_recipe("gptq", [*SMALL, *changes]),
            corpus,
            tokenizer=tiny_models.tokenizer(),
        )
        expected[name] = expected_size(Job.begin(job.spec))
        manifests[name] = run(model, tmp_path / name, "gptq", corpus, *changes)["bits"]
    ops = [op for group in job.graph.blocks for op in group.linears]
    more = 16 * 4 * sum(sum(op.matrix_shape) for op in ops)
    stored = manifests["branch"]["stored_bits"]
    assert stored["left"] + stored["right"] == more
    assert manifests["branch"]["bytes"]["total"] - manifests["plain"]["bytes"]["total"] == more // 8
    assert expected["branch"]["bytes"]["total"] - expected["plain"]["bytes"]["total"] == pytest.approx(
        more // 8, abs=len(ops)
    )
    weights = sum(op.numel for op in ops)
    assert manifests["branch"]["per_weight"] - manifests["plain"]["per_weight"] == pytest.approx(more / weights)
    assert expected["branch"]["per_weight"] == pytest.approx(manifests["branch"]["per_weight"], rel=0.01)


def test_a_budget_of_bits_includes_the_branch(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    changes = ["weights.low_rank.rank=2", "weights.allocate={budget: 5.5, nsamples: 1}"]
    for costs in ("measured", "gradient"):
        manifest: Any = run(
            folders["llama"], tmp_path / costs, "gptq", corpus, *changes, f"weights.allocate.costs={costs}"
        )
        assert 4.5 < manifest["bits"]["per_weight"] <= 5.55
    with pytest.raises(RecipeError, match=r"weights.allocate.budget is 3.2"):
        run(folders["llama"], tmp_path / "none", "gptq", corpus, *changes, "weights.allocate.budget=3.2")


def test_plain_numbers_include_the_branch(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """Exported, and written at once: one weight, which needs nothing of ours."""
    out = tmp_path / "out"
    run(folders["llama"], out, "gptq", corpus, *BRANCH, save_dtype="float32")
    written("dense", packed(out), tmp_path / "dense")
    run(folders["llama"], tmp_path / "direct", "gptq", corpus, *BRANCH, save_dtype="float32", dense=True)
    torch.testing.assert_close(logits(tmp_path / "dense"), logits(out), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(tmp_path / "direct"), logits(tmp_path / "dense"))
    exported = gq.export(out, "dense", tmp_path / "exported")
    assert exported["check"]["runtime"] == "transformers"


def test_formats_without_a_place_for_it_refuse_it_by_name(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(folders["llama"], out, "gptq", corpus, *BRANCH)
    needs = requirements_of(packed(out))
    recipe = gq.load_recipe("gptq", [*SMALL, *BRANCH])
    job = prepare(folders["llama"], tmp_path / "job", recipe, corpus, tokenizer=tiny_models.tokenizer())
    for name in Format.registry:
        problems = [text for text in format_named(name).incompatibilities(needs) if "low-rank branch" in text]
        holds = name in ("archive", "dense")
        assert len(problems) == (0 if holds else 1), name
        if not holds:
            with pytest.raises(InputError, match=r"low-rank branch of model.layers.0.*Formats that hold it.*dense"):
                check_job(name, job)
    with pytest.raises(InputError, match="low-rank branch"):
        gq.export(out, "gguf", tmp_path / "gguf", requantize="Q4_K_M")


def test_damaged_branches_are_refused(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(folders["llama"], out, "gptq", corpus, *BRANCH)
    (out / "SHA256SUMS").unlink()
    arrays, config = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    description = config["quantization_config"]
    name = next(iter(description["tensors"]))
    assert description["format_version"] == 5
    assert description["tensors"][name]["low_rank"] == 4
    save_file({key: value for key, value in arrays.items() if key != f"{name}_right"}, out / "model.safetensors")
    with pytest.raises(InputError, match=r"right.*is missing"):
        _ = open_model(out).online
    save_file({**arrays, f"{name}_left": arrays[f"{name}_left"][:-1].clone()}, out / "model.safetensors")
    with pytest.raises(InputError, match="copy the folder again"):
        _ = open_model(out).online
    save_file(arrays, out / "model.safetensors")
    description["tensors"][name]["low_rank"] = 0
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"low_rank is damaged"):
        _ = open_model(out).online


def test_finetuning_leaves_branches_as_they_are(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    changes = ["finetune.steps=2", "finetune.batch_size=2", "finetune.lr=0.01"]
    run(folders["llama"], tmp_path / "before", "gptq", corpus, *BRANCH)
    manifest: Any = run(folders["llama"], tmp_path / "after", "gptq", corpus, *BRANCH, *changes)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert manifest["finetuned"]["kept"]
    assert all(torch.equal(one[key], two[key]) for key in one if key.endswith(("_left", "_right", "_codes")))
    assert any(not torch.equal(one[key], two[key]) for key in one if key.endswith("_scales"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["weights.low_rank={position: before, metric: output_error}"], "position before has none yet"),
        (["weights.low_rank={position: after, metric: activation_residual}", ROUNDED_INPUTS], "position: before"),
        (["weights.low_rank={position: before, metric: activation_residual}"], "give activations"),
        (
            [
                "weights.low_rank={position: before, metric: activation_residual}",
                "activations={bits: 4, calibrate: false}",
            ],
            "calibrate: true",
        ),
        (["weights.low_rank={position: inside}", "weights.solver=rtn"], "the solver rtn does not read them"),
        (
            ["weights.low_rank={metric: plain}", "weights.solver=qronos"],
            "would undo the correction of the solver qronos",
        ),
        (["weights.low_rank={metric: output_error}", "weights.solver=qronos", ROUNDED_INPUTS], "would both correct"),
        (["weights.low_rank={}", "weights.guided={groups: 2}"], "leave one of the two out"),
        (["weights.low_rank={}", "embeddings={bits: 8}"], "embeddings is not one"),
        (["weights.low_rank={}", "head={bits: 8}"], "head is not one"),
        (["weights.low_rank={}", "weights.solver=auto_round"], "leave low_rank out"),
        (["weights.low_rank={rang: 3}"], "rank"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        gq.load_recipe("gptq", changes)


def test_layers_that_cannot_have_a_branch_are_refused_by_name(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    def refused(name: str, *changes: str) -> Any:
        run(folders[name], tmp_path / "out", "gptq", corpus, "weights.low_rank.rank=4", *changes)

    with pytest.raises(UnsupportedModelError, match=r"experts\.\w+ holds stacked experts"):
        refused("mixtral")
    with pytest.raises(RecipeError, match="lm_head is not in one"):
        refused("llama", "weights.ignore=[]")
    with pytest.raises(RecipeError, match=r"rank is 60, and model.layers.0.self_attn.k_proj has only 32 outputs"):
        refused("llama", "weights.low_rank.rank=60")
    change = "weights.low_rank={rank: 4, position: before, metric: activation_residual}"
    with pytest.raises(RecipeError, match=r"activations.ignore leaves those of model.layers.0.mlp.down_proj"):
        refused("llama", change, "activations={bits: 4, ignore: [lm_head, down_proj]}")
    run(folders["mixtral"], tmp_path / "moe", "gptq", corpus, *BRANCH, "weights.ignore=[lm_head, 're:experts']")
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_it_is_written_as_before() -> None:
    assert "low_rank" not in gq.load_recipe("gptq").to_dict()["weights"]
    recipe = gq.load_recipe("gptq", ["weights.low_rank={}"])
    branch = recipe.weights.low_rank
    assert branch is not None
    assert (branch.rank, branch.metric, branch.position, branch.damp_percent) == (16, "hessian", "after", 0.01)
    assert gq.load_recipe(recipe.to_dict()) == recipe
