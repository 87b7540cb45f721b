"""Advice on Hadamard matrices: errors equal those of a layer that is really turned, and known cases are told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch.nn.functional import linear

from gyroquant.errors import RecipeError
from gyroquant.evaluation.hadamard_advice import HadamardAdvice, LayerAdvice, SampledSpread, turning_map
from gyroquant.evaluation.outliers import measure_outliers
from gyroquant.grids import E8pGrid, Grid, IntegerGrid
from gyroquant.inspection.model import inspect_model
from gyroquant.models.stores.source import open_model
from gyroquant.report import layer_tables
from gyroquant.rounding.activations import Activations
from gyroquant.rounding.solvers.rtn import RoundToNearest

GRID = IntegerGrid(bits=4, group_size=16, symmetric=False)
INPUTS = Activations(grid=IntegerGrid(bits=4, group_size=-1, symmetric=False))


def advised(model: Any, grid: Grid = GRID, activations: Activations | None = None) -> HadamardAdvice:
    store = open_model(model)
    advice = HadamardAdvice(store.graph, grid, activations)
    measure_outliers(store, tiny_models.tokens(model), advice=advice)
    return advice


def layer(advice: HadamardAdvice, name: str, block: int = 0) -> LayerAdvice:
    (found,) = [one for one in advice.layers if one.block == block and one.layer.endswith(name)]
    return found


@torch.no_grad()
def test_errors_are_those_of_the_layer() -> None:
    """On the inputs of the whole model, which has fewer tokens and rows than are sampled."""
    model, seen = tiny_models.build("llama"), []
    module = model.model.layers[1].mlp.down_proj
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().reshape(-1, 96)))
    found = layer(advised(model, activations=INPUTS), "down_proj", 1)
    x, weight = seen[-1], module.weight.detach()
    turn, order = turning_map(96)
    assert turn is not None
    assert found.order == order == 96
    matrix = turn.dense().float()
    assert torch.allclose(matrix @ matrix.T, torch.eye(96), atol=1e-5)
    exact = linear(x, weight)

    def error(vectors: torch.Tensor, numbers: torch.Tensor) -> float:
        return float((linear(vectors, numbers) - exact).square().sum() / exact.square().sum())

    def rounded(numbers: torch.Tensor) -> torch.Tensor:
        return RoundToNearest().solve(numbers, GRID).dequantize()

    assert found.weights == pytest.approx(error(x, rounded(weight)), rel=1e-4)
    assert found.weights_turned == pytest.approx(error(x @ matrix, rounded(weight @ matrix)), rel=1e-4)
    fake = INPUTS.grid.fake
    assert found.both == pytest.approx(error(fake(x), rounded(weight)), rel=1e-4)
    assert found.both_turned == pytest.approx(error(fake(x @ matrix), rounded(weight @ matrix)), rel=1e-4)


def test_it_helps_where_inputs_have_outliers_and_not_where_weights_lie_on_the_grid() -> None:
    model = tiny_models.build("llama")
    with torch.no_grad():
        first, second = model.model.layers
        first.input_layernorm.weight[3] *= 30  # one large channel, which the layer reads with small weights
        first.self_attn.v_proj.weight[:, 3] /= 30
        for module in (second.mlp.gate_proj, second.self_attn.q_proj):
            on_grid = RoundToNearest().solve(module.weight, GRID).dequantize()
            module.weight.copy_(on_grid)
    plain, with_inputs = advised(model), advised(model, activations=INPUTS)
    assert layer(with_inputs, "v_proj").helps
    assert layer(with_inputs, "v_proj").both_turned < 0.5 * layer(with_inputs, "v_proj").both
    for name in ("gate_proj", "q_proj"):
        found = layer(plain, name, 1)
        assert found.weights < 1e-9 < found.weights_turned
        assert not found.helps
        assert found.both is None


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "qwen2_moe"])
def test_every_layer_is_measured_or_named(name: str) -> None:
    model = tiny_models.build(name)
    advice = advised(model)
    expected = {op.name for op in open_model(model).graph.block_linears if op.entry.quantize}
    assert {one.layer for one in advice.layers} | set(advice.left_out) == expected
    assert not advice.left_out
    assert all(0 < one.weights < 0.1 for one in advice.layers)


def test_what_does_not_fit_is_named() -> None:
    advice = advised(tiny_models.build("llama"), IntegerGrid(bits=4, group_size=64))
    assert {name.rpartition(".")[2] for name in advice.left_out} == {"down_proj"}  # of 96 inputs
    assert all("64" in reason for reason in advice.left_out.values())
    shown = layer_tables.hadamard_advice(advice)
    assert shown[1].startswith("not measured, 2 layers: ")
    with pytest.raises(RecipeError):
        HadamardAdvice(open_model(tiny_models.build("llama")).graph, GRID, Activations(grid=IntegerGrid(group_size=48)))


def test_grids_that_code_rows_together_are_measured_in_tiles() -> None:
    advice = advised(tiny_models.build("llama"), E8pGrid(group_size=-1))
    assert not advice.left_out
    assert all(0.01 < one.weights < 0.3 for one in advice.layers)


def test_orders() -> None:
    assert turning_map(96)[1] == 96
    assert turning_map(6)[1] == 2
    assert turning_map(7) == (None, 1)


def test_a_sample_of_any_batches_is_even() -> None:
    numbers = torch.arange(5000.0)[:, None].expand(-1, 2)
    spread = SampledSpread(2)
    for part in numbers.split((1000, 1, 999, 3000)):
        spread(part)
    kept = spread.vectors[:, 0]
    assert 256 <= len(kept) <= 512
    assert torch.equal(kept, torch.arange(len(kept)) * (kept[1] - kept[0]))


def test_inspect_shows_it_for_the_grids_of_a_recipe(folders: dict[str, Path], corpus: Path) -> None:
    small = ["weights.group_size=16", "calibration.nsamples=4", "calibration.seqlen=32"]
    plain = inspect_model(folders["llama"], changes=small, text=corpus)
    data = json.loads(json.dumps(plain.to_dict()["hadamard"]))
    assert data["grid"]["bits"] == 4
    assert data["activations"] is None
    assert {"layer", "block", "order", "weights", "weights_turned", "both", "both_turned", "helps"} == set(
        data["layers"][0]
    )
    (shown,) = layer_tables.hadamard_advice(plain.advice)
    assert [str(column.header) for column in shown.columns][2:] == ["weights", "turned", "helps"]
    assert [str(cell) for cell in shown.columns[0].cells] == [
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ]
    rounding = inspect_model(folders["llama"], changes=[*small, "activations={bits: 4, group_size: 16}"], text=corpus)
    assert rounding.advice is not None
    (shown,) = layer_tables.hadamard_advice(rounding.advice)
    assert len(shown.columns) == 7
    assert all(one.both is not None and one.both > one.weights * 0.5 for one in rounding.advice.layers)
    assert inspect_model(folders["llama"]).to_dict()["hadamard"] is None
