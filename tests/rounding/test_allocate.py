"""Giving out bits: the knapsack against all combinations, other grids for some layers, and whole runs."""

import itertools
from pathlib import Path

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from selection import some

import gyroquant as gq
from gyroquant.errors import RecipeError
from gyroquant.inspection import dry_run
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import cost_probe
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare
from gyroquant.rounding.bit_allocation import choose

SMALL = ["weights.group_size=16", "calibration.nsamples=16", "calibration.seqlen=32", "calibration.dtype=float32"]


def job(model: Path, out: Path, corpus: Path, recipe: str, *changes: str) -> Job:
    return prepare(model, out, gq.load_recipe(recipe, [*SMALL, *changes]), corpus, tokenizer=tiny_models.tokenizer())


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.floats(0, 10), min_size=3, max_size=3)), min_size=1, max_size=5)
)
@settings(deadline=None, max_examples=40)
def test_nothing_that_fits_is_better(layers: list[tuple[int, list[float]]]) -> None:
    names = [str(i) for i in range(len(layers))]
    costs = {(name, bits + 2): cost[bits] for name, (_, cost) in zip(names, layers, strict=True) for bits in range(3)}
    sizes = {(name, bits): size * bits for name, (size, _) in zip(names, layers, strict=True) for bits in (2, 3, 4)}
    room = sum(sizes[name, 3] for name in names)
    chosen = choose(costs, sizes, room)
    assert sum(sizes[choice] for choice in chosen.items()) <= room
    combinations = (dict(zip(names, bits, strict=True)) for bits in itertools.product((2, 3, 4), repeat=len(names)))
    fitting = [one for one in combinations if sum(sizes[choice] for choice in one.items()) <= room]
    best = min(sum(costs[choice] for choice in one.items()) for one in fitting)
    assert sum(costs[choice] for choice in chosen.items()) == pytest.approx(best, abs=1e-6)


def test_what_cannot_fit_is_an_error() -> None:
    with pytest.raises(RecipeError, match="has room for 10 bits, and the layers take at least 20"):
        choose({("a", 2): 1.0, ("a", 3): 0.5}, {("a", 2): 20, ("a", 3): 30}, 10)


