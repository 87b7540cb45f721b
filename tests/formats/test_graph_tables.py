"""Rounded tables of embeddings, and heads, as the graphs of our own hold them: the same numbers, from codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from graph_formats import GRAPH_FORMATS, GraphFormat, close
from tiny_runs import run

from gyroquant.formats.base import Layer, format_named
from gyroquant.formats.export import export, open_saved
from gyroquant.formats.operations import wider_codes
from gyroquant.grids import Basis, IntegerGrid, QuantizedWeight
from gyroquant.models.execution.online import OnlineMap

IDS = torch.tensor([[0, 5, 23], [7, 7, 1]])


@pytest.fixture(params=GRAPH_FORMATS.values(), ids=GRAPH_FORMATS)
def graphs(request: pytest.FixtureRequest) -> GraphFormat:
    """Each format whose runtime is installed."""
    pytest.importorskip(request.param.package)
    return request.param


def table(grid: IntegerGrid, columns: int, basis: Basis | None = None) -> QuantizedWeight:
    """A rounded table of 24 rows, of which one is zero, as are rows of tokens that no model has seen."""
    rows = torch.randn(24, columns, generator=torch.Generator().manual_seed(0))
    rows[5] = 0
    values = rows if basis is None else basis.encode(rows)
    width = values.shape[1]
    groups = values.view(24, -1, grid.group_of(width))
    params = grid.fit(groups)
    return QuantizedWeight(grid, grid.encode(groups, params).view(24, width), params, basis)


def looked_up_and_multiplied(graphs: GraphFormat, weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of a table, and their products with the same table as the matrix of a tied head, by one graph."""

    def build(ops: Any, ids: Any) -> Any:
        rows = ops.looked_up(ids, weight)
        return ops.concatenated([rows, ops.rounded(rows, weight)])

    columns = weight.codes.shape[1] if weight.basis is None else weight.basis.columns
    both = graphs.compute(build, IDS)
    return both[..., :columns], both[..., columns:]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", [{"symmetric": False}, {"symmetric": True}, {"symmetric": True, "midrise": True}])
@pytest.mark.parametrize(("columns", "group_size"), [(96, 32), (96, -1), (576, 64), (576, 48)])
def test_rows_and_products_of_every_grid_are_exact(
    bits: int, kind: dict[str, bool], columns: int, group_size: int, graphs: GraphFormat
) -> None:
    weight = table(IntegerGrid(bits=bits, group_size=group_size, **kind), columns)
    values = weight.dequantize()
    rows, products = looked_up_and_multiplied(graphs, weight)
    assert close(rows, values[IDS])
    assert close(products, values[IDS] @ values.T)
    if not kind.get("midrise") and bits > 1:  # the other grids have no zero
        assert not rows[IDS == 5].any()


@pytest.mark.parametrize("order", [96, 128])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_table_in_a_basis_is_exact(order: int, scaled: bool, graphs: GraphFormat) -> None:
    basis = Basis(96, order, (torch.rand(1, order) + 0.5).half().float() if scaled else None)
    weight = table(IntegerGrid(bits=4, group_size=32, symmetric=False), 96, basis)
    values = weight.dequantize()
    rows, products = looked_up_and_multiplied(graphs, weight)
    assert close(rows, values[IDS])
    assert close(products, values[IDS] @ values.T)


