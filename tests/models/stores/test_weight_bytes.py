"""The bytes of a model by part are those of the tensors in its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from safetensors import safe_open
from tiny_runs import run

import gyroquant as gq
from gyroquant.models.stores.source import open_model
from gyroquant.models.stores.weight_bytes import PARTS, part_of, sizes, weight_bytes

ITEMS = {"U8": 1, "F16": 2, "BF16": 2, "I32": 4, "F32": 4, "I64": 8}
TABLE = ("embeddings.bits=8", "embeddings.group_size=16", "keep_ties=true")


def tensor_bytes(folder: Path) -> int:
    """The bytes of all tensors in a folder's weights, from their headers."""
    total = 0
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():
                part = file.get_slice(key)
                count = ITEMS[part.get_dtype()]
                for side in part.get_shape():
                    count *= side
                total += count
    return total


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "opt", "qwen3_moe"])
@pytest.mark.parametrize("changes", [(), TABLE], ids=["plain", "table"])
def test_a_rounded_folder_counts_everything_once(
    name: str, changes: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    model = tiny_models.build(name)
    recipe = "duquant" if name == "llama" else "rtn-w4"  # duquant has online maps
    manifest: Any = run(model, tmp_path / "out", recipe, corpus, "weights.bits=4", *changes)
    bytes_ = manifest["bits"]["bytes"]
    assert bytes_["total"] == sum(bytes_[part] for part in PARTS) == tensor_bytes(tmp_path / "out")
    store = open_model(tmp_path / "out")
    assert weight_bytes(store) == bytes_
    assert sizes(store)["whole_model_bits_per_weight"] == manifest["bits"]["whole_model"]
    assert all(bytes_[part] for part in ("embeddings", "layers", "rest"))
    assert bool(bytes_["head"]) is (not model.config.tie_word_embeddings)


def test_layers_are_codes_scales_and_maps(corpus: Path, tmp_path: Path) -> None:
    manifest: Any = run(tiny_models.build("llama"), tmp_path / "out", "duquant", corpus, "weights.bits=4")
    bits = manifest["bits"]
    assert bits["stored_bits"]["maps"] > 0
    assert 8 * bits["bytes"]["layers"] == pytest.approx(bits["per_weight"] * bits["rounded_weights"])
    assert bits["bytes"]["embeddings"] == bits["bytes"]["head"] == 96 * 64 * 2


def test_an_untied_head_has_bytes_and_is_no_further_weight(corpus: Path, tmp_path: Path) -> None:
    """Bits of the whole model are over the weights of the original: what rotating costs is not hidden."""
    model = tiny_models.build("llama_tied")
    found: dict[str, Any] = {}
    for recipe in ("rtn-w4", "gsr-w4"):
        found[recipe] = run(model, tmp_path / recipe, recipe, corpus)["bits"]
    assert found["rtn-w4"]["bytes"]["head"] == 0
    assert found["gsr-w4"]["bytes"]["head"] == 96 * 64 * 2
    assert found["gsr-w4"]["whole_model"] > found["rtn-w4"]["whole_model"]
    stored = open_model(tmp_path / "gsr-w4")
    assert sizes(stored)["whole_model_bits_per_weight"] == found["gsr-w4"]["whole_model"]
    assert stored.weights == open_model(model).weights


def test_plain_numbers_count_as_they_are_stored(corpus: Path, tmp_path: Path) -> None:
    for name in ("llama", "qwen3_moe"):
        model = tiny_models.build(name)
        model.save_pretrained(tmp_path / name)
        store = open_model(tmp_path / name)
        assert weight_bytes(store)["total"] == tensor_bytes(tmp_path / name)
        assert sizes(store)["whole_model_bits_per_weight"] == 32
        assert weight_bytes(store) == weight_bytes(open_model(model))
        manifest: Any = run(model, tmp_path / f"{name}-out", "rtn-w4", corpus, options=gq.OutputOptions(dense=True))
        assert manifest["bits"]["bytes"]["total"] == tensor_bytes(tmp_path / f"{name}-out")
        assert manifest["bits"]["whole_model"] == 16


def test_parts() -> None:
    graph = open_model(tiny_models.build("llama_tied")).graph
    assert part_of(graph, "model.embed_tokens.weight") == "embeddings"
    assert part_of(graph, "lm_head.weight") == "head"
    assert part_of(graph, "model.layers.0.mlp.up_proj.weight") == "layers"
    assert part_of(graph, "gyroquant_map.0.signs") == "layers"
    assert part_of(graph, "model.norm.weight") == part_of(graph, "vision.anything") == "rest"
