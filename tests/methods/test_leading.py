"""Principal directions first: what the map does to vectors, and what it gains on inputs with a strong low-rank part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_runs import run
from torch import Tensor

import gyroquant as gq
from gyroquant.calibration.observers import SecondMoments
from gyroquant.errors import InputError, RecipeError
from gyroquant.formats.base import Format, requirements_of
from gyroquant.grids import IntegerGrid, LeadingGrid
from gyroquant.maps import Map, hadamard
from gyroquant.methods import Context, Leading
from gyroquant.models.graph.sites import find_sites
from gyroquant.models.stores.base import ModuleStore
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.planning import plan_all

SITE = find_sites(ModuleStore(tiny_models.build("llama")).graph, "R1")[0]  # 64 coordinates


def vectors(tokens: int = 500) -> Tensor:
    """Inputs of which a few hidden directions, in no axis, are twenty times as large as the others."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(tokens, 64, generator=generator)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q
    return (x * torch.where(torch.arange(64) < 8, 20.0, 1.0)) @ basis.T


def chosen(method: Leading, x: Tensor, weights: list[Tensor]) -> Map:
    observer = SecondMoments(64)
    observer(x)
    return method.choose(SITE, Context(1, 16, {SecondMoments: observer}, lambda: iter(weights)))


@pytest.mark.parametrize("block", ["full", 32])
def test_directions_are_ordered_by_variance_and_spread(block: Any) -> None:
    x, size = vectors().double(), 64 if block == "full" else 32
    turned = chosen(Leading(weights=False, block=block), x, []).apply(x)
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1))
    for start in range(0, 64, size):
        part, before = turned[:, start : start + size], x[:, start : start + size]
        gram = part.T @ part
        assert gram[:8, 8:].abs().max() < 1e-4 * gram.diagonal().max()  # the two parts are not correlated
        values = torch.linalg.eigvalsh(before.T @ before).flip(0)
        assert torch.allclose(torch.linalg.eigvalsh(gram[:8, :8]).flip(0), values[:8], rtol=1e-3)
        lead = gram.diagonal()[:8]
        assert torch.allclose(lead, lead.mean().expand(8), rtol=1e-3)  # an order of 8 has a Hadamard matrix


def test_weights_count_as_much_as_inputs() -> None:
    """With inputs and weights that are large in different directions, the joint directions hold both."""
    x, generator = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    x[:, :4] *= 20
    weight = torch.randn(900, 64, generator=generator)
    weight[:, 40:44] *= 20
    for joint, kept in ((True, [*range(4), *range(40, 44)]), (False, [*range(4)])):
        dense = chosen(Leading(weights=joint), x, [weight[:400], weight[400:]]).dense()
        inside = dense[:, :8].square().sum(1)  # the share of every old axis that lies in the leading directions
        assert bool((inside[kept] > 0.9).all())
        assert joint == bool((inside[40:44] > 0.9).all())


def test_four_bits_lose_less_than_after_a_plain_rotation() -> None:
    x = vectors()
    turned = chosen(Leading(weights=False), x, []).apply(x)
    spread = hadamard(64).apply(x)
    plain = IntegerGrid(bits=5, group_size=-1, scale="minmax").fake(spread)  # more bits than 4.5
    error = (LeadingGrid(group_size=-1, scale="minmax").fake(turned) - turned).norm()
    assert error < 0.5 * (plain - spread).norm()


MAPS = ["transform.R1.method=leading", "transform.R2={method: leading, share: 0.5}", "transform.R4.method=hadamard"]
INPUTS = "activations={grid: leading, bits: 4, group_size: -1, scale: minmax}"


