"""An archive holds the very bytes of a folder in fewer, opens like the folder, and is checked like one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import run

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.formats.archive import Archive
from gyroquant.formats.base import check_fit, format_named, requirements_of
from gyroquant.formats.export import export, formats
from gyroquant.grids import Grid, grid_from
from gyroquant.inspection.model import inspect_model
from gyroquant.inspection.verify import verify
from gyroquant.models.graph.sites import Point
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model

# what a grid needs besides its name to fit a tiny model
EVERYTHING = {
    "transform": {"R1": {"method": "hadamard"}, "R3": {"method": "hadamard"}},
    "activations": {"bits": 8, "group_size": 32},
    "kv_cache": {"bits": 4, "group_size": 16, "center_keys": True},
}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    store = open_model(folder)
    assert isinstance(store, PackedStore)
    rounded = store.description["tensors"]
    return {
        f"{name}_{part}" if name in rounded else part: array
        for name, arrays in store.stored_arrays()
        for part, array in arrays.items()
    }


def same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        array.dtype == other[name].dtype
        and array.shape == other[name].shape
        and torch.equal(array.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8))
        for name, array in one.items()
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with 3-bit codes, rotated, with a map that runs online and rounded activations and cache."""
    weights = {"bits": 3, "group_size": 32, "symmetric": False}
    folder = tmp_path_factory.mktemp("archive") / "out"
    more = {key: EVERYTHING[key] for key in ("activations", "kv_cache")}
    return saved_models.rounded(
        tiny_models.build("llama"), folder, EVERYTHING["transform"], more=more, **weights
    ).folder


@pytest.mark.usefixtures("unmeasured")
def test_it_opens_like_the_folder_in_fewer_bytes(out: Path, tmp_path: Path) -> None:
    manifest = export(out, "archive", tmp_path / "x")
    assert same_bytes(stored(tmp_path / "x"), load_file(out / "model.safetensors"))
    assert torch.equal(saved_models.logits(tmp_path / "x"), saved_models.logits(out))
    assert manifest["check"]["relative_logit_error"] == 0
    assert manifest["weight_bytes"] < (out / "model.safetensors").stat().st_size
    facts, store, original = manifest["facts"], open_model(tmp_path / "x"), open_model(out)
    assert facts["true_bits_per_weight_of_the_folder"] == original.bits_per_weight()
    assert facts["true_bits_per_weight"] == pytest.approx(store.bits_per_weight())
    assert store.bits_per_weight() < original.bits_per_weight()
    assert store.effective_bits_per_weight() <= original.effective_bits_per_weight()
    assert store.weights == original.weights
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    before = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == 6
    config.pop("quantization_config"), before.pop("quantization_config")
    assert config == before  # also the sentence that stops readers without gyroquant


@pytest.mark.usefixtures("unmeasured")
def test_every_command_takes_it(out: Path, corpus: Path, tmp_path: Path) -> None:
    export(out, "archive", tmp_path / "x", check=False)
    checked = verify(tmp_path / "x")
    assert checked["passed"]
    assert checked["tensors"] == len(open_model(out).shapes)
    assert checked["command"].endswith("--format archive")
    measured = [gq.evaluate(folder, text=corpus, windows=1, window=16) for folder in (tmp_path / "x", out)]
    assert measured[0]["perplexity"] == measured[1]["perplexity"]
    assert measured[0]["true_bits_per_weight"] < measured[1]["true_bits_per_weight"]
    assert inspect_model(tmp_path / "x").layers == inspect_model(out).layers
    card = (tmp_path / "x" / "README.md").read_text()
    assert f"{measured[0]['true_bits_per_weight']:.4f}" in card
    export(tmp_path / "x", "archive", tmp_path / "again", check=False)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("x", "again")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "changes",
    [
        ("weights={grid: k_quant, bits: 4}",),
        ("weights={grid: nvfp4, group_size: 16}",),
        ("weights={grid: trellis, bits: 2, state_bits: 8, sequence: 32}",),
        ("weights.bits=5", "weights.low_rank={rank: 2}"),
        ("weights.bits=4", "weights.basis={alpha: 0.5}"),
    ],
    ids=["k_quant", "nvfp4", "trellis", "low_rank", "basis"],
)
def test_other_arrays_come_back_too(changes: tuple[str, ...], corpus: Path, tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256} if "k_quant" in changes[0] else {}
    run(
        tiny_models.build("llama", **wide),
        tmp_path / "out",
        "gptq" if "low" in str(changes) else "rtn",
        corpus,
        *changes,
    )
    export(tmp_path / "out", "archive", tmp_path / "x", check=False)
    assert same_bytes(stored(tmp_path / "x"), load_file(tmp_path / "out" / "model.safetensors"))


def test_every_grid_says_how_large_its_codes_are() -> None:
    for kind in Grid.registry.values():
        for grid in kind.examples():
            assert int(grid_from(grid.model_dump(mode="json")).bits) == grid.bits


def test_it_holds_everything_and_is_not_suggested_to_others(out: Path) -> None:
    store = open_model(out)
    assert isinstance(store, PackedStore)
    needs = requirements_of(store)
    check_fit(Archive(), needs)
    assert Archive.capabilities.points == frozenset(Point.__args__)
    with pytest.raises(InputError) as caught:
        check_fit(format_named("gguf"), needs)
    assert "archive" not in str(caught.value)
    assert {entry["format"]: entry["problems"] for entry in formats(out)}["archive"] == []


def damaged(folder: Path, change: Any) -> str:
    """What opening the folder and reading its first layer says after a change of config and arrays."""
    config, arrays = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    name = next(iter(config["quantization_config"]["tensors"]))
    change(config["quantization_config"]["tensors"][name]["huffman"]["codes"], arrays, f"{name}_codes")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    (folder / "SHA256SUMS").unlink(missing_ok=True)
    with pytest.raises(InputError) as caught:
        open_model(folder).read([name])
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda how, arrays, key: how.update(bits=9), "huffman.codes.bits is damaged"),
        (lambda how, arrays, key: how.update(dtype="object"), "huffman.codes.dtype is damaged"),
        (lambda how, arrays, key: how.update(shape=[-1]), "huffman.codes.shape.0 is damaged"),
        (lambda how, arrays, key: how.update(shape=[10**12]), "cannot hold an array"),
        (lambda how, arrays, key: arrays.update({key: arrays[key][:-5]}), "is not stored as its description states"),
    ],
    ids=["bits", "dtype", "shape", "size", "stream"],
)
def test_damage_is_refused(change: Any, said: str, out: Path, tmp_path: Path) -> None:
    export(out, "archive", tmp_path / "x", check=False)
    assert said in damaged(tmp_path / "x", change)
