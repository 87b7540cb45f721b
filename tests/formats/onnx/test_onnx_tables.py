"""Tables of embeddings stay codes in ONNX files: a lookup and a tied head read the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tiny_runs import run

from gyroquant.formats.export import export

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
WORDS, WIDTH = 96, 128


def graph_of(name: str, corpus: Path, folder: Path, *settings: str) -> Any:
    """The graph of a tiny model with a rounded table."""
    model = tiny_models.build(name, hidden_size=WIDTH, intermediate_size=64)
    common = ("weights.bits=4", "weights.group_size=32", "embeddings.group_size=32")
    run(model, folder / "out", "gsr-w4", corpus, *common, *settings)
    export(folder / "out", "onnx", folder / "x", check=False)
    return onnx.load(folder / "x" / "model.onnx", load_external_data=False).graph


def nodes(graph: Any, kind: str) -> list[Any]:
    return [node for node in graph.node if node.op_type == kind]


def attributes(node: Any) -> dict[str, Any]:
    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


@pytest.mark.parametrize(("bits", "held"), [(2, 2), (3, 4), (4, 4), (6, 8)])
@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_a_tied_table_is_stored_once(bits: int, held: int, symmetric: str, corpus: Path, tmp_path: Path) -> None:
    settings = (f"embeddings.bits={bits}", f"embeddings.symmetric={symmetric}", "keep_ties=true")
    graph = graph_of("llama_tied", corpus, tmp_path, *settings)
    (lookup,), heads = nodes(graph, "GatherBlockQuantized"), nodes(graph, "MatMulNBits")
    head = next(node for node in heads if attributes(node)["N"] == WORDS)
    assert (attributes(lookup)["bits"], attributes(head)["bits"]) == (held, held)
    assert all(attributes(node)["axis"] == -1 for node in nodes(graph, "Gather"))  # those are permutations
    assert list(lookup.input[2:]) == list(head.input[2:])  # scales, and zero points if there are any
    assert len(lookup.input) == 4 - (symmetric == "true")
    stored = {constant.name: constant for constant in graph.initializer}
    rows, blocks = stored[lookup.input[0]], stored[head.input[1]]
    assert list(rows.dims) == [WORDS, WIDTH * held // 8]
    assert list(blocks.dims) == [WORDS, WIDTH // 32, 32 * held // 8]
    places = [{one.key: one.value for one in constant.external_data} for constant in (rows, blocks)]
    assert places[0] == places[1]
    others = [constant for constant in graph.initializer if constant is not rows and constant.external_data]
    lengths = sum(int(one.value) for constant in others for one in constant.external_data if one.key == "length")
    assert lengths <= (tmp_path / "x" / "model.onnx.data").stat().st_size < lengths + 64 * len(others)


def test_a_table_and_a_head_of_their_own(corpus: Path, tmp_path: Path) -> None:
    graph = graph_of("llama", corpus, tmp_path, "embeddings.bits=8", "weights.ignore=[]")
    (lookup,), heads = nodes(graph, "GatherBlockQuantized"), nodes(graph, "MatMulNBits")
    head = next(node for node in heads if attributes(node)["N"] == WORDS)
    assert (attributes(lookup)["bits"], attributes(head)["bits"]) == (8, 4)
    assert lookup.input[2] != head.input[2]
