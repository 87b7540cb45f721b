"""From a model's folder to a rounded one and back: what is saved is what was calibrated, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from safetensors.torch import load_file
from selection import some, some_pairs
from tiny_runs import SMALL, run, streamed_logits

import gyroquant as gq
from gyroquant.grids import Grid
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import quantize_model as blocks


@pytest.mark.parametrize("name", some(tiny_models.CONFIGS))
def test_every_architecture_is_rounded_saved_and_loaded(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    changes = ["transform.R1.online=true"] if name in tiny_models.POST_NORM else []
    out = tmp_path / "out"
    manifest = run(folders[name], out, "quarot", corpus, "weights.bits=8", *changes)
    assert manifest["proof"]["relative_logit_error"] < 5e-6
    ids = tiny_models.tokens(tiny_models.build(name))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        original, rounded = tiny_models.build(name)(ids).logits, loaded(ids).logits
        assert float((rounded - original).norm() / original.norm()) < 0.05
        assert torch.equal(rounded, streamed_logits(out, ids))
    assert loaded.generate(ids[:1, :5], min_new_tokens=4, max_new_tokens=4, do_sample=False).shape == (1, 9)


RECIPES = ["rtn", "gptq", "qronos", "gsr", "gh", "bbt-absorbed", "pair-pca"]
PAIRS = [*((recipe, "llama_tied") for recipe in RECIPES), ("gptq", "qwen2_moe"), ("pair-pca", "qwen2_moe")]


@pytest.mark.parametrize(
    ("recipe", "name"), some_pairs(RECIPES, ["llama_tied", "qwen2_moe", "gpt2"], [*PAIRS, ("qronos", "gpt2")])
)
def test_what_is_loaded_is_what_was_rounded(
    name: str, recipe: str, folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights in memory during the run and the ones read back from the files are equal bit for bit."""
    deployed: dict[str, torch.Tensor] = {}
    original = blocks.quantize_block

    def keep(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)  # type: ignore[arg-type]
        deployed.update(result[0].deployed)
        return result

    monkeypatch.setattr(blocks, "quantize_block", keep)
    without = ["transform.R4=null", "transform.qk=null"] if name == "gpt2" else []  # it has neither gate nor RoPE
    run(folders[name], tmp_path / "out", recipe, corpus, "weights.bits=3", *without)
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    assert deployed
    for key, tensor in deployed.items():
        assert torch.equal(loaded.get_parameter(key), tensor.float()), key


ROW, SHORT = ["weights.bits=4", "weights.group_size=-1"], ["weights.state_bits=10", "weights.sequence=16"]
OTHERS = {
    "mxfp4": [],
    "nvfp4": [],
    "if4": [],
    "mxif4": [],
    "fp4": ["weights.group_size=-1"],
    "fp8": ["weights.group_size=32"],
    "e8p": ROW,
    "trellis": [*ROW, *SHORT],
    "additive": [*ROW, "weights.codebook_bits=4"],
}


