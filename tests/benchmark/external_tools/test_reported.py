"""Programs with a script of their own are held to what all are held to: one limit, one way to count files."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from external_tool_tasks import task
from safetensors.torch import load_file, save_file

from gyroquant.benchmark.external_tools import (
    ExternalTool,
    ExternalToolError,
    Size,
    ToolResult,
    brevitas,
    llama_cpp,
    nncf,
)
from gyroquant.models.stores.source import open_model

SAID = {"seconds": 1.0, "peak_memory_bytes": 1, "versions": {}, "stored_bytes": 61440 // 2, "weights": 61440}
CONSTANT = '<layer name="{}" type="Const"><data element_type="f32" offset="{}" size="{}" /></layer>'
PROGRAMS = [(brevitas, "GPTQ"), (nncf, "GPTQ"), (llama_cpp, "Q4_0")]


def run(monkeypatch: pytest.MonkeyPatch, module: Any, variant: str, model: Path, out: Path, error: float) -> ToolResult:
    """A run whose script leaves the model as it is, in fp32."""

    def run_script(python: Path, script: str, arguments: list[str], report: Path) -> dict[str, Any]:
        given = {name: Path(value) for name, value in itertools.pairwise(arguments)}
        if module is llama_cpp:
            shutil.copy(given["--plain"], given["--out"])
            shutil.copy(given["--plain"], given["--dense"])
        else:
            shutil.copytree(model, given["--dense"])
        weights = load_file(model / "model.safetensors")
        if module is brevitas:
            save_file(weights, given["--files"] / "model.safetensors")
        if module is nncf:
            sizes = [weight.nbytes for weight in weights.values()]
            layers = [CONSTANT.format(name, sum(sizes[:i]), sizes[i]) for i, name in enumerate(weights)]
            (given["--files"] / "openvino_model.xml").write_text(f"<net>{''.join(layers)}</net>")
        return {**SAID, "reload_error": error}

    monkeypatch.setattr(module, "run_script", run_script)
    (kind,) = (one for one in ExternalTool.registry.values() if one.__module__ == module.__name__)
    return kind().run(variant, task(model, out, Size(4, 64)), out / "python")


@pytest.mark.parametrize(("module", "variant"), PROGRAMS)
def test_sizes_are_at_16_bits(
    module: Any, variant: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = run(monkeypatch, module, variant, folders["llama"], tmp_path / "out", 1e-6)
    entries = sum(map(math.prod, open_model(folders["llama"]).shapes.values()))
    assert found.file_bytes == sum(path.stat().st_size for path in (tmp_path / "out" / "files").iterdir())
    assert found.bytes == found.file_bytes - 2 * entries
    parts = {"layers": 2 * 61440, "embeddings": 2 * 96 * 64, "head": 2 * 96 * 64}
    parts["rest"] = 2 * entries - sum(parts.values())
    assert found.weight_bytes == parts | {"total": 2 * entries}


@pytest.mark.parametrize(("module", "variant"), PROGRAMS)
def test_files_that_are_not_what_ran_are_refused(
    module: Any, variant: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = module.__name__.rpartition(".")[2].replace("_", ".")
    with pytest.raises(
        ExternalToolError, match=f"the files of {name} do not hold .* differ by 0.5 of their size, more than 0.1"
    ):
        run(monkeypatch, module, variant, folders["llama"], tmp_path / "out", 0.5)
