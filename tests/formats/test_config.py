"""config.json: RoPE's settings where older programs look for them, and what transformers makes of both places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
import torch
import transformers
from transformers import AutoConfig

from gyroquant.formats.config import write_config

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LONG = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 16.0, "beta_slow": 2.0},
    "llama3": LLAMA3,
    "longrope": LONG | {"factor": 4.0, "original_max_position_embeddings": 32},
}


def configured(name: str, rope: dict[str, Any] | None) -> Any:
    """The configuration of a tiny model, with these settings of RoPE."""
    config = tiny_models.CONFIGS[name]()
    return config if rope is None else type(config).from_dict(config.to_dict() | {"rope_parameters": rope})


def written(config: Any, folder: Path) -> dict[str, Any]:
    """What stands in config.json."""
    write_config(config, folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "glm4"])
def test_every_kind_of_rope_stands_in_both_places_and_is_read_once(kind: str, name: str, tmp_path: Path) -> None:
    partial = {"partial_rotary_factor": 0.5} if name == "glm4" else {}
    settings = {"rope_type": kind, "rope_theta": 54321.0, **KINDS[kind], **partial}
    if name == "glm4" and kind == "longrope":
        settings |= {key: LONG[key][:4] for key in LONG}
    config = configured(name, settings)
    data = written(config, tmp_path)
    assert data["rope_theta"] == 54321.0
    assert data.get("partial_rotary_factor") == partial.get("partial_rotary_factor")
    scaling = data["rope_scaling"]
    if kind == "default":
        assert scaling is None
    else:
        assert scaling.pop("type" if kind == "longrope" else "rope_type") == kind
        assert scaling == {key: settings[key] for key in KINDS[kind]}
    again = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {key: value for key, value in again.items() if key != "type"} == config.rope_parameters
    assert again.get("type", kind) == kind


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_transformers_reads_the_same_rope_as_without_the_older_names(name: str, tmp_path: Path) -> None:
    config = tiny_models.CONFIGS[name]()
    data = written(config, tmp_path)
    assert getattr(AutoConfig.from_pretrained(tmp_path), "rope_parameters", None) == data.get("rope_parameters")
    rotates = data.get("rope_parameters") is not None
    assert ("rotary_emb_base" if name.startswith("gpt_neox") else "rope_theta") in data or not rotates


def test_layers_that_differ_have_their_older_names(tmp_path: Path) -> None:
    """Gemma 3 scales the layers with full attention alone."""
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    data = written(configured("gemma3", rope), tmp_path)
    assert data["rope_theta"] == 3e6
    assert data["rope_local_base_freq"] == 2e4
    assert data["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope


def test_longrope_of_phi3_is_as_transformers_4_demands_it(tmp_path: Path) -> None:
    """Three fields, and the original length beside them."""
    settings = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **LONG}
    config = transformers.Phi3Config(
        **{**tiny_models.COMMON, "max_position_embeddings": 128, "original_max_position_embeddings": 32},
        rope_parameters=settings,
    )
    data = written(config, tmp_path)
    assert data["rope_scaling"] == {"type": "longrope", **LONG}
    assert data["original_max_position_embeddings"] == 32
    assert data["partial_rotary_factor"] == 1.0
    again = AutoConfig.from_pretrained(tmp_path).rope_parameters
    assert {key: value for key, value in again.items() if key != "type"} == config.rope_parameters


def test_names_that_would_change_what_transformers_reads_are_left_out(tmp_path: Path) -> None:
    """A configuration that takes `rope_scaling` for something else."""

    class Other(transformers.LlamaConfig):
        def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
            if kwargs.pop("rope_scaling", None):
                self.rope_parameters = {"rope_type": "linear", "factor": 99.0}
            return super().convert_rope_params_to_dict(**kwargs)

    config = Other(**tiny_models.COMMON, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 7e4})
    data = written(config, tmp_path)
    assert data["rope_theta"] == 7e4
    assert "rope_scaling" not in data
    assert Other.from_pretrained(tmp_path).rope_parameters == config.rope_parameters


@pytest.mark.parametrize("format_", ["dense", "gptq", "compressed-tensors"])
def test_exports_have_them_and_compute_the_same(format_: str, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configured("llama", rope), dtype=torch.float32)
    store = saved_models.rounded(tiny_models.randomise(model), tmp_path / "packed")
    saved_models.written(format_, store, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "config.json").read_text())
    assert data["rope_theta"] == 5e5
    assert data["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == store.config.rope_parameters
    if format_ == "dense":
        ours, plain = saved_models.logits(tmp_path / "packed"), saved_models.logits(tmp_path / "out")
        assert float((plain - ours).norm() / ours.norm()) < 2e-3
