"""What OpenVINO alone has: constants that stay compressed, settings in the file. For the rest see `test_decoders`."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
from graph_formats import saved
from hypothesis import given
from hypothesis import strategies as st

from gyroquant.formats.base import Layer, ModelRequirements, format_named
from gyroquant.formats.export import export
from gyroquant.formats.openvino.layout import MODEL, held_group
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
