"""Architectures with a derived description as traced graphs: proved on a tiny model or refused by name. Experts too."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
import torch
from selection import some
from tiny_runs import run
from transformers import PretrainedConfig

from gyroquant.errors import InputError
from gyroquant.formats.base import Layer, ModelRequirements, check_fit, format_named
from gyroquant.formats.export import export
from gyroquant.formats.openvino import tiny_proof
from gyroquant.formats.openvino.layout import MODEL
from gyroquant.formats.openvino.runtime import OpenVinoRuntime
from gyroquant.formats.openvino.tiny_proof import tracing_problem
from gyroquant.grids import IntegerGrid
from gyroquant.models.deriving.tiny import default_config, tiny_model

ov = pytest.importorskip("openvino", reason="OpenVINO is not installed")
EXPERTS = {"hidden_size": 128, "intermediate_size": 96, "moe_intermediate_size": 96}
IDS = torch.randint(10, 90, (40,), generator=torch.Generator().manual_seed(1))


def error(out: Path, graph: Path) -> float:
    """The relative error of a graph in fp32: a prompt, then single tokens."""
    ours = saved_models.our_logits(out, IDS.tolist())
    runtime = OpenVinoRuntime(graph, exact=True)
    found = torch.cat([runtime.feed(part[None]) for part in (IDS[:32], *IDS[32:].split(1))])
    return float((found - ours).abs().max() / ours.abs().max())


def operations(graph: Path) -> Counter[str]:
    """The operations that the plugin runs, by type."""
    compiled = OpenVinoRuntime(graph, exact=True)._request.get_compiled_model()
    found = [op.get_rt_info()["layerType"] for op in compiled.get_runtime_model().get_ops()]
    return Counter(kind if isinstance(kind, str) else kind.value for kind in found)


# Plain layers, windows with layers that share keys and values, experts with biases, latents, chunks and experts of a
# class of their own, positions as biases of scores, sparse activations with several streams.
DERIVED = ["phi", "gemma4_text", "gpt_oss", "deepseek_v3", "llama4_text", "bloom", "gemma3n_text"]


@pytest.mark.parametrize("name", some(DERIVED, ("gemma4_text", "gpt_oss", "deepseek_v3", "bloom")))
def test_a_derived_architecture_is_the_saved_model(name: str, tmp_path: Path) -> None:
    store = saved_models.rounded(tiny_model(default_config(name)), tmp_path / "out", bits=8, group_size=-1)
    assert format_named("openvino").incompatibilities(ModelRequirements(name, (), (), store.config)) == []
    manifest = export(store.folder, "openvino", tmp_path / "ir", check=False)
    assert manifest["facts"]["graph"] == "traced"
    assert error(store.folder, tmp_path / "ir") < 3e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qwen3_5_text", "the cache of qwen3_5_text has recurrent states, not only keys and values"),
        ("mamba", "mamba has no cache of keys and values"),
        ("glm_moe_dsa", "the cache of glm_moe_dsa has more than keys and values"),
        ("jetmoe", "the code of jetmoe cannot be traced"),
        ("doge", "a traced tiny model of doge gives other logits for"),
        ("moshi", "transformers gives other logits for moshi with its cache than without"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(name: str, reason: str) -> None:
    (said,) = format_named("openvino").incompatibilities(ModelRequirements(name, (), (), default_config(name)))
    assert said.startswith(f"OpenVINO IR does not support {name}: {reason}")


def test_each_configuration_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[PretrainedConfig] = []
    monkeypatch.setattr(tiny_proof, "_problems", {})
    monkeypatch.setattr(tiny_proof, "_problem", lambda config: asked.append(config) or "")
    for _ in range(2):
        assert tracing_problem(default_config("phi")) == ""
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("bits", "group_size", "settings"),
    [(4, 32, {}), (4, 32, {"symmetric": False}), (2, 32, {}), (3, 16, {}), (8, -1, {"symmetric": False})],
)
def test_experts_stay_compressed_and_only_chosen_ones_run(
    bits: int, group_size: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_models.build("qwen3_moe", **EXPERTS)
    store = saved_models.rounded(model, tmp_path / "out", bits=bits, group_size=group_size, **settings)
    export(store.folder, "openvino", tmp_path / "ir", check=False)
    assert error(store.folder, tmp_path / "ir") < 1e-5
    assert operations(tmp_path / "ir")["GatherMatmul"] == 3 * model.config.num_hidden_layers
    weights = sum(store.graph.op(name).numel for name in store.description["tensors"])
    held = {2: 2, 3: 4, 4: 4, 8: 8}[bits] * weights // 8
    plain = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
    assert held < (tmp_path / "ir" / MODEL).with_suffix(".bin").stat().st_size < held + plain


@pytest.mark.parametrize("name", some(["qwen3_moe", "mixtral", "gpt_oss", "llama4_text"], ("qwen3_moe", "gpt_oss")))
def test_experts_on_grids_whose_zero_lies_between_two_codes(name: str, tmp_path: Path) -> None:
    """Half a step is added: after the products of experts, or to the parameter where other code reads it."""
    described = name in tiny_models.CONFIGS
    model = tiny_models.build(name, **EXPERTS) if described else tiny_model(default_config(name))
    store = saved_models.rounded(model, tmp_path / "out", bits=2, group_size=-1, midrise=True)
    export(store.folder, "openvino", tmp_path / "ir", check=False)
    assert error(store.folder, tmp_path / "ir") < 3e-5


@pytest.mark.parametrize("name", some(["qwen3_moe", "gpt_oss"], ("qwen3_moe",)))
@pytest.mark.parametrize("bits", [2, 4])
def test_experts_with_float_zero_points(name: str, bits: int, tmp_path: Path) -> None:
    described = name in tiny_models.CONFIGS
    model = tiny_models.build(name, **EXPERTS) if described else tiny_model(default_config(name))
    weights = {"grid": "float_zero", "bits": bits, "group_size": 32, "solver": "rtn"}
    store = saved_models.rounded(model, tmp_path / "out", more={"weights": weights})
    export(store.folder, "openvino", tmp_path / "ir", check=False)
    assert error(store.folder, tmp_path / "ir") < 3e-5


def test_maps_run_online_at_experts(tmp_path: Path) -> None:
    model = tiny_models.build("qwen3_moe", **EXPERTS)
    transform = {"R4": {"method": "hadamard", "block": 32, "random_signs": True}}
    store = saved_models.rounded(model, tmp_path / "out", transform)
    assert {op.hook_point.point for op in store.online} >= {"experts_act"}  # type: ignore[union-attr]
    export(store.folder, "openvino", tmp_path / "ir", check=False)
    assert error(store.folder, tmp_path / "ir") < 1e-5


def test_a_rounded_embedding_stays_tied_to_the_head(corpus: Path, tmp_path: Path) -> None:
    model = tiny_models.build("gpt2")
    run(model, tmp_path / "out", "rtn-w8", corpus, "embeddings.bits=8", "embeddings.group_size=32", "keep_ties=true")
    export(tmp_path / "out", "openvino", tmp_path / "ir", check=False)
    assert error(tmp_path / "out", tmp_path / "ir") < 1e-5


def test_experts_in_a_basis_are_refused() -> None:
    grid = IntegerGrid(bits=4, group_size=32, symmetric=True)
    layer = Layer("model.layers.0.mlp.experts.down_proj", grid, 96, plain=False, stacked=True)
    with pytest.raises(InputError, match=r"cannot hold the experts .*down_proj, which are rounded in a basis"):
        check_fit(format_named("openvino"), ModelRequirements("llama", (layer,)))