TIED = ("embeddings.symmetric=true", "keep_ties=true")
ASYMMETRIC = ("embeddings.symmetric=false", "keep_ties=true")
HEAD = ("embeddings.symmetric=true", "weights.ignore=[]")
OTHER_HEAD = ("embeddings.symmetric=true", "head.bits=2", "head.group_size=64", "head.symmetric=true")
CASES = {  # name of the model, preset, bits and groups of the table, other settings
    "tied, 2 bits": ("llama_tied", "rtn-w4", 2, 64, TIED),
    "tied, one scale a row": ("llama_tied", "rtn-w4", 8, -1, TIED),
    "tied, 4 bits, R1 fused": ("llama_tied", "gsr-w4", 4, 64, TIED),
    "tied, 2 bits asymmetric, R1 fused": ("llama_tied", "gsr-w4", 2, -1, ASYMMETRIC),
    "tied, 6 bits, with a multiplier and a divisor, R1 fused": ("granite", "gsr-w4", 6, 64, TIED),
    "tied, 4 bits asymmetric, with a scale": ("gemma3", "rtn-w4", 4, 64, ASYMMETRIC),
    "untied, 4 bits": ("llama", "gsr-w4", 4, -1, HEAD),
    "untied, 3 bits, and a head of 2": ("llama", "gsr-w4", 3, 64, OTHER_HEAD),
}


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_the_saved_model(case: str, graphs: GraphFormat, corpus: Path, tmp_path: Path) -> None:
    """A prompt, single tokens after it and a padded batch; with rows of zeros, as of padding of the vocabulary."""
    name, preset, bits, group_size, settings = CASES[case]
    model = tiny_models.build(name, hidden_size=128)
    with torch.no_grad():
        model.get_input_embeddings().weight[90:] = 0
    settings = (*settings, f"embeddings.bits={bits}", f"embeddings.group_size={group_size}")
    run(model, tmp_path / "out", preset, corpus, "weights.bits=8", "weights.group_size=32", *settings)
    store = open_saved(tmp_path / "out")
    assert ("lm_head.weight" in store.description["tensors"]) == (name == "llama")
    online = {op.module for op in store.online if isinstance(op, OnlineMap)}
    assert ({"model.norm", "lm_head"} <= online) == (preset == "gsr-w4" and bool(store.graph.tied))
    check = export(tmp_path / "out", graphs.name, tmp_path / "x")["check"]
    for part in ("prompt_error", "step_error", "batch_error"):
        assert check[part] < 1e-5


def test_codes_in_a_wider_type_are_named() -> None:
    layers = [Layer(f"{i}", IntegerGrid(bits=3, group_size=32, symmetric=True), 64) for i in range(3)]
    layers.append(Layer("embed", IntegerGrid(bits=6, group_size=32, symmetric=True), 64, table=True))
    assert wider_codes(layers, lambda layer: 4 if layer.grid.bits == 3 else 8) == {
        "wider_codes": ["3 bits in 4: 3 layers", "6 bits in 8: embed"]
    }
    assert wider_codes(layers, lambda layer: int(layer.grid.bits)) == {}


def test_the_manifest_names_the_table(graphs: GraphFormat, corpus: Path, tmp_path: Path) -> None:
    settings = ("embeddings.bits=6", "embeddings.group_size=32", "weights.bits=4", "weights.group_size=32")
    run(tiny_models.build("llama_tied"), tmp_path / "out", "rtn-w4", corpus, *settings)
    assert format_named(graphs.name).capabilities.tables
    manifest = export(tmp_path / "out", graphs.name, tmp_path / "x", check=False)
    assert manifest["facts"]["wider_codes"] == ["6 bits in 8: model.embed_tokens.weight"]


def test_turned_rows_run_in_a_model_whose_stream_cannot_turn(graphs: GraphFormat, corpus: Path, tmp_path: Path) -> None:
    """Gemma 3 with R1 online and maps of the table's rows, checked on a prompt and on single tokens after it."""
    step = "{method: hadamard, random_signs: true, online: fallback}"
    changes = [f"transform.R1={step}", "transform.embeddings={method: hadamard}", "weights.bits=8"]
    table_of_8 = "embeddings={bits: 8, group_size: 16}"
    run(tiny_models.build("gemma3"), tmp_path / "out", "gptq-w4", corpus, *changes, table_of_8)
    check = export(tmp_path / "out", graphs.name, tmp_path / "export")["check"]
    assert max(check["prompt_error"], check["step_error"], check["batch_error"]) < 1e-5
    assert check["greedy_tokens_alike"] == check["as_it_runs"]["greedy_tokens_alike"] == check["greedy_tokens"]
