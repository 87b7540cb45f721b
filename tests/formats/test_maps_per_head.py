"""Rotations of single kv heads (R3) cannot be exported: the error says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_runs import run

import gyroquant as gq

pytest.importorskip("onnx")


def test_the_export_names_the_setting(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    changes = ["weights.bits=4", "weights.group_size=16", "transform.R3.method=oscar"]
    run(folders["llama"], tmp_path / "out", "rtn", corpus, *changes)
    with pytest.raises(gq.UnsupportedModelError, match="per_head=false"):
        gq.export(tmp_path / "out", "onnx", tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
