"""What a GPTQ checkpoint holds, unpacked here by the published layout, is every code, zero point and scale."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_models
import tiny_models
import torch
from safetensors.torch import load_file

import gyroquant as gq
from gyroquant import maps
from gyroquant.formats.base import Layer, ModelRequirements, check_fit, format_named
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import Fp4Grid, IntegerGrid
from gyroquant.models.execution.online import InputQuantizer, OnlineMap, OnlineOp
from gyroquant.models.graph.sites import HookPoint
from gyroquant.models.stores.packed import PackedStore

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rounded(source: Any, out: Path, **settings: Any) -> PackedStore:
    return saved_models.rounded(source, out, **{"group_size": 16, "symmetric": False} | settings)


def written(store: PackedStore, out: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """Writes a model in the format; returns the facts, the quantization's configuration and the tensors."""
    facts = saved_models.written("gptq", store, out)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    return facts, config, load_file(out / "model.safetensors")


def unpacked(words: torch.Tensor, bits: int) -> np.ndarray:
    """Numbers packed down the columns of 32-bit words, shape (words, n), as the layout is published: 32 / bits of them
    in each word, for 3 bits 32 in three words, of which the eleventh and the twenty-second lie across two.
    """
    rows = words.numpy().view(np.uint32).astype(np.int64)
    if bits != 3:
        return np.stack([(row >> shift) & (2**bits - 1) for row in rows for shift in range(0, 32, bits)])
    found: list[np.ndarray] = []
    for first, second, third in zip(rows[0::3], rows[1::3], rows[2::3], strict=True):
        found += [(first >> shift) & 7 for shift in range(0, 30, 3)]
        found.append((first >> 30) | ((second & 1) << 2))
        found += [(second >> shift) & 7 for shift in range(1, 31, 3)]
        found.append((second >> 31) | ((third & 3) << 1))
        found += [(third >> shift) & 7 for shift in range(2, 32, 3)]
    return np.stack(found)


