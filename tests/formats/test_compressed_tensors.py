"""compressed-tensors checkpoints open as transformers opens them, to the numbers that gyroquant itself decodes."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import saved_models
import torch
import transformers
from safetensors.torch import load_file
from saved_models import logits, logits_without_us, our_logits
from selection import some_pairs

import gyroquant as gq
from gyroquant import maps
from gyroquant.formats.base import Layer, ModelRequirements, check_fit, format_named
from gyroquant.formats.compressed_tensors import CompressedTensors
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import Fp4Grid, Grid, IntegerGrid
from gyroquant.models.execution.online import CacheQuantizer, InputQuantizer, OnlineMap, OnlineOp
from gyroquant.models.graph.sites import HookPoint
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model

pytest.importorskip("compressed_tensors")


def rounded(source: Any, out: Path, **settings: Any) -> PackedStore:
    return saved_models.rounded(source, out, **{"group_size": 16} | settings)


written = partial(saved_models.written, "compressed-tensors")


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).norm() / expected.norm()) < 1e-6


FAMILIES = ["llama", "llama_tied", "llama_bias", "qwen2", "qwen3", "gemma3"]
FAST = [*((name, True) for name in FAMILIES), ("llama_tied", False), ("gemma3", False)]


@pytest.mark.parametrize(("name", "symmetric"), some_pairs(FAMILIES, [True, False], FAST))
def test_it_opens_to_our_numbers(name: str, symmetric: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    store = rounded(folders[name], tmp_path / "ours", bits=3, symmetric=symmetric)
    facts = written(store, tmp_path / "out")
    assert_same(logits(tmp_path / "out"), logits(tmp_path / "ours"))
    assert ("negative_scales" in facts) == symmetric
    assert facts["scale_dtype"] == ("float16" if symmetric else "float32")
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors"))
    for kind in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / kind).exists()


WIDTHS = range(2, 9)


@pytest.mark.parametrize(
    ("bits", "group_size"), some_pairs(WIDTHS, [-1, 32], [(2, 32), (3, 32), (5, 32), (8, 32), (3, -1)])
)
def test_the_library_decodes_every_width(bits: int, group_size: int, folders: dict[str, Path], tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    for symmetric in (True, False):
        place = tmp_path / str(symmetric)
        store = rounded(folders["llama"], place / "ours", bits=bits, group_size=group_size, symmetric=symmetric)
        written(store, place / "out")
        tensors = load_file(place / "out" / "model.safetensors")
        config = QuantizationConfig.model_validate(config_of(place / "out")["quantization_config"])
        (scheme,) = config.config_groups.values()
        compressor = BaseCompressor.get_value_from_registry(config.format)
        for name in store.description["tensors"]:
            prefix, expected = name + "_", store.quantized(name)
            parts = {"weight_" + key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
            assert parts["weight_packed"].shape[1] == -(-expected.codes.shape[1] * bits // 32)
            assert torch.equal(parts["weight_scale"].float(), expected.params.scale.squeeze(-1))
            parts["weight_scale"] = parts["weight_scale"].float()
            assert torch.equal(compressor.decompress(parts, scheme)["weight"], expected.dequantize()), name


def test_widths_that_older_versions_read_otherwise_are_said(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3, 5, 6 and 7 bits: one stream of bits since 0.18, before that as many whole codes a word as fit."""
    from compressed_tensors.compressors import pack_quantized

    facts = {}
    for bits in range(2, 9):
        store = rounded(folders["llama"], tmp_path / str(bits), bits=bits)
        facts[bits] = written(store, tmp_path / f"out{bits}").get("read_by")
    assert {bits for bits, said in facts.items() if said} == {3, 5, 6, 7}
    assert facts[3] == "compressed-tensors 0.18 and newer, for the layers of 3 bits"

    def ten_a_word(value: torch.Tensor, num_bits: int, packed_dim: int = 1) -> torch.Tensor:
        return torch.zeros(len(value), -(-value.shape[1] // (32 // num_bits)), dtype=torch.int32)

    monkeypatch.setattr(pack_quantized, "pack_to_int32", ten_a_word)
    said = written(open_model(tmp_path / "3"), tmp_path / "older")["read_by"]  # type: ignore[arg-type]
    assert said == "compressed-tensors 0.17 and older, for the layers of 3 bits"


@pytest.mark.parametrize(("stored", "shown"), [("float16", "float16"), ("bfloat16", "float32"), ("float32", "float32")])
def test_the_default_dtype_holds_the_scales(stored: str, shown: str, folders: dict[str, Path], tmp_path: Path) -> None:
    store = rounded(folders["llama_bias"], tmp_path / "ours", save_dtype=stored)
    assert written(store, tmp_path / "out")["dtype"] == config_of(tmp_path / "out")["dtype"] == shown
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == getattr(torch, stored)
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float16
    default = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert default.dtype == getattr(torch, shown)
    assert_same(logits(tmp_path / "out", dtype="auto"), logits(tmp_path / "ours", dtype=default.dtype))
    assert_same(logits(tmp_path / "out"), logits(tmp_path / "ours"))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_asymmetric_weights_can_be_decompressed_on_request_too(folders: dict[str, Path], tmp_path: Path) -> None:
    store = rounded(folders["llama"], tmp_path / "ours", symmetric=False, group_size=-1)
    written(store, tmp_path / "out")
    asked = transformers.CompressedTensorsConfig(dequantize=True)
    assert_same(logits(tmp_path / "out", quantization_config=asked), logits(tmp_path / "ours"))
    config = config_of(tmp_path / "out")
    assert config["quantization_config"].pop("dequantize") is True
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert_same(logits(tmp_path / "out", quantization_config=asked), logits(tmp_path / "ours"))
    with pytest.raises(RuntimeError):  # why it is in the configuration
        logits(tmp_path / "out")


def test_symmetric_layers_may_differ(folders: dict[str, Path], tmp_path: Path) -> None:
    overrides = [
        {"layers": ["re:.*down_proj"], "bits": 3, "group_size": 32},
        {"layers": ["model.layers.1.self_attn.v_proj"], "bits": 8, "group_size": -1},
        {"layers": ["re:.*o_proj"], "scale": "mse"},  # is fitted otherwise and stored alike
    ]
    store = rounded(folders["llama"], tmp_path / "ours", overrides=overrides, ignore=["lm_head", "re:.*k_proj"])
    assert written(store, tmp_path / "out")["schemes"] == 3
    assert_same(logits(tmp_path / "out"), logits(tmp_path / "ours"))
    config = config_of(tmp_path / "out")["quantization_config"]
    targets = {tuple(group["targets"]): group["weights"] for group in config["config_groups"].values()}
    alone = targets[("model.layers.1.self_attn.v_proj",)]
    assert (alone["num_bits"], alone["strategy"], alone["group_size"]) == (8, "channel", None)
    assert sum(len(names) for names in targets) == 12
    assert config["ignore"] == ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "lm_head"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_head_goes_by_both_its_names(symmetric: bool, folders: dict[str, Path], tmp_path: Path) -> None:
    for ignore in (["lm_head"], []):
        place = tmp_path / str(len(ignore))
        store = rounded(folders["gpt_neox"], place / "ours", symmetric=symmetric, ignore=ignore)
        written(store, place / "out")
        assert_same(logits(place / "out"), logits(place / "ours"))
        assert config_of(place / "out")["quantization_config"]["ignore"] == (["lm_head", "embed_out"] if ignore else [])
        tensors = load_file(place / "out" / "model.safetensors")
        assert ("embed_out.weight" if ignore else "embed_out.weight_packed") in tensors


def test_it_opens_where_there_is_no_gyroquant(folders: dict[str, Path], tmp_path: Path) -> None:
    for symmetric in (True, False):
        place, ids = tmp_path / str(symmetric), [5, 17, 40, 8]
        written(rounded(folders["qwen3"], place / "ours", symmetric=symmetric), place / "out")
        assert_same(logits_without_us(place / "out", ids), our_logits(place / "ours", ids))


def layer(grid: Grid, name: str = "q_proj", **options: bool) -> Layer:
    return Layer(f"model.layers.0.self_attn.{name}.weight", grid, 64, **options)


SYMMETRIC = IntegerGrid(bits=4, group_size=32, symmetric=True)
ASYMMETRIC = IntegerGrid(bits=4, group_size=32)


@pytest.mark.parametrize(
    ("model_type", "layers", "reason"),
    [
        ("llama", [layer(Fp4Grid(group_size=32))], "compressed-tensors has no type for the grid fp4"),
        (
            "llama",
            [layer(IntegerGrid(bits=2, group_size=-1, symmetric=True, midrise=True))],
            "compressed-tensors has no type for 2-bit midrise weights in one group a row",
        ),
        ("llama", [layer(SYMMETRIC, plain=False)], "rounded in its own weights.basis"),
        ("llama", [layer(ASYMMETRIC), layer(SYMMETRIC, "v_proj")], "decompresses asymmetric weights as if all layers"),
        (
            "llama",
            [layer(ASYMMETRIC), layer(IntegerGrid(bits=3, group_size=32), "v_proj")],
            "decompresses asymmetric weights as if all layers",
        ),
        ("gpt2", [layer(SYMMETRIC)], "not support the transposed linear weights of gpt2"),
        ("mixtral", [layer(SYMMETRIC, stacked=True)], "cannot hold the stacked experts"),
        ("mixtral", [layer(SYMMETRIC)], "cannot load the experts of mixtral from compressed-tensors"),
    ],
)
def test_what_transformers_would_not_open_is_refused(model_type: str, layers: list[Layer], reason: str) -> None:
    with pytest.raises(gq.InputError, match=reason):
        check_fit(format_named("compressed-tensors"), ModelRequirements(model_type, tuple(layers)))


def test_transformers_opens_no_asymmetric_layers_that_differ(folders: dict[str, Path], tmp_path: Path) -> None:
    """Why they are refused: the day that this passes, they need not be."""
    overrides = [{"layers": ["re:.*down_proj"], "bits": 3}]
    store = rounded(folders["llama"], tmp_path / "ours", symmetric=False, overrides=overrides)
    with OutputFolder(tmp_path / "out") as folder:
        CompressedTensors().write(store, folder)
        folder.commit()
    with pytest.raises(RuntimeError):
        logits(tmp_path / "out")


DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("online", "reason"),
    [
        (OnlineMap(HookPoint("input", DOWN), maps.hadamard(64)), f"cannot run the online map before {DOWN}"),
        (InputQuantizer(HookPoint("input", DOWN), ASYMMETRIC), "does not round activations as this recipe does"),
        (
            CacheQuantizer("model.layers.0.self_attn", ASYMMETRIC, ASYMMETRIC),
            "does not round the KV cache as this recipe does",
        ),
    ],
)
def test_what_runs_with_a_model_is_refused(online: OnlineOp, reason: str) -> None:
    with pytest.raises(gq.InputError, match=reason):
        check_fit(format_named("compressed-tensors"), ModelRequirements("llama", (layer(SYMMETRIC),), (online,)))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    format_named("compressed-tensors").check_packages()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(gq.InputError, match=r'pip install "gyroquant\[compressed-tensors\]"'):
        format_named("compressed-tensors").check_packages()