@pytest.mark.parametrize(
    ("grid", "name"),
    some_pairs(
        OTHERS,
        ["llama_tied", "mixtral", "gpt2"],
        [
            *((grid, "llama_tied") for grid in OTHERS),
            ("nvfp4", "mixtral"),
            ("mxfp4", "gpt2"),
            ("e8p", "gpt2"),
        ],
    ),
)
def test_models_on_other_grids_come_back_bit_for_bit(
    grid: str, name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounded: dict[str, torch.Tensor] = {}
    original = blocks.quantize_block

    def keep(*args: object, **kwargs: object) -> object:
        result = original(*args, **kwargs)  # type: ignore[arg-type]
        rounded.update({name: layer.param for name, layer in result[0].layers.items()})
        return result

    monkeypatch.setattr(blocks, "quantize_block", keep)
    out = tmp_path / "out"
    manifest = run(folders[name], out, "gptq", corpus, f"weights.grid={grid}", *OTHERS[grid])
    loaded = gq.load(out, dtype=torch.float32)
    ids = tiny_models.tokens(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, streamed_logits(out, ids))
    halved = gq.load(out, dtype=torch.bfloat16)  # scales stay what they are, whatever the dtype of the model
    for key, tensor in rounded.items():
        assert torch.equal(loaded.get_parameter(key), tensor), key
        assert torch.equal(halved.get_parameter(key), tensor.bfloat16()), key
    assert all(0 < layer["weight_error"] < 0.05 for layer in manifest["layers"])
    store = open_model(out)
    assert store.bits_per_weight() == manifest["bits"]["per_weight"]
    description = json.loads((out / "config.json").read_text())["quantization_config"]
    for key in description["tensors"]:
        matrix = store.graph.op(key).to_param(store.quantized(key).dequantize())
        assert torch.equal(matrix, rounded[key]), key
    with pytest.raises(KeyError):
        store.quantized("model.norm.weight")
    assert [one["grid"] for one in description["grids"]] == [grid]
    assert description["grids"][0].keys() == set(Grid.registry[grid].model_fields)


@pytest.mark.parametrize(
    ("solver", "name"),
    some_pairs(["rtn", "gptq", "qronos"], ["llama_tied", "gpt_neox"], [("gptq", "llama_tied"), ("qronos", "gpt_neox")]),
)
def test_identity_rotations_give_the_unrotated_codes(
    name: str, solver: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    identity = [f"transform.{site}.method=identity" for site in ("R1", "R2", "R3", "R4")]
    run(folders[name], tmp_path / "plain", solver, corpus)
    run(folders[name], tmp_path / "identity", solver, corpus, *identity)
    plain, rotated = (load_file(tmp_path / which / "model.safetensors") for which in ("plain", "identity"))
    assert plain.keys() == rotated.keys()
    assert all(torch.equal(plain[key], rotated[key]) for key in plain)


def test_lh_and_gsr_are_the_same_under_rtn(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """The order of the columns inside a group changes neither its range nor its error."""
    ids = tiny_models.tokens(tiny_models.build("llama_tied"))
    results = {}
    for recipe in ("lh", "gsr"):
        changes = ["weights.solver=rtn", "weights.scale=minmax", "weights.bits=2"]
        results[recipe] = run(folders["llama_tied"], tmp_path / recipe, recipe, corpus, *changes)
    lh, gsr = (gq.load(tmp_path / which, dtype=torch.float32) for which in ("lh", "gsr"))
    with torch.no_grad():
        assert torch.allclose(lh(ids).logits, gsr(ids).logits, atol=1e-3)
    for a, b in zip(results["lh"]["layers"], results["gsr"]["layers"], strict=True):
        assert a["weight_error"] == pytest.approx(b["weight_error"], rel=1e-4)


def test_calibration_beats_rounding_to_nearest(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    errors = {}
    for recipe in ("rtn", "gptq"):
        run(folders["llama"], tmp_path / recipe, recipe, corpus, "weights.bits=2", "calibration.nsamples=64")
        result = gq.evaluate(tmp_path / recipe, corpus, folders["llama"], window=32)
        errors[recipe] = result["kl"]
    assert errors["gptq"] < 0.8 * errors["rtn"]


def test_the_manifest_explains_the_result(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    manifest = run(folders["llama_tied"], tmp_path / "out", "gsr", corpus, "weights.bits=2")
    assert json.loads((tmp_path / "out" / "gyroquant.json").read_text()) == manifest
    assert manifest["bits"]["per_weight"] == pytest.approx(2 + (16 + 2) / 16)
    assert manifest["untied"] == ["lm_head.weight"]
    assert manifest["recipe"]["name"] == "gsr"
    assert manifest["text"]["name"] == "corpus.txt"
    assert len(manifest["layers"]) == 14
    assert all(0 < layer["output_error"] < 1 for layer in manifest["layers"])
    assert manifest["versions"]["transformers"] == transformers.__version__
    assert list(manifest["stage_seconds"]) == ["compare with transformers", "prove", "quantize", "save"]
    assert 0 < sum(manifest["stage_seconds"].values()) < manifest["seconds"]
    assert manifest["peak_memory_bytes"] > 10**6
    stored = load_file(tmp_path / "out" / "model.safetensors")
    rounded = sum(
        t.numel() * t.element_size() for k, t in stored.items() if k.endswith(("_codes", "_scales", "_zeros"))
    )
    assert rounded * 8 / manifest["bits"]["rounded_weights"] == manifest["bits"]["per_weight"]
    assert open_model(tmp_path / "out").bits_per_weight() == manifest["bits"]["per_weight"]


def test_true_bits_of_other_grids(folders: dict[str, Path], tmp_path: Path) -> None:
    bits = {}
    for grid, changes in OTHERS.items():
        manifest = run(folders["llama"], tmp_path / grid, "rtn", None, f"weights.grid={grid}", *changes)
        bits[grid], weights = manifest["bits"]["per_weight"], manifest["bits"]["rounded_weights"]
    rows = 2 * (3 * 64 + 32 + 32 + 2 * 96)  # of inputs; those of down_proj are 96 long, all others 64
    assert weights == 2 * (64 * (2 * 64 + 2 * 32) + 3 * 64 * 96)
    assert bits == {
        "mxfp4": 4.25,
        "nvfp4": pytest.approx(4.5 + 14 * 32 / weights, abs=1e-12),
        "if4": bits["nvfp4"],
        "mxif4": 4 + 9 / 32,
        "fp4": pytest.approx(4 + 16 * rows / weights, abs=1e-12),
        "fp8": 8.5,
        "e8p": pytest.approx(4 + 16 * rows / weights, abs=1e-12),
        "trellis": pytest.approx(4 + 16 * rows / weights, abs=1e-12),
        "additive": pytest.approx(4 + 16 * (rows + 14 * 8 * 16 * 8) / weights, abs=1e-12),
    }


def test_layers_solved_together_share_the_scale_of_the_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    run(folders["llama"], tmp_path / "out", "rtn", None, "weights.grid=nvfp4")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    q, k, v, o = (stored[f"model.layers.0.self_attn.{name}_proj.weight_global"] for name in "qkvo")
    assert q == k == v != o


def test_online_maps_count_as_bits(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    free = run(folders["llama"], tmp_path / "free", "rtn", corpus, "transform.R4.method=hadamard")
    signs = run(
        folders["llama"],
        tmp_path / "signs",
        "rtn",
        corpus,
        "transform.R4.method=hadamard",
        "transform.R4.random_signs=true",
    )
    assert free["bits"]["stored_bits"].get("maps") is None
    assert signs["bits"]["stored_bits"]["maps"] == 2 * 96 * 8
    assert signs["bits"]["per_weight"] > free["bits"]["per_weight"]


def test_the_same_seed_gives_the_same_bytes(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        run(folders["qwen3_moe"], tmp_path / out, "quarot", corpus, "weights.bits=2")
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two
    run(folders["qwen3_moe"], tmp_path / "three", "quarot", corpus, "weights.bits=2", "seed=1")
    assert (tmp_path / "three" / "model.safetensors").read_bytes() != one


@pytest.mark.parametrize("name", some(["llama_tied", "qwen3_moe", "gpt2"], ["qwen3_moe", "gpt2"]))
def test_dense_output_opens_anywhere(name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """Plain weights under the names of the original checkpoint, and no mention of a quantization."""
    out = tmp_path / "out"
    manifest = run(folders[name], out, "gsr", corpus, "weights.bits=4", dense=True, save_dtype="float32")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    untied = {"lm_head.weight"} if name != "qwen3_moe" else set()
    assert (
        set(load_file(out / "model.safetensors")) - untied
        == set(load_file(folders[name] / "model.safetensors")) - untied
    )
    run(folders[name], tmp_path / "packed", "gsr", corpus, "weights.bits=4", save_dtype="float32")
    ids = tiny_models.tokens(tiny_models.build(name))
    with torch.no_grad():
        dense, packed = (gq.load(place, dtype=torch.float32)(ids).logits for place in (out, tmp_path / "packed"))
    assert torch.equal(dense, packed)
    assert manifest["bits"]["per_weight"] == 32


def test_a_loaded_model_without_online_maps_can_be_saved_plainly(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    run(folders["qwen3_moe"], tmp_path / "out", "gsr", corpus, "weights.bits=3")
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    loaded.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    ids = tiny_models.tokens(loaded)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, loaded(ids).logits)
    run(folders["qwen3_moe"], tmp_path / "online", "quarot", corpus, "weights.bits=3")
    with pytest.raises(gq.GyroquantError, match="online"):
        gq.load(tmp_path / "online").save_pretrained(tmp_path / "refused")


def test_ignored_layers_stay_as_they_are(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    ignore = "weights.ignore=[lm_head, 're:layers.0.*down_proj$', model.layers.1.mlp.gate_proj]"
    run(folders["llama"], tmp_path / "out", "gptq", corpus, ignore, save_dtype="float32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(folders["llama"] / "model.safetensors")
    for key in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.mlp.gate_proj.weight", "lm_head.weight"):
        assert torch.equal(stored[key], original[key])
    assert "model.layers.1.mlp.down_proj.weight_codes" in stored


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "qronos", "gh"])
def test_the_head_can_be_rounded_too(recipe: str, folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = run(folders["llama"], out, recipe, corpus, "weights.ignore=[]", "weights.bits=8")
    assert "lm_head.weight_codes" in load_file(out / "model.safetensors")
    assert manifest["layers"][-1]["name"] == "lm_head"
    assert (manifest["layers"][-1]["output_error"] is None) == (recipe == "rtn")
    assert gq.evaluate(out, corpus, folders["llama"], window=32)["kl"] < 0.01


def test_python_quantize_returns_the_loaded_model(corpus: Path, tokenizer: object) -> None:
    model = tiny_models.build("llama")
    result = gq.quantize(
        model,
        gq.load_recipe("gsr", [*SMALL, "weights.bits=8"]),
        corpus,
        tokenizer=tokenizer,
        options=gq.OutputOptions(save_dtype="float32"),
    )
    ids = tiny_models.tokens(model)
    with torch.no_grad():
        assert float((result(ids).logits - model(ids).logits).norm() / model(ids).logits.norm()) < 0.05
    assert result.gyroquant_manifest["bits"]["per_weight"] == 8 + (16 + 8) / 16


def test_an_expert_without_tokens_is_rounded_to_nearest_with_a_warning(
    folders: dict[str, Path], tmp_path: Path, tokenizer: object
) -> None:
    manifest = run(
        folders["qwen3_moe"], tmp_path / "out", "gptq", ["w1 w2"], "calibration.nsamples=1", "calibration.seqlen=2"
    )
    assert any("no calibration token reached this expert" in text for text in manifest["warnings"])


@pytest.mark.parametrize(
    ("recipe", "changes", "options", "error"),
    [
        (
            "gptq",
            ["weights.group_size=128"],
            {},
            "128 does not divide the 64 inputs of model.layers.0.self_attn.q_proj",
        ),
        ("gptq", ["weights.grid=mxfp4", "weights.bits=2"], {}, "bits: Input should be 4 for grid mxfp4"),
        ("gptq", ["weights.ignore=[nothing_like_it]"], {}, "matches no layer"),
        ("gptq", ["weights.ignore=['re:(']"], {}, "not a regular expression"),
        ("gptq", ["weights.ignore=['re:.*']"], {}, "leaves no layer"),
        ("gptq", ["weights.ignore=[]"], {}, "tied to the embedding"),
        ("quarot", [], {"dense": True}, "--dense cannot keep the online map"),
        ("gsr", ["calibration.seqlen=500"], {}, "longer than the 128 positions"),
        ("gsr", ["calibration.nsamples=100000"], {}, "not for 100000"),
        ("gsr", ["transform.R1.block=7"], {}, "nearest size that does is 8"),
        ("gsr", [], {"save_dtype": "int3"}, "dtype 'int3' is not supported for saving"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(
    recipe: str,
    changes: list[str],
    options: dict[str, object],
    error: str,
    folders: dict[str, Path],
    corpus: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(gq.GyroquantError, match=error):
        run(folders["llama_tied"], tmp_path / "out", recipe, corpus, *changes, **options)
    assert not list(tmp_path.iterdir())


def test_recipes_that_need_text_say_so(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(gq.InputError, match="calibrates on text: give --text"):
        run(folders["llama"], tmp_path / "out", "gptq", None)
    with pytest.raises(gq.InputError, match="is proved on text: give --text"):
        run(folders["llama"], tmp_path / "out", "gsr", None, "weights.solver=rtn")
    run(folders["llama"], tmp_path / "out", "rtn", None)


def test_results_are_not_quantized_again(folders: dict[str, Path], tmp_path: Path, corpus: Path) -> None:
    run(folders["llama"], tmp_path / "out", "rtn", None)
    with pytest.raises(gq.InputError, match="already quantized"):
        run(tmp_path / "out", tmp_path / "again", "rtn", None)


def test_weights_that_fp16_cannot_hold_name_the_remedy(tmp_path: Path, corpus: Path, tokenizer: object) -> None:
    model = tiny_models.build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] = 1e6
    with pytest.raises(gq.InputError, match="--save-dtype bfloat16"):
        run(model, tmp_path / "out", "rtn", None)
    assert not list(tmp_path.iterdir())
    run(model, tmp_path / "out", "rtn", None, save_dtype="bfloat16")
