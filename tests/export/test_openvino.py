"""What OpenVINO alone has: constants that stay compressed, settings in the file. For the rest see `test_decoders`."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from graph_formats import saved

from gyroquant.deploy import export

ov = pytest.importorskip("openvino", reason="OpenVINO is not installed")


def test_weights_stay_compressed(tmp_path: Path) -> None:
    """Two bits a code in the file; a mid-rise grid, whose zero lies between two codes, as well."""
    model = tiny.build("llama", hidden_size=128, intermediate_size=256, vocab_size=96)
    out = saved(model, tmp_path / "out", {}, bits=2, symmetric=True, midrise=True, group_size=-1)
    export(out, "openvino", tmp_path / "ir")
    graph = ov.Core().read_model(str(tmp_path / "ir" / "openvino_model.xml"))
    kinds = [op.get_element_type() for op in graph.get_ops() if op.get_type_name() == "Constant"]
    assert kinds.count(ov.Type.u2) == 14
    assert graph.get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).astype(str) == "0"
