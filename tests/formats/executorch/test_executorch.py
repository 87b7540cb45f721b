"""What an ExecuTorch checkpoint holds is every code and scale; ExecuTorch's own loader makes the same model of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
import torch
import yaml

import gyroquant as gq
from gyroquant import maps
from gyroquant.formats.base import Layer, ModelRequirements, check_fit, format_named
from gyroquant.formats.executorch.layout import CHECKPOINT, PARAMS, SETTINGS
from gyroquant.formats.executorch.runtime import ExecuTorchRuntime
from gyroquant.formats.export import export
from gyroquant.formats.runtime import open_runtime
from gyroquant.grids import IntegerGrid
from gyroquant.inspection.verify_export import verify_export
from gyroquant.models.execution.online import InputQuantizer, OnlineMap, OnlineOp
from gyroquant.models.graph.sites import HookPoint
from gyroquant.models.stores.packed import PackedStore

ROTATED = {"R1": {"method": "hadamard"}, "R2": {"method": "hadamard"}}
ONLINE = ROTATED | {"R4": {"method": "hadamard"}}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
PARTS = {"q": "wq", "k": "wk", "v": "wv", "o": "wo", "gate": "w1", "down": "w2", "up": "w3"}


def written(store: PackedStore, out: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """Writes a model in the format; returns the facts, the shape of the model and the tensors."""
    facts = saved_models.written("executorch", store, out)
    return facts, json.loads((out / PARAMS).read_text()), torch.load(out / CHECKPOINT, mmap=True)


def meta_name(name: str) -> str:
    """A parameter as Meta names it."""
    if name in NAMES:
        return NAMES[name]
    _, _, block, *module, last, kind = name.split(".")
    part, _, rest = last.partition("_")
    if rest == "proj":
        last = f"{'attention' if module == ['self_attn'] else 'feed_forward'}.{PARTS[part]}"
    elif rest == "norm":
        last = f"attention.{last}_fn"
    else:
        last = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}[last]
    return f"layers.{block}.{last}.{kind}"


def as_hf(tensor: torch.Tensor, name: str, head: int) -> torch.Tensor:
    """Rows in which RoPE's pairs are neighbours, put back so that halves of heads are pairs."""
    if name.split(".")[-2] not in ("q_proj", "k_proj", "q_norm", "k_norm"):
        return tensor
    rows = tensor.unflatten(0, (-1, head))
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], 1).flatten(0, 1)


