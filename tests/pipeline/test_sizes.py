"""Results of a given size: bits are chosen for layers, embeddings and heads together."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import tiny_models

import gyroquant as gq
from gyroquant.models.stores.source import open_original
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.sizes import fixed_bytes, preset_bits
from gyroquant.recipes.size import parse_size, with_size

RECIPE = [
    "transform.R1={method: hadamard}",
    "weights.group_size=16",
    "weights.bits=3",
    "calibration.nsamples=8",
    "calibration.seqlen=32",
    "embeddings={bits: 4, group_size: -1, symmetric: true}",
    "head={bits: 4, group_size: -1, symmetric: true}",
]


def job(model: Any, out: Path, text: Path, size: int, *more: str) -> Any:
    recipe = with_size(gq.load_recipe("gptq", [*RECIPE, *more]), size)
    return prepare(model, out, recipe, text, tokenizer=tiny_models.tokenizer())


def stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("llama_tied", ["keep_ties=true"]),
        pytest.param("llama_tied", [], marks=pytest.mark.slow),
        pytest.param("llama", [], marks=pytest.mark.slow),
        ("gpt2", ["keep_ties=true"]),
    ],
)
def test_the_result_is_just_below_the_size(name: str, more: list[str], corpus: Path, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    small = pipeline.run(job(model, tmp_path / "large", corpus, 10**8, *more))
    assert any("less than 100000000 bytes" in text for text in small["warnings"])
    largest = stored(tmp_path / "large")
    with pytest.raises(gq.RecipeError, match="the smallest that is possible is") as refused:
        job(model, tmp_path / "small", corpus, 1000, *more)
    smallest = int(float(str(refused.value).split("possible is ")[1].split(" MB")[0]) * 1e6) + 1000
    asked = (smallest + largest) // 2
    manifest = pipeline.run(job(model, tmp_path / "out", corpus, asked, *more))
    assert 0.96 * asked < stored(tmp_path / "out") <= asked  # a bit more of one layer is a large step for a tiny model
    chosen = manifest["allocation"]["bits"]
    assert "embed" in " ".join(chosen) or "wte" in " ".join(chosen)
    own_head = "lm_head.weight" in chosen
    assert own_head == (name == "llama" or (name == "llama_tied" and not more))
    assert not any("less than" in text for text in manifest["warnings"])
    costs = manifest["allocation"]["divergence"]
    assert all(costs[layer]["2"] > costs[layer]["5"] for layer in chosen if "5" in costs[layer] and "2" in costs[layer])


def test_the_smallest_size_that_is_named_is_possible(corpus: Path, tmp_path: Path) -> None:
    model = tiny_models.build("llama_tied")
    with pytest.raises(gq.RecipeError, match=r"smallest that is possible is (\d+\.\d+) MB") as refused:
        job(model, tmp_path / "out", corpus, 1000)
    least = float(str(refused.value).split("possible is ")[1].split(" MB")[0])
    prepared = job(model, tmp_path / "out", corpus, int(least * 1e6) + 1000)
    assert fixed_bytes(prepared, prepared.targets.keys() | prepared.tables.keys()) < least * 1e6
    assert not (tmp_path / "out").exists()


def test_plain_output_has_no_size_to_choose(corpus: Path, tmp_path: Path) -> None:
    options = gq.OutputOptions(dense=True)
    recipe = with_size(gq.load_recipe("gptq", RECIPE[1:-2]), 50_000)
    with pytest.raises(gq.GyroquantError, match="leave out --dense, or --size"):
        prepare(
            tiny_models.build("llama"), tmp_path, recipe, corpus, tokenizer=tiny_models.tokenizer(), options=options
        )


def test_sizes_are_read_with_their_units() -> None:
    assert [parse_size(text) for text in ("60MB", "1.5 GiB", "1000", "2kb")] == [60_000_000, 3 << 29, 1000, 2000]
    for text in ("", "MB", "-3MB", "0", "3 metres"):
        with pytest.raises(gq.GyroquantError, match="is not a size"):
            parse_size(text)


def test_a_size_changes_only_what_is_chosen() -> None:
    recipe = gq.load_recipe("gyro-w3")
    sized = with_size(recipe, 60_000_000)
    assert sized.weights.allocate is not None
    assert (sized.weights.allocate.bytes, sized.weights.allocate.budget) == (60_000_000, None)
    assert sized.weights.allocate.bits == (2, 3, 4, 5)
    assert sized.weights.allocate.embeddings == (4, 5, 6, 7)
    assert gq.load_recipe(sized.to_dict()) == sized
    without = sized.model_copy(
        update={"weights": sized.weights.model_copy(update={"allocate": recipe.weights.allocate})}
    )
    assert without == recipe


def test_our_recipe_is_chosen_by_the_bits_that_a_size_leaves(folders: dict[str, Path]) -> None:
    store = open_original(folders["llama_tied"])
    weights = sum(prod(shape) for shape in store.shapes.values())
    assert [preset_bits(store, int(weights * bits / 8)) for bits in (1, 2.5, 3.3, 9)] == [2, 2, 3, 4]


def test_python_takes_a_size_too(corpus: Path, tmp_path: Path) -> None:
    model, recipe = tiny_models.build("llama_tied"), gq.load_recipe("gptq", [*RECIPE, "keep_ties=true"])
    tokenizer = tiny_models.tokenizer()
    loaded = gq.quantize(model, recipe, corpus, tmp_path / "out", tokenizer=tokenizer, size="50 kB")
    assert 46_000 < stored(tmp_path / "out") <= 50_000
    assert loaded.gyroquant_manifest["recipe"]["weights"]["allocate"]["bytes"] == 50_000
