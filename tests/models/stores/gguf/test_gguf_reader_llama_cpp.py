"""What our reader makes of a GGUF file is what llama.cpp runs; `benchmarks/gguf_matrix.py` is the whole of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_models import build, difference, write_model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
LONG |= {"short_factor": [1.0] * 32, "long_factor": [1 + 0.3 * i for i in range(32)]}


@pytest.mark.parametrize(
    ("name", "changes", "kind", "limit"),
    [
        ("llama_bias", {"rope_parameters": LLAMA3}, Type.F32, 1e-5),
        ("llama_tied", {"rope_parameters": LONG}, Type.Q4_K, 1e-5),
        ("qwen2", {"rope_parameters": YARN, "tie_word_embeddings": True}, Type.Q5_0, 1e-5),
        ("qwen3", {}, Type.IQ3_S, 1e-5),
        ("mixtral", {}, Type.MXFP4, 1e-5),
        ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}, Type.TQ1_0, 1e-5),
        ("gemma2", {}, Type.Q6_K, 1e-3),  # GELU comes from a table in fp16
        ("gemma3", {"num_hidden_layers": 7}, Type.F32, 1e-3),
        ("granite", {}, Type.IQ4_XS, 1e-5),
        ("gpt2", {}, Type.F16, 1e-3),
    ],
)
def test_llama_cpp_gives_the_same_logits(
    name: str, changes: dict[str, Any], kind: Type, limit: float, tmp_path: Path
) -> None:
    write_model(tmp_path / "m.gguf", build(name, **changes), kind)
    assert difference(tmp_path / "m.gguf") < limit


def factors(found: dict[str, np.ndarray]) -> None:
    found["rope_freqs.weight"] = np.linspace(1, 3, 32).astype(np.float32)


def changed(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found.update({f"rope.scaling.{key}": value for key, value in values.items()})


SCALED = {"type": "yarn", "factor": 4.0, "original_context_length": 64, "attn_factor": 1.3}


@pytest.mark.parametrize(
    ("name", "change", "tensors"),
    [
        ("llama", changed(**SCALED), factors),  # YaRN's ramp over divided frequencies
        ("llama", changed(attn_factor=1.3), None),
        ("llama", changed(factor=4.0), factors),
        ("phi3", changed(**SCALED), None),
    ],
)
def test_scalings_that_transformers_has_no_name_for(name: str, change: Any, tensors: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", build(name), change=change, tensors=tensors)
    assert difference(tmp_path / "m.gguf") < 1e-5


def scaled(found: dict[str, np.ndarray]) -> None:
    for i, name in enumerate([name for name in found if name.startswith("blk") and "norm" not in name]):
        if name.endswith(".weight"):
            count = 4 if name.endswith("_exps.weight") else 1
            found[name.removesuffix("weight") + "scale"] = np.linspace(0.5, 0.9, count).astype(np.float32) + 0.01 * i
            found[name.removesuffix("weight") + "input_scale"] = np.ones(count, np.float32) / 3


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_second_scales_of_nvfp4(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", build(name), Type.NVFP4, tensors=scaled)
    assert difference(tmp_path / "m.gguf") < 1e-5


def test_parts(tmp_path: Path) -> None:
    write_model(tmp_path / "whole.gguf", build("llama"))
    parts = gguf_models.split(tmp_path / "whole.gguf", tmp_path / "m", [0, 9])
    assert difference(parts[0]) < 1e-5
