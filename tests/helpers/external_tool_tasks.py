"""What tests of external tools share: a task on a tiny model, and the interpreters of environments that are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from gyroquant.benchmark.external_tools import ExternalTool, Size, Task
from gyroquant.benchmark.external_tools.base import ToolResult

LARGEST = 0.5  # error of logits: a tiny random model has 0.3 at 4 bits by any program, an unrelated one has 1.4
_VARIABLE = "GYROQUANT_ENVIRONMENTS"


def interpreter(tool: type[ExternalTool]) -> Path:
    """The interpreter of a tool's environment below $GYROQUANT_ENVIRONMENTS; skips the test where there is none."""
    place = os.environ.get(_VARIABLE)
    if not place:
        pytest.skip(f"{_VARIABLE} names no folder with an environment of {tool.name}")
    python = Path(place) / tool.name / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no environment of {tool.name} in {place}")
    return python


def task(model: Path, out: Path, size: Size) -> Task:
    """A run on 8 short random texts."""
    out.mkdir()
    tokens = out.parent / "tokens.safetensors"
    ids = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(1))
    save_file({"tokens": ids}, tokens)
    return Task(model, tokens, out, size)


def error(outcome: ToolResult, original: Path) -> float:
    """The relative error of the logits of what was deployed, against the original model."""
    ids = tiny_models.tokens(opened(original))
    with torch.no_grad():
        found, expected = (opened(path)(ids).logits for path in (outcome.dense, original))
    return float((found - expected).norm() / expected.norm())


def opened(path: Path) -> PreTrainedModel:
    """A folder or a GGUF file in transformers, fp32."""
    place = (
        {"pretrained_model_name_or_path": path}
        if path.is_dir()
        else {
            "pretrained_model_name_or_path": path.parent,
            "gguf_file": path.name,
        }
    )
    return AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32).eval()
