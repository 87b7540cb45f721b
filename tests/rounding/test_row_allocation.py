"""Bits for single rows: the order against all combinations, and whole runs."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gyroquant as gq
from gyroquant.errors import InputError, RecipeError, UnsupportedModelError
from gyroquant.formats.base import Format, check_fit
from gyroquant.grids import MixedRowsGrid
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.export_requirements import requirements_of_job
from gyroquant.pipeline.job import Job, prepare
from gyroquant.rounding.row_allocation import RowChoices, choose_rows

SMALL = ["weights.group_size=16", "calibration.nsamples=16", "calibration.seqlen=32", "calibration.dtype=float32"]
BUDGET = 3 + (16 + 3) / 16
ROWS = f"weights.allocate={{budget: {BUDGET}, bits: [2, 3, 4], nsamples: 16, costs: gradient, granularity: rows}}"


def job(model: Path, out: Path, corpus: Path, recipe: str, *changes: str) -> Job:
    return prepare(model, out, gq.load_recipe(recipe, [*SMALL, *changes]), corpus, tokenizer=tiny_models.tokenizer())


def total(layers: list[RowChoices], places: list[list[int]]) -> tuple[float, int]:
    """What the widths of all rows cost together, and the bits that they take."""
    pairs = [(own, row, at) for own, each in zip(layers, places, strict=True) for row, at in enumerate(each)]
    return sum(float(own.costs[row, at]) for own, row, at in pairs), sum(own.sizes[at] for own, _, at in pairs)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.floats(0, 10), min_size=3, max_size=3)), min_size=1, max_size=6)
)
@settings(deadline=None, max_examples=60)
def test_nothing_that_fits_is_better_by_more_than_a_step(rows: list[tuple[int, list[float]]]) -> None:
    """Each row is a layer of its own, so that rows have several lengths. What is lost is the step that does not fit."""
    layers = [RowChoices(np.array([costs]), (2 * size, 3 * size, 4 * size)) for size, costs in rows]
    room = sum(3 * size for size, _ in rows)
    taken, chosen = choose_rows(layers, {}, {}, room)
    cost, size = total(layers, [list(own) for own in taken])
    assert size <= room
    assert not chosen
    ways = itertools.product(range(3), repeat=len(layers))
    best = min(cost for cost, size in (total(layers, [[at] for at in way]) for way in ways) if size <= room)
    step = max(float(own.costs.max() - own.costs.min()) for own in layers)
    assert best - 1e-9 <= cost <= best + step + 1e-9


def test_equal_rows_are_solved_exactly() -> None:
    """With rows of one size and convex costs, the order is the optimum: the best gains are taken."""
    gain = np.sort(np.random.default_rng(0).random((40, 2)), 1)  # the second bit saves less
    costs = np.stack([gain.sum(1), gain[:, 0], np.zeros(40)], 1)
    gains = np.sort((costs[:, :-1] - costs[:, 1:]).ravel())[::-1]
    (places,), _ = choose_rows([RowChoices(costs, (20, 30, 40))], {}, {}, 40 * 20 + 10 * 25)
    assert places.sum() == 25
    saved = costs[:, 0].sum() - np.take_along_axis(costs, places[:, None], 1).sum()
    assert saved == pytest.approx(gains[:25].sum())


def test_tables_share_the_room() -> None:
    rows = RowChoices(np.array([[4.0, 0.0], [1.0, 0.0]]), (10, 20))
    tables, sizes = {("table", 2): 3.0, ("table", 4): 0.5}, {("table", 2): 20, ("table", 4): 40}
    for room, table, wide in ((70, 4, [1, 0]), (60, 2, [1, 1]), (50, 2, [1, 0])):
        (places,), chosen = choose_rows([rows], tables, sizes, room)
        assert (chosen, list(places)) == ({"table": table}, wide)
    with pytest.raises(RecipeError, match="has room for 39 bits, and the rows take at least 40"):
        choose_rows([rows], tables, sizes, 39)


def test_rows_get_their_bits_and_beat_even_bits(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    model, kl = folders["llama_tied"], {}
    for out, change in {"rows": ROWS, "even": "weights.bits=3"}.items():
        manifest = pipeline.run(job(model, tmp_path / out, corpus, "gptq", change))
        assert manifest["bits"]["per_weight"] <= BUDGET
        scores = gq.evaluate(tmp_path / out, corpus, model, window=32, tokenizer=tiny_models.tokenizer())
        kl[out] = scores["kl"]
    assert kl["rows"] < 0.9 * kl["even"]
    store = open_model(tmp_path / "rows")
    allocation = json.loads((tmp_path / "rows" / "gyroquant.json").read_text())["allocation"]
    assert "row_places" not in allocation
    for name, counts in allocation["rows"].items():
        weight = store.quantized(name)
        assert isinstance(weight.grid, MixedRowsGrid)
        places = weight.grid.places(weight.params)
        assert counts == {str(width): int((places == at).sum()) for at, width in enumerate((2, 3, 4))}
        assert allocation["bits"][name] == pytest.approx(float(places.double().mean()) + 2)
    stored = sum(store.quantized(name).bits for name in allocation["rows"])
    weights = sum(store.graph.op(name).numel for name in allocation["rows"])
    assert allocation["per_weight"] == pytest.approx(stored / weights)


def test_the_codes_of_a_width_are_those_of_a_whole_layer_of_it(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    """The first block sees the same inputs whatever the bits, and rows do not depend on each other."""
    changes = ["weights.true_sequential=false", "weights.refine={passes: 1}"]
    pipeline.run(job(folders["llama_tied"], tmp_path / "rows", corpus, "gptq", ROWS, *changes))
    rows = open_model(tmp_path / "rows")
    for place, bits in enumerate((2, 3, 4)):
        even = [f"weights.bits={bits}", *changes]
        pipeline.run(job(folders["llama_tied"], tmp_path / str(bits), corpus, "gptq", *even))
        whole = open_model(tmp_path / str(bits))
        found = 0
        for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
            weight, expected = (store.quantized(f"model.layers.0.{name}.weight") for store in (rows, whole))
            assert isinstance(weight.grid, MixedRowsGrid)
            index = weight.grid.places(weight.params) == place
            assert torch.equal(weight.codes[index], expected.codes[index])
            assert torch.equal(weight.dequantize()[index], expected.dequantize()[index])
            found += int(index.sum())
        assert found > 2


FULL = [
    "transform.R1.method=hadamard",
    "weights.target={share: auto}",
    "weights.refine={passes: 1}",
    "weights.guided={groups: 2}",
    "weights.tune={iters: 2, batch_size: 2}",
    "embeddings={bits: 4, group_size: 16}",
    "keep_ties=true",
    "finetune={steps: 2, held_out: 2}",
]


def test_it_composes_in_a_file_of_a_given_size(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    size = 46_000
    allocate = ROWS.replace(f"budget: {BUDGET}", f"bytes: {size}, embeddings: [2, 4, 8]")
    manifest = pipeline.run(job(folders["llama_tied"], tmp_path / "out", corpus, "gptq", allocate, *FULL))
    assert 0.97 * size < (tmp_path / "out" / "model.safetensors").stat().st_size <= size
    assert not any("no layer may have more bits" in text for text in manifest["warnings"])
    loaded, ids = gq.load(tmp_path / "out", dtype=torch.float32), torch.arange(12)[None]
    store = open_model(tmp_path / "out")
    for name in manifest["allocation"]["rows"]:
        assert torch.equal(loaded.get_parameter(name), store.quantized(name).dequantize())
    exported = gq.export(tmp_path / "out", "dense", tmp_path / "dense")
    assert exported["check"]["runtime"] == "transformers"
    assert bool(loaded(ids).logits.isfinite().all())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ([ROWS.replace("costs: gradient, ", "")], "set costs: gradient"),
        ([ROWS, "weights.grid=float_zero"], "needs the grid integer, not float_zero"),
        ([ROWS, "weights.low_rank={}"], "leave low_rank out"),
        (["weights={grid: mixed_rows}"], "weights.grid is made by weights.allocate with granularity: rows"),
        (["activations={grid: mixed_rows}"], "activations.grid is made by weights.allocate"),
        ([ROWS.replace("granularity: rows", "granularity: columns")], "granularity"),
        ([ROWS, "weights.guided={kronecker: tokens}"], "leave guided.kronecker out, or take granularity: layers"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        gq.load_recipe("gptq", changes)


def test_models_and_formats_that_cannot_have_them_are_refused(
    folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="granularity: rows needs the gradient at every layer, but"):
        job(folders["mixtral"], tmp_path / "out", corpus, "gptq", ROWS)
    with pytest.raises(RecipeError, match="2 bits take"):
        job(folders["llama_tied"], tmp_path / "out", corpus, "gptq", ROWS.replace(str(BUDGET), "3.14"))
    needs = requirements_of_job(job(folders["llama_tied"], tmp_path / "out", corpus, "gptq", ROWS))
    for name, kind in Format.registry.items():
        problems = kind().incompatibilities(needs)
        assert bool(problems) == (name not in {"dense", "archive"}), (name, problems)
    with pytest.raises(InputError, match="mixed_rows"):
        check_fit(Format.registry["mlx"](), needs)


def test_a_recipe_without_rows_is_written_as_before() -> None:
    plain = gq.load_recipe("gyro-w2")
    assert "granularity" not in plain.to_dict()["weights"]["allocate"]
    rows = gq.load_recipe("gyro-w2", ["weights.allocate.granularity=rows"])
    assert gq.load_recipe(rows.to_dict()) == rows != plain
