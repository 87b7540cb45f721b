"""What an MLX checkpoint holds, as MLX decodes it, and what mlx-lm computes from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_models
import tiny_models
import torch
from selection import some

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.formats.base import format_named
from gyroquant.formats.export import export
from gyroquant.formats.mlx.writer import Mlx
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model

mx = pytest.importorskip("mlx.core")
SUPPORTED = Mlx.capabilities.model_types or ()
NAMES = [name for name in tiny_models.CONFIGS if tiny_models.build(name).config.model_type in SUPPORTED]
MIDRISE = {"group_size": -1, "symmetric": True, "midrise": True, "scale": "mse"}
GRIDS: dict[str, dict[str, Any]] = {
    **{f"{bits} bits": {"bits": bits} for bits in (2, 3, 4, 5, 6, 8)},
    "asymmetric": {"bits": 3, "symmetric": False},
    "mid-rise rows": {"bits": 2} | MIDRISE,
    "groups of 64": {"bits": 4, "group_size": 64},
}
FLOAT_ZERO = {"grid": "float_zero", "bits": 2, "group_size": 32, "solver": "rtn"}


def decoded(folder: Path, store: PackedStore) -> dict[str, torch.Tensor]:
    """Every rounded parameter as MLX decodes it from the file."""
    arrays = mx.load(str(folder / "model.safetensors"))
    entries = json.loads((folder / "config.json").read_text())["quantization"]
    found = {}
    for name in store.description["tensors"]:
        module = name.removesuffix(".weight")
        words, *params = (arrays[f"{module}.{part}"] for part in ("weight", "scales", "biases"))
        wide = [part.astype(mx.float32) for part in params]
        found[name] = torch.from_numpy(np.array(mx.dequantize(words, *wide, **entries[module])))
    return found


@pytest.mark.parametrize("grid", GRIDS)
def test_mlx_decodes_every_number(grid: str, tmp_path: Path) -> None:
    """Scales are ours; a bias is off by at most its rounding to fp16."""
    model = tiny_models.build("llama", hidden_size=128, intermediate_size=256)
    store = saved_models.rounded(model, tmp_path / "saved", **GRIDS[grid])
    facts = saved_models.written("mlx", store, tmp_path / "mlx")
    mlx = format_named("mlx")
    for name, numbers in decoded(tmp_path / "mlx", store).items():
        in_file, exact = mlx.weight_in_file(store, name), store.quantized(name)
        assert in_file is not None
        assert torch.allclose(numbers, in_file, rtol=0, atol=1e-6 * float(in_file.abs().max()))
        bias = (exact.params.zero * exact.params.scale).abs().max()
        error = (in_file - exact.dequantize()).abs().max()
        assert error <= 2.0**-11 * bias + 1e-7
        assert grid in ("asymmetric", "mid-rise rows") or error == 0
    assert facts["deviation"] < 1e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mlx_decodes_and_runs_float_zero_points(bits: int, tmp_path: Path) -> None:
    """They are biases rounded to fp16, in prompts and in single tokens."""
    model = tiny_models.build("llama", hidden_size=128, intermediate_size=256)
    more = {"weights": FLOAT_ZERO | {"bits": bits}}
    store = saved_models.rounded(model, tmp_path / "saved", more=more)
    manifest = export(tmp_path / "saved", "mlx", tmp_path / "mlx")
    for name, numbers in decoded(tmp_path / "mlx", store).items():
        params, exact = store.quantized(name).params, store.quantized(name).dequantize()
        bias = (params.zero * params.scale).abs().max()
        assert 0 < (numbers - exact).abs().max() <= 2.0**-11 * bias + 1e-7
    assert manifest["check"]["prompt_error"] < 5e-3
    assert manifest["check"]["step_error"] < 5e-3


@pytest.mark.parametrize("name", some(NAMES, ["llama", "llama_tied", "qwen3", "phi3", "cohere", "olmo2"]))
def test_mlx_lm_computes_the_saved_model(name: str, tmp_path: Path) -> None:
    changes: dict[str, Any] = {}
    if name == "gemma3":  # mlx-lm knows one pattern of layers only
        changes = {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]}
    saved_models.rounded(tiny_models.build(name, **changes), tmp_path / "saved")
    check = export(tmp_path / "saved", "mlx", tmp_path / "mlx")["check"]
    assert check["runtime"] == "MLX"
    assert check["relative_logit_error"] < 2e-4
    assert check["greedy_tokens_alike"] == 32


def test_embeddings_heads_and_layers_of_other_bits(corpus: Path, tmp_path: Path) -> None:
    """A tied table is stored once, and a head of its own beside the table; every layer has its own bits."""
    table = {"embeddings": {"bits": 6, "group_size": 32}, "head": {"bits": 4, **MIDRISE}}
    overrides = [{"layers": ["down_proj"], "bits": 3}]
    for name in ("llama_tied", "llama"):
        more = table | {"keep_ties": True}
        out = tmp_path / name
        store = saved_models.rounded(tiny_models.build(name), out, more=more, overrides=overrides)
        assert isinstance(open_model(out), PackedStore)
        manifest = export(out, "mlx", tmp_path / f"{name}-mlx")
        assert manifest["check"]["relative_logit_error"] < 5e-3  # biases, and a head in fp16
        entries = json.loads((tmp_path / f"{name}-mlx" / "config.json").read_text())["quantization"]
        assert entries["model.layers.0.mlp.down_proj"] == {"group_size": 32, "bits": 3, "mode": "affine"}
        assert entries["model.embed_tokens"]["bits"] == 6
        assert ("lm_head" in entries) == (name == "llama")
        assert len(entries) == 3 + len(store.description["tensors"])


def test_a_rotated_model_that_keeps_its_tie_gets_a_head(corpus: Path, tmp_path: Path) -> None:
    rotated = {"R1": {"method": "hadamard"}}
    more = {"keep_ties": True, "embeddings": {"bits": 8, "group_size": 32}}
    saved_models.rounded(tiny_models.build("llama_tied"), tmp_path / "saved", rotated, more=more)
    manifest = export(tmp_path / "saved", "mlx", tmp_path / "mlx")
    assert manifest["check"]["relative_logit_error"] < 5e-3  # biases, and a head in fp16
    assert "lm_head.weight" in manifest["facts"]["untied"]


@pytest.mark.parametrize(
    ("weights", "transform", "reason"),
    [
        ({"group_size": 16}, None, "groups of 32"),
        ({"bits": 7}, None, "no type for 7-bit"),
        ({}, {"R4": {"method": "hadamard"}}, "cannot run the online map"),
    ],
)
def test_what_does_not_fit_is_refused(
    weights: dict[str, Any], transform: dict[str, Any] | None, reason: str, tmp_path: Path
) -> None:
    saved_models.rounded(tiny_models.build("llama"), tmp_path / "saved", transform, **weights)
    with pytest.raises(InputError, match=reason):
        gq.export(tmp_path / "saved", "mlx", tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()