def check(store: PackedStore, params: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Every number in the checkpoint is that of the store, and there is nothing else."""
    left, group, head = dict(tensors), params["quantization_args"]["group_size"], params["head_dim"]
    for name in store.shapes:
        found = left.pop(meta_name(name))
        if name in store.description["tensors"]:
            module = meta_name(name).removesuffix(".weight")
            scales, zeros = left.pop(f"{module}.scales"), left.pop(f"{module}.zeros")
            assert (found.dtype, scales.dtype, zeros.dtype) == (torch.int8, torch.float32, torch.float32)
            assert int(found.min()) >= -8
            assert int(found.max()) <= 7
            assert not zeros.any()
            assert scales.shape == zeros.shape == (found.shape[0], found.shape[1] // group)
            found = (found.unflatten(1, (-1, group)) * scales[..., None]).flatten(1)
        ours = store.read([name])[name]
        assert torch.equal(as_hf(found.float(), name, head), ours.float()), name
    if "lm_head.weight" not in store.shapes:
        assert torch.equal(left.pop("output.weight"), tensors["tok_embeddings.weight"])
    assert not left


@pytest.mark.parametrize("name", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
def test_every_number_is_there(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    store = saved_models.rounded(folders[name], tmp_path / "ours")
    _, params, tensors = written(store, tmp_path / "x")
    check(store, params, tensors)
    for kind in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "x" / kind).exists()


@pytest.mark.parametrize(("symmetric", "midrise"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_width(bits: int, symmetric: bool, midrise: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    if bits == 4 and (midrise or not symmetric):
        grid = IntegerGrid(bits=bits, group_size=32, symmetric=symmetric, midrise=midrise)
        with pytest.raises(gq.InputError, match="has no type for 4-bit"):
            check_fit(format_named("executorch"), ModelRequirements("llama", (Layer("a", grid, 64),)))
        return
    settings = {"bits": bits, "symmetric": symmetric} | ({"midrise": True} if midrise else {})
    store = saved_models.rounded(folders["llama"], tmp_path / "ours", **settings)
    facts, params, tensors = written(store, tmp_path / "x")
    check(store, params, tensors)
    negative = sum(int((tensor < 0).sum()) for name, tensor in tensors.items() if name.endswith("scales"))
    assert facts.get("negative_scales", 0) == negative
    assert (negative > 0) == (bits == 4), "with fewer bits groups can be turned round"


@pytest.mark.parametrize(("size", "hidden", "ffn", "group"), [(-1, 64, 96, 32), (64, 128, 192, 64), (64, 64, 128, 32)])
def test_groups_are_of_one_size(size: int, hidden: int, ffn: int, group: int, tmp_path: Path) -> None:
    model = tiny_models.build("llama", hidden_size=hidden, intermediate_size=ffn, head_dim=hidden // 4)
    store = saved_models.rounded(model, tmp_path / "ours", group_size=size, bits=3)
    facts, params, tensors = written(store, tmp_path / "x")
    assert facts["group_size"] == params["quantization_args"]["group_size"] == group
    check(store, params, tensors)


def test_the_shape_of_the_model_is_said(tmp_path: Path) -> None:
    model = tiny_models.build("llama", rope_parameters=LLAMA3, max_position_embeddings=16384)
    _, params, _ = written(saved_models.rounded(model, tmp_path / "ours"), tmp_path / "x")
    assert params == {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "hidden_dim": 96,
        "vocab_size": 96,
        "norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "quantization_args": {"group_size": 32},
        "use_scaled_rope": True,
        "rope_scale_factor": 32.0,
        "high_freq_factor": 4.0,
    }
    settings = yaml.safe_load((tmp_path / "x" / SETTINGS).read_text())
    assert settings["quantization"] == {"use_qat": True}
    assert settings["export"]["max_context_length"] == 2048
    assert json.loads(settings["base"]["metadata"]) == {"get_bos_id": 1, "get_eos_ids": [2]}


GRID = IntegerGrid(bits=4, group_size=32, symmetric=True)
DOWN = "model.layers.{}.mlp.down_proj"


def online(*found: maps.Map, at: str = DOWN) -> tuple[OnlineOp, ...]:
    return tuple(OnlineMap(HookPoint("input", at.format(i)), one) for i, one in enumerate(found))


@pytest.mark.parametrize(
    ("attachments", "reason"),
    [
        (online(maps.hadamard(96)), "cannot run the map of 96 before model.layers.0.mlp.down_proj"),
        (online(maps.walsh(128)), "the Hadamard map over the whole input of every down_proj"),
        (online(maps.blocks(maps.hadamard(32), 128)), "without block"),
        (online(maps.hadamard(128)), "every down_proj or before none, not before 1"),
        (online(maps.hadamard(64), at="model.layers.{}.self_attn.o_proj"), "before model.layers.0.self_attn.o_proj"),
        (
            (OnlineMap(HookPoint("qk", "model.layers.0.self_attn"), maps.hadamard(16)),),
            "cannot run the online map .*R3",
        ),
        ((InputQuantizer(HookPoint("input", DOWN.format(0)), GRID),), "set activations=null"),
    ],
)
def test_maps_that_it_does_not_have_are_refused(attachments: tuple[OnlineOp, ...], reason: str) -> None:
    with pytest.raises(gq.InputError, match=reason):
        check_fit(
            format_named("executorch"), ModelRequirements("llama", (), attachments, tiny_models.CONFIGS["llama"]())
        )


def test_the_one_map_that_it_has_is_known_however_it_is_made() -> None:
    whole = online(maps.hadamard(128), maps.product(maps.hadamard(128), maps.Identity(128)))
    assert not format_named("executorch").incompatibilities(
        ModelRequirements("llama", (), whole, tiny_models.CONFIGS["llama"]())
    )


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("llama", {"hidden_act": "relu"}, "the activation relu; it supports silu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "RoPE of type linear",
        ),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor 1, not 2"),
        ("llama_bias", {}, "does not support the biases .attention_bias."),
        ("gpt2", {}, "does not support gpt2"),
    ],
)
def test_models_that_it_runs_otherwise_are_refused(name: str, changes: dict[str, Any], reason: str) -> None:
    config = tiny_models.CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(gq.InputError, match=reason):
        check_fit(format_named("executorch"), ModelRequirements(config.model_type, (), (), config))


def test_one_group_a_row_is_refused() -> None:
    with pytest.raises(gq.InputError, match=r"two groups of 32 in a row, and a has one; add it to weights.ignore"):
        check_fit(format_named("executorch"), ModelRequirements("llama", (Layer("a", GRID, 32),)))


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("name", "transform", "weights", "changes"),
    [
        ("llama", ONLINE, {}, {"intermediate_size": 128}),
        ("llama", ROTATED, {"bits": 2, "midrise": True}, {"rope_parameters": LLAMA3, "max_position_embeddings": 16384}),
        ("llama_tied", None, {"bits": 3, "symmetric": False, "group_size": -1}, {}),
        ("qwen2", ROTATED, {"ignore": []}, {}),
        ("qwen3", ROTATED, {}, {}),
        ("mistral", None, {}, {}),
    ],
)
def test_its_own_loader_sees_the_same_model(
    name: str, transform: Any, weights: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("executorch")
    saved_models.rounded(tiny_models.build(name, **changes), tmp_path / "ours", transform, **weights)
    manifest = export(tmp_path / "ours", "executorch", tmp_path / "x")
    assert manifest["check"]["relative_logit_error"] < 1e-5
    assert manifest["facts"]["online_hadamard"] == (transform is ONLINE)
    ways = verify_export(tmp_path / "x", tmp_path / "ours", tokens=8, window=32)["ways"]
    assert ways["exact"]["relative_logit_error"] < 1e-5
    assert ways["exact"]["greedy_tokens_alike"] == 8
    assert 1e-4 < ways["default"]["relative_logit_error"] < 0.1  # what enters layers is rounded to 8 bits


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_text_too_long_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    store = saved_models.rounded(folders["llama"], tmp_path / "ours")
    saved_models.written("executorch", store, tmp_path / "x")
    runtime = ExecuTorchRuntime(tmp_path / "x", exact=True)
    assert runtime.logits(torch.arange(96)).shape == (96, 96)
    with pytest.raises(gq.InputError, match="made for 128 tokens"):
        runtime.feed(torch.zeros(1, 33, dtype=torch.long))


def test_without_it_installed_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "gyroquant.formats.executorch.loader", None)
    with pytest.raises(gq.InputError, match=r'pip install "gyroquant\[executorch\]"'):
        open_runtime("executorch", tmp_path, exact=True)