def check(store: PackedStore, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Everything in the checkpoint is what the store has, and there is nothing else."""
    plain = dict(tensors)
    for name in store.description["tensors"]:
        weight, module = store.quantized(name), name.removesuffix(".weight")
        parts = {part: plain.pop(f"{module}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert {part: tensor.dtype for part, tensor in parts.items()} == {
            "qweight": torch.int32,
            "qzeros": torch.int32,
            "scales": torch.float16,
            "g_idx": torch.int32,
        }
        outputs, inputs = weight.codes.shape
        groups = weight.params.scale.shape[1]
        assert parts["qweight"].shape == (inputs * config["bits"] // 32, outputs)
        assert parts["qzeros"].shape == (groups, outputs * config["bits"] // 32)
        codes = unpacked(parts["qweight"], config["bits"])
        zeros = unpacked(parts["qzeros"].T.contiguous(), config["bits"]).T
        zeros = zeros + {"gptq": 1, "gptq_v2": 0}[config["checkpoint_format"]]
        assert np.array_equal(codes.T, weight.codes.numpy()), name
        assert np.array_equal(zeros.T, weight.params.zero.squeeze(-1).numpy()), name
        assert torch.equal(parts["scales"].T.float(), weight.params.scale.squeeze(-1)), name
        group = parts["g_idx"].numpy()
        decoded = ((codes - zeros[group]) * parts["scales"].float().numpy()[group]).T.astype(np.float32)
        matrix = store.graph.op(name).to_param(torch.from_numpy(decoded))
        assert torch.equal(matrix, store.read([name])[name]), name
    assert plain.keys() == store.shapes.keys() - store.description["tensors"].keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, store.read([name])[name]), name


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_bias", "qwen2", "qwen3", "gemma3"])
def test_everything_can_be_unpacked(name: str, symmetric: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    store = rounded(folders[name], tmp_path / "ours", symmetric=symmetric)
    facts, config, tensors = written(store, tmp_path / "gptq")
    check(store, config, tensors)
    assert facts["symmetric"] == config["sym"] == symmetric
    assert ("negative_scales" in facts) == symmetric
    for kind in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "gptq" / kind).exists()


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_group(bits: int, group_size: int, folders: dict[str, Path], tmp_path: Path) -> None:
    store = rounded(folders["llama"], tmp_path / "ours", bits=bits, group_size=group_size)
    _, config, tensors = written(store, tmp_path / "gptq")
    check(store, config, tensors)
    assert (config["bits"], config["group_size"]) == (bits, group_size)


def test_transposed_weights_are_stored_as_all_others(folders: dict[str, Path], tmp_path: Path) -> None:
    store = rounded(folders["gpt2"], tmp_path / "ours")
    _, config, tensors = written(store, tmp_path / "gptq")
    weight = store.quantized("transformer.h.1.mlp.c_fc.weight")
    codes = unpacked(tensors["transformer.h.1.mlp.c_fc.qweight"], config["bits"])
    assert np.array_equal(codes.T, weight.codes.numpy())
    assert torch.equal(tensors["transformer.h.1.mlp.c_fc.scales"].T.float(), weight.params.scale.squeeze(-1))


def test_readers_find_the_fields_that_they_expect(folders: dict[str, Path], tmp_path: Path) -> None:
    store = rounded(folders["llama"], tmp_path / "ours", symmetric=True)
    facts, config, _ = written(store, tmp_path / "gptq")
    meta = config.pop("meta")
    assert re.fullmatch(r"gyroquant:\d.*", meta["quantizer"][0])
    assert config == {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": 16,
        "sym": True,
        "desc_act": False,
        "static_groups": False,
        "true_sequential": True,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    assert facts["zero_points"] == "minus one"
    assert facts["dtype"] == json.loads((tmp_path / "gptq" / "config.json").read_text())["dtype"] == "float16"


def test_zero_points_that_mean_something_are_stored_as_they_are(tmp_path: Path) -> None:
    model = tiny_models.build("llama")
    with torch.no_grad():  # a group without a negative weight has its zero point at 0
        model.model.layers[1].mlp.up_proj.weight[5, :16].abs_()
    store = rounded(model, tmp_path / "ours", bits=3)
    facts, config, tensors = written(store, tmp_path / "gptq")
    check(store, config, tensors)
    assert min(int(store.quantized(one).params.zero.min()) for one in store.description["tensors"]) == 0
    assert config["checkpoint_format"] == facts["checkpoint_format"] == "gptq_v2"
    assert facts["zero_points"] == "as they are"


def test_readers_are_told_of_layers_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    ignore = ["lm_head", "re:layers.0.*down_proj$", "model.layers.1.mlp.gate_proj"]
    store = rounded(folders["llama"], tmp_path / "ours", ignore=ignore)
    facts, config, tensors = written(store, tmp_path / "gptq")
    check(store, config, tensors)
    alone = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj"]
    assert facts["layers_left_alone"] == alone
    (listed,) = config["modules_in_block_to_quantize"]  # transformers compares the ends of names
    patterns = [re.compile(pattern.removeprefix("-:")) for pattern in config["dynamic"]]  # gptqmodel, their beginnings
    linears = [
        name for name, module in tiny_models.build("llama").named_modules() if isinstance(module, torch.nn.Linear)
    ]
    for name in linears:
        if name != "lm_head":
            assert any(name.endswith(one) for one in listed) == (name not in alone)
            assert any(one.match(name) for one in patterns) == (name in alone)
            assert (f"{name}.weight" in tensors) == (name in alone)


def layers(grid: Any, names: tuple[str, ...] = LAYERS, columns: int = 64) -> tuple[Layer, ...]:
    places = {name: "mlp" if name.split("_")[0] in ("gate", "up", "down") else "self_attn" for name in names}
    return tuple(Layer(f"model.layers.0.{place}.{name}.weight", grid, columns) for name, place in places.items())


SYMMETRIC = IntegerGrid(bits=4, group_size=32, symmetric=True)


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (layers(IntegerGrid(bits=5, group_size=32)), "GPTQ checkpoint has no type for 5-bit asymmetric weights"),
        (
            layers(IntegerGrid(bits=2, group_size=32, symmetric=True, midrise=True)),
            "no type for 2-bit midrise weights in groups of 32",
        ),
        (layers(Fp4Grid(group_size=32)), "no type for the grid fp4"),
        (
            (
                *layers(SYMMETRIC, ("q_proj",)),
                *layers(IntegerGrid(bits=3, group_size=32, symmetric=True), ("up_proj",)),
            ),
            "4-bit symmetric in groups of 32, 3-bit symmetric in groups of 32; leave overrides and allocate out",
        ),
        (
            (*layers(SYMMETRIC, ("q_proj",)), *layers(IntegerGrid(bits=4, group_size=32), ("up_proj",))),
            "one width, group size and kind of zero points for all layers",
        ),
        (
            layers(IntegerGrid(bits=4, group_size=16), columns=80),
            "packs 32 inputs at a time, and model.layers.0.self_attn.q_proj.weight has 80",
        ),
        (
            (Layer("model.layers.0.mlp.experts.down_proj", SYMMETRIC, 64, stacked=True),),
            "cannot hold the stacked experts",
        ),
    ],
)
def test_what_the_layout_cannot_hold_is_refused(needs: tuple[Layer, ...], reason: str) -> None:
    with pytest.raises(gq.InputError, match=reason):
        check_fit(format_named("gptq"), ModelRequirements("llama", needs))


@pytest.mark.parametrize(
    ("online", "reason"),
    [
        (
            OnlineMap(HookPoint("input", "model.layers.0.mlp.down_proj"), maps.hadamard(64)),
            "GPTQ checkpoint cannot run the online map before model.layers.0.mlp.down_proj",
        ),
        (
            InputQuantizer(HookPoint("input", "model.layers.0.mlp.down_proj"), IntegerGrid(bits=8, group_size=-1)),
            "GPTQ checkpoint does not round activations",
        ),
    ],
)
def test_what_runs_with_a_model_is_refused(online: OnlineOp, reason: str) -> None:
    with pytest.raises(gq.InputError, match=reason):
        check_fit(format_named("gptq"), ModelRequirements("llama", layers(SYMMETRIC), (online,)))


def test_outputs_that_fill_no_whole_word_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = rounded(tiny_models.build("llama", num_key_value_heads=1), tmp_path / "ours")
    with OutputFolder(tmp_path / "gptq") as folder:
        with pytest.raises(
            gq.InputError, match=r"packs 32 outputs at a time, and model.layers.0.self_attn.k_proj.weight"
        ):
            format_named("gptq").write(store, folder)
        assert not list(folder.partial.iterdir())