@pytest.mark.parametrize("name", some(["llama_tied", "qwen2_moe", "gpt2"], ["llama_tied"]))
def test_a_run_stays_within_its_budget_and_beats_even_bits(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Mixed 2 and 4 bits, in the room of 3."""
    budget = 3 + (16 + 3) / 16
    changes = [f"weights.allocate={{budget: {budget}, bits: [2, 3, 4], nsamples: 4}}"]
    manifest = pipeline.run(job(folders[name], tmp_path / "mixed", corpus, "gptq", *changes))
    even = pipeline.run(job(folders[name], tmp_path / "even", corpus, "gptq", "weights.bits=3"))
    allocation = manifest["allocation"]
    assert manifest["bits"]["per_weight"] <= even["bits"]["per_weight"] <= budget
    assert allocation["per_weight"] == pytest.approx(manifest["bits"]["per_weight"], rel=1e-2)
    assert len(set(allocation["bits"].values())) > 1
    assert even["allocation"] is None
    for layer, costs in allocation["divergence"].items():
        assert costs["2"] > costs["4"] >= 0, layer
    store = open_model(tmp_path / "mixed")
    for layer, bits in allocation["bits"].items():
        assert store.quantized(layer).grid.bits == bits
    kl = {
        out: gq.evaluate(tmp_path / out, corpus, folders[name], window=32, tokenizer=tiny_models.tokenizer())["kl"]
        for out in ("mixed", "even")
    }
    assert kl["mixed"] < kl["even"]


@pytest.mark.parametrize("name", some(["llama_tied", "gpt2", "gemma2"], ["gpt2"]))
def test_costs_by_gradient_order_choices_as_measured_ones(
    name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """Measured with rounding to nearest, so that both have the same rounded weights."""
    found = {}
    for costs in ("measured", "gradient"):
        allocate = f"weights.allocate={{budget: 5.2, bits: [3, 4, 6], nsamples: 8, costs: {costs}}}"
        changes = [allocate, "weights.symmetric=true"]
        allocation = pipeline.run(job(folders[name], tmp_path / costs, corpus, "rtn", *changes))["allocation"]
        found[costs] = {
            (layer, bits): cost for layer, each in allocation["divergence"].items() for bits, cost in each.items()
        }
        assert allocation["per_weight"] <= 5.2
    choices = sorted(found["measured"])
    assert choices == sorted(found["gradient"])
    order = spearmanr([found["measured"][one] for one in choices], [found["gradient"][one] for one in choices])
    assert order.statistic > 0.8


def test_it_is_repeatable_and_composes(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    changes = [
        "weights.allocate={budget: 4, bits: [2, 4]}",
        "transform.R1.method=hadamard",
        "transform.R4.method=hadamard",
        "weights.target={share: auto}",
        "activations.bits=8",
    ]
    manifests = [
        pipeline.run(job(folders["llama_tied"], tmp_path / out, corpus, "gptq", *changes)) for out in ("one", "two")
    ]
    assert manifests[0]["allocation"] == manifests[1]["allocation"]
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


def test_some_layers_can_have_another_grid(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    overrides = "weights.overrides=[{layers: [down_proj, v_proj], bits: 4}, {layers: ['re:0.*v_proj'], grid: fp8}]"
    manifest = pipeline.run(job(folders["llama_tied"], tmp_path / "out", corpus, "gptq", "weights.bits=2", overrides))
    store = open_model(tmp_path / "out")
    for name in store.description["tensors"]:
        grid = store.quantized(name).grid
        if "layers.0.self_attn.v_proj" in name:
            assert grid.grid == "fp8"
        else:
            assert grid.bits == (4 if "down_proj" in name or "v_proj" in name else 2), name
            assert grid.group_size == 16
    assert store.bits_per_weight() == manifest["bits"]["per_weight"]
    loaded = gq.load(tmp_path / "out", dtype="float32")
    assert loaded(tiny_models.tokens(loaded)).logits.isfinite().all()
    recipe = gq.load_recipe("gptq", [overrides])
    assert gq.load_recipe(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("weights.allocate={budget: 2.5}", r"budget is 2.5, and 2 bits take 3.125 true bits"),
        ("weights.allocate={budget: 4, bits: [3]}", r"nothing to choose"),
        ("weights.overrides=[{layers: [nothing], bits: 4}]", r"overrides.0.layers: 'nothing' matches no layer"),
        ("weights.overrides=[{layers: [down_proj], bit: 4}]", r"did you mean 'bits'"),
        ("weights.overrides=[{bits: 4}]", r"overrides.0 needs layers"),
        ("weights.overrides={layers: [down_proj], bits: 4}", r"is a list"),
        ("weights.overrides=[{layers: [down_proj], group_size: 80}]", r"group_size 80 does not divide"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    change: str, message: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        job(folders["llama_tied"], tmp_path / "out", corpus, "gptq", change)


def test_one_or_the_other() -> None:
    with pytest.raises(RecipeError, match="leave overrides out"):
        gq.load_recipe("gptq", ["weights.allocate={budget: 4}", "weights.overrides=[{layers: [down_proj], bits: 4}]"])
    with pytest.raises(RecipeError, match="grid mxfp4 has only one number of bits"):
        gq.load_recipe("rtn", ["weights.grid=mxfp4", "weights.allocate={budget: 4}"])


def test_its_time_and_memory_are_predicted(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost_probe, "peak_memory_bytes", lambda: 0)
    plain = dry_run.dry_run_job(job(folders["llama_tied"], tmp_path / "out", corpus, "gptq"))
    changes = "weights.allocate={budget: 4, nsamples: 16}"
    asked = dry_run.dry_run_job(job(folders["llama_tied"], tmp_path / "out", corpus, "gptq", changes))
    assert asked.seconds > 1.5 * plain.seconds
    hidden = 32 * 64 * 4  # bytes of one window's hidden states
    assert asked.peak_memory_bytes == 14 * 3 * 16 * hidden > plain.peak_memory_bytes