def test_it_gains_on_both_sides(corpus: Path, tmp_path: Path) -> None:
    """A model whose residual stream has a few large directions: weights and inputs in 4.5 bits against 5."""
    model, errors, ids = tiny_models.build("llama"), {}, torch.arange(24)[None]
    generator = torch.Generator().manual_seed(3)
    large = torch.linalg.qr(torch.randn(64, 4, generator=generator)).Q
    with torch.no_grad():
        model.model.embed_tokens.weight += model.model.embed_tokens.weight @ large @ large.T * 10
        expected = model(input_ids=ids).logits
    for name, changes in {
        "leading": [*MAPS, INPUTS],
        "hadamard": [
            *(f"transform.{site}.method=hadamard" for site in ("R1", "R2", "R4")),
            "activations={bits: 4, group_size: -1, scale: minmax}",
        ],
    }.items():
        run(model, tmp_path / name, "rtn", corpus, "weights.bits=8", *changes)
        with torch.no_grad():
            errors[name] = float((gq.load(tmp_path / name)(input_ids=ids).logits - expected).norm() / expected.norm())
    assert errors["leading"] < errors["hadamard"]


QUARTER = [
    "transform.R1={method: leading, share: 0.25}",
    "transform.R4.method=hadamard",
    "weights={grid: leading, bits: 2, group_size: 16, solver: gptq, refine: {passes: 1}}",
    "activations={grid: leading, bits: 4, group_size: -1}",
]


def test_weights_and_inputs_of_a_run(corpus: Path, tmp_path: Path) -> None:
    """Layers that read R1 have the grid, others the integer grid; it is stored, loaded and counted."""
    model, out = tiny_models.build("llama"), tmp_path / "out"
    manifest = run(model, out, "gptq", corpus, *QUARTER)
    store, loaded = open_model(out), gq.load(out, dtype=torch.float32)
    kinds = {}
    for name in store.description["tensors"]:
        weight = store.quantized(name)
        kinds[name.split(".")[-2]] = weight.grid
        matrix = store.graph.op(name).to_param(weight.dequantize())
        assert torch.equal(loaded.get_parameter(name), matrix)
    expected = LeadingGrid(bits=2, group_size=16, period=64, share=0.25)
    assert kinds["q_proj"] == kinds["up_proj"] == expected
    assert kinds["down_proj"] == kinds["o_proj"] == IntegerGrid(bits=2, group_size=16)
    description = json.loads((out / "config.json").read_text())["quantization_config"]
    inputs = {entry["module"].split(".")[-1]: description["grids"][entry["grid"]] for entry in description["inputs"]}
    assert (inputs["q_proj"]["grid"], inputs["q_proj"]["period"]) == ("leading", 64)
    assert inputs["down_proj"]["grid"] == "integer"
    assert manifest["bits"]["per_weight"] == store.bits_per_weight()
    for name, kind in Format.registry.items():
        problems = kind().incompatibilities(requirements_of(store))
        assert bool(problems) == (name != "archive"), (
            name
        )  # the inputs are rounded online, and only gyroquant runs that


def test_plain_numbers_hold_the_weights(corpus: Path, tmp_path: Path) -> None:
    run(tiny_models.build("llama"), tmp_path / "out", "rtn", corpus, QUARTER[0], QUARTER[2].replace("gptq", "rtn"))
    gq.export(tmp_path / "out", "dense", tmp_path / "dense")
    with pytest.raises(InputError, match="leading"):
        gq.export(tmp_path / "out", "onnx", tmp_path / "onnx")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["activations={grid: leading}"], "set transform.R1.method=leading"),
        (["weights={grid: leading}"], "set transform.R1.method=leading"),
        (["weights.overrides=[{layers: [q_proj], grid: leading}]"], "set transform.R1.method=leading"),
        ([*MAPS, "embeddings={grid: leading}"], "embeddings cannot have the grid leading"),
        ([*MAPS, "kv_cache={grid: leading}"], "the KV cache takes integer grids only"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: list[str], problem: str) -> None:
    with pytest.raises(RecipeError, match=problem):
        gq.load_recipe("rtn", changes)


@pytest.mark.parametrize(
    ("size", "problem"), [(16, "does not divide the 8 leading columns of 64"), (-1, "needs a group_size for weights")]
)
def test_group_sizes_that_do_not_fit_are_refused_before_any_work(size: int, problem: str) -> None:
    recipe = gq.load_recipe("rtn", ["transform.R1.method=leading", f"weights={{grid: leading, group_size: {size}}}"])
    with pytest.raises(RecipeError, match=problem):
        plan_all(ModuleStore(tiny_models.build("llama")).graph, recipe)
