"""What OpenVINO alone has: constants that stay compressed, settings in the file. For the rest see `test_decoders`."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
import torch
from graph_formats import saved
from hypothesis import given
from hypothesis import strategies as st

import gyroquant as gq
from gyroquant.formats.base import Layer, ModelRequirements, format_named
from gyroquant.formats.export import export
from gyroquant.formats.openvino.layout import MODEL, held_group
from gyroquant.formats.openvino.runtime import exact_settings, infer
from gyroquant.grids import IntegerGrid

ov = pytest.importorskip("openvino", reason="OpenVINO is not installed")


def test_weights_stay_compressed(tmp_path: Path) -> None:
    """Two bits a code in the file; a mid-rise grid, whose zero lies between two codes, as well."""
    model = tiny_models.build("llama", hidden_size=128, intermediate_size=256, vocab_size=96)
    out = saved(model, tmp_path / "out", {}, bits=2, symmetric=True, midrise=True, group_size=-1)
    export(out, "openvino", tmp_path / "ir")
    graph = ov.Core().read_model(str(tmp_path / "ir" / MODEL))
    kinds = [op.get_element_type() for op in graph.get_ops() if op.get_type_name() == "Constant"]
    assert kinds.count(ov.Type.u2) == 2 * 4  # q, k and v are one product, and gate and up are
    assert not [op for op in graph.get_ops() if op.get_type_name() == "ReduceSum"]  # nothing is corrected
    assert graph.get_rt_info(["runtime_options", "KV_CACHE_PRECISION"]).astype(str) == "f16"
    assert not graph.has_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])  # slow


def compiled(folder: Path, settings: dict[str, str]) -> list[str]:
    """The types of the weights of products as the plugin runs them."""
    graph = ov.Core().compile_model(str(folder / MODEL), "CPU", settings).get_runtime_model()
    products = [op for op in graph.get_ops() if op.get_rt_info()["layerType"].astype(str) == "FullyConnected"]
    return [op.input_value(1).get_element_type().get_type_name() for op in products]


@pytest.mark.parametrize(("bits", "kind"), [(2, "u2"), (3, "i4"), (4, "i4"), (8, "i8")])
def test_weights_with_float_zero_points_stay_compressed(bits: int, kind: str, tmp_path: Path) -> None:
    """In the file, and in the plugin, exactly and by default. At 2 bits zero points are constants of fp16."""
    model = tiny_models.build("llama", hidden_size=128, intermediate_size=256, vocab_size=96)
    weights = {"grid": "float_zero", "bits": bits, "group_size": 32, "solver": "rtn"}
    saved_models.rounded(model, tmp_path / "out", more={"weights": weights})
    export(tmp_path / "out", "openvino", tmp_path / "ir")
    graph = ov.Core().read_model(str(tmp_path / "ir" / MODEL))
    constants = [op for op in graph.get_ops() if op.get_type_name() == "Constant"]
    assert [op.get_element_type().get_type_name() for op in constants].count(kind) == 2 * 4
    corrected = [op for op in graph.get_ops() if op.get_type_name() == "ReduceSum"]
    assert bool(corrected) == (bits > 2)
    ids = tiny_models.tokens(model, 1, 16)
    with torch.no_grad():
        wanted = gq.load(tmp_path / "out", dtype="float32")(input_ids=ids).logits[0]
    for settings, limit in ((exact_settings(), 1e-5), ({}, 0.05)):
        assert compiled(tmp_path / "ir", settings).count(kind) == 2 * 4, settings
        request = ov.Core().compile_model(str(tmp_path / "ir" / MODEL), "CPU", settings).create_infer_request()
        pieces = [(ids[:, :8], 8), *((ids[:, i : i + 1], i + 1) for i in range(8, 16))]
        found = torch.cat([infer(request, part, torch.ones(1, end, dtype=torch.long))[0] for part, end in pieces])
        assert (found - wanted).abs().max() < limit * wanted.abs().max(), settings


@pytest.mark.parametrize("kind", [{"grid": "float_zero"}, {"symmetric": True, "midrise": True}])
@pytest.mark.parametrize("bits", [2, 4])
def test_scales_and_zero_points_take_16_bits_each(bits: int, kind: dict[str, Any], tmp_path: Path) -> None:
    """Also where the graph uses scales twice: in the product and in what is added to it."""
    model = tiny_models.build("llama", hidden_size=128, intermediate_size=256, vocab_size=96)
    sizes = {}
    for group in (16, 32):
        weights = {"bits": bits, "group_size": group, "solver": "rtn"} | kind
        store = saved_models.rounded(model, tmp_path / f"out{group}", more={"weights": weights})
        export(tmp_path / f"out{group}", "openvino", tmp_path / f"ir{group}")
        sizes[group] = (tmp_path / f"ir{group}" / MODEL).with_suffix(".bin").stat().st_size
    numbers = sum(prod(store.shapes[name]) for name in store.description["tensors"])
    more = numbers // 32 * (4 if "grid" in kind else 2)  # bytes of one more group in 32 weights
    assert sizes[16] - sizes[32] == pytest.approx(more, rel=0.02)


@given(st.integers(1, 256), st.integers(1, 40))
def test_groups_are_held_in_powers_of_two_or_whole_rows(group: int, count: int) -> None:
    held = held_group(group, group * count)
    assert group % held == 0
    assert (held == group) if count == 1 else held & (held - 1) == 0
    assert held == group or group // held % 2


def scales(folder: Path) -> set[int]:
    """How many scales the rows of each rounded matrix have."""
    graph = ov.Core().read_model(str(folder / MODEL))
    shapes = [list(op.get_output_shape(0)) for op in graph.get_ops() if op.get_type_name() == "Constant"]
    return {shape[1] for shape in shapes if len(shape) == 3 and shape[0] > 1 and shape[2] == 1}


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_repeated_scales_cost_is_said(symmetric: bool, tmp_path: Path) -> None:
    model = tiny_models.build("llama", hidden_size=96, head_dim=24, intermediate_size=96)
    sizes = {}
    for group in (48, 16):  # which the former is held as
        out = saved(model, tmp_path / f"out{group}", {}, group_size=group, symmetric=symmetric)
        facts = export(out, "openvino", tmp_path / f"x{group}")["facts"]
        sizes[group] = (tmp_path / f"x{group}" / MODEL).with_suffix(".bin").stat().st_size
        assert scales(tmp_path / f"x{group}") == {6}
        if group == 48:
            rows = 2 * (96 + 48 + 48 + 96 + 96 + 96 + 96)
            bits = 16 if symmetric else 20
            extra = {"groups": ["48 as 16"], "extra_bytes": rows * 4 * bits // 8}
            assert facts["repeated_scales"] == extra
        else:
            assert "repeated_scales" not in facts
    assert sizes[48] == sizes[16]


@pytest.mark.parametrize(("bits", "group"), [(4, 33), (2, 18), (8, 18), (1, 30), (3, 45), (6, 50)])
def test_groups_that_do_not_fill_bytes_are_refused_before_any_work(bits: int, group: int) -> None:
    layer = Layer("some.layer", IntegerGrid(bits=bits, group_size=group, symmetric=True), 12 * group)
    said = format_named("openvino").incompatibilities(ModelRequirements("llama", (layer,)))
    multiple = 2 if bits in (3, 4) else 4
    assert f"groups of {group} (some.layer)" in said[0]
    assert f"groups of {multiple} or multiples of it" in said[0]
