"""Every format holds a model whose description was derived, or refuses it by its name before any work."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import saved_models

from gyroquant.errors import InputError
from gyroquant.formats.base import Format, ModelRequirements, check_fit, format_named, requirements_of
from gyroquant.formats.export import TOLERANCE, export
from gyroquant.models.deriving.tiny import default_config, tiny_model
from gyroquant.models.stores.packed import PackedStore

# Families with plain layers, experts, latents with experts, linear attention, and no attention at all.
FAMILIES = ("gemma", "gpt_oss", "deepseek_v3", "qwen3_5_text", "mamba")
REFUSED = {  # and a part of the reason
    ("compressed-tensors", "gpt_oss"): "cannot hold the stacked experts",
    ("compressed-tensors", "deepseek_v3"): "cannot hold the stacked experts",
    ("gptq", "gpt_oss"): "cannot hold the stacked experts",
    ("gptq", "deepseek_v3"): "cannot hold the stacked experts",
    ("gptq", "qwen3_5_text"): "packs 32 outputs at a time, and model.layers.0.linear_attn.in_proj_a.weight has 4",
    ("gptq", "mamba"): "packs 32 outputs at a time, and backbone.layers.0.mixer.x_proj.weight has 40",
    ("openvino", "qwen3_5_text"): "does not support qwen3_5_text: the cache of qwen3_5_text has recurrent states",
    ("openvino", "mamba"): "does not support mamba: mamba has no cache of keys and values",
    ("gguf", "gpt_oss"): "YaRN of gpt-oss only with beta_fast 32, beta_slow 1 and truncate",
    ("gguf", "deepseek_v3"): "no type for 8-bit symmetric weights in one group a row",  # rows of 48 weights
    ("gguf", "qwen3_5_text"): "does not support qwen3_5_text",
    ("gguf", "mamba"): "does not support mamba",
    **{("onnx", name): f"does not support {name}" for name in FAMILIES},
    **{("executorch", name): f"does not support {name}" for name in FAMILIES},
    **{("mlx", name): f"does not support {name}" for name in FAMILIES},
}
PACKAGES = {"compressed-tensors": "compressed_tensors"}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PackedStore]:
    """A tiny model of each family, rounded and saved in 16 bits."""
    root = tmp_path_factory.mktemp("derived")
    return {
        name: saved_models.rounded(
            tiny_model(default_config(name)), root / name, bits=8, group_size=-1, save_dtype="float16"
        )
        for name in FAMILIES
    }


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("format_name", sorted(Format.registry))
def test_it_works_or_is_refused_by_name(
    format_name: str, name: str, stores: dict[str, PackedStore], tmp_path: Path
) -> None:
    store = stores[name]
    if (format_name, name) in REFUSED:
        with pytest.raises(InputError) as caught:
            check_fit(format_named(format_name), requirements_of(store))
        assert REFUSED[format_name, name] in str(caught.value)
        return
    if importlib.util.find_spec(PACKAGES.get(format_name, "gguf")) is None:
        pytest.skip("its package is not installed")
    format_named(format_name).check_packages()
    check = export(store.folder, format_name, tmp_path / "x")["check"]
    if "not_run" in check:
        assert format_name == "gptq", check["not_run"]  # transformers opens it only with another package
    else:
        assert check["relative_logit_error"] < 10 * TOLERANCE


@pytest.mark.parametrize("name", ["nanochat", "falcon"])
def test_weights_that_code_reads_itself_are_decompressed_at_once(name: str, tmp_path: Path) -> None:
    """transformers initializes nanochat's o_proj when it loads the model, even if its weights are packed."""
    pytest.importorskip("compressed_tensors")
    store = saved_models.rounded(tiny_model(default_config(name)), tmp_path / "out", bits=8, group_size=-1)
    manifest = export(store.folder, "compressed-tensors", tmp_path / "x")
    assert manifest["facts"]["scale_dtype"] == "float32"
    assert manifest["check"]["relative_logit_error"] < 1e-6
    plain = saved_models.rounded(tiny_model(default_config("phi")), tmp_path / "phi", bits=8, group_size=-1)
    assert export(plain.folder, "compressed-tensors", tmp_path / "y", check=False)["facts"]["scale_dtype"] == "float16"


def test_weights_that_are_assembled_from_several_are_refused() -> None:
    needs = ModelRequirements("olmo_hybrid", (), (), default_config("olmo_hybrid"))
    (said,) = format_named("compressed-tensors").incompatibilities(needs)
    assert said.startswith("transformers cannot load olmo_hybrid from compressed-tensors, because it assembles")


@pytest.mark.parametrize("name", ["phi", "cohere2_moe"])
def test_layers_outside_the_blocks_are_found_without_a_registered_description(name: str) -> None:
    """The blocks are those of the derived description, with the configuration alone too."""
    config = default_config(name)
    needs = ModelRequirements(name, (), (), config)
    assert needs.architecture is not None
    assert needs.architecture.in_blocks("model.layers.0.self_attn.q_proj.weight")
    assert not needs.architecture.in_blocks("lm_head.weight")
    assert ModelRequirements("no_such_architecture", ()).architecture is None
