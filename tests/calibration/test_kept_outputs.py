"""Tests of outputs that are kept between the runs of a block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from selection import some

import gyroquant as gq
from gyroquant.calibration.kept_outputs import KeptOutputs, modules_to_keep
from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import quantize_block as in_blocks
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare

SMALL = ["weights.group_size=16", "calibration.nsamples=32", "calibration.seqlen=32", "calibration.dtype=float32"]


NAMES = ["llama_tied", "gpt2", "llama_bias", "qwen3", "gemma3", "cohere", "qwen2_moe", "phi3"]


@pytest.mark.parametrize("recipe", ["gyro-w4", "qronos"])
@pytest.mark.parametrize("name", some(NAMES, NAMES[:4]))
def test_the_bytes_are_those_of_a_run_that_keeps_nothing(
    name: str, recipe: str, folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [*SMALL, "calibration.nsamples=16", "finetune=null"] if recipe == "gyro-w4" else SMALL
    used: list[int] = []
    reuse = KeptOutputs._forward

    def counted(self: KeptOutputs, name: str, inner: set[str], compute: Any, *args: Any, **named: Any) -> Any:
        calls: list[int] = []

        def noted(*args: Any, **named: Any) -> Any:
            calls.append(1)
            return compute(*args, **named)

        out = reuse(self, name, inner, noted, *args, **named)
        used.append(not calls)
        return out

    monkeypatch.setattr(KeptOutputs, "_forward", counted)
    for out in ("kept", "anew"):
        if out == "anew":
            assert any(used)
            monkeypatch.setattr(in_blocks, "_SHARE", 0.0)
        loaded = gq.load_recipe(recipe, changes)
        options = {"tokenizer": tiny_models.tokenizer(), "save_dtype": "bfloat16"}  # biases and gains change
        pipeline.run(prepare(folders[name], tmp_path / out, loaded, corpus, **options))
    kept, anew = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("kept", "anew"))
    assert kept == anew


def test_other_inputs_are_computed_anew() -> None:
    """Should a layer be named final too early."""
    model = tiny_models.build("llama")
    store = open_model(model)
    group, tensors = store.graph.blocks[0], store.read(store.graph.block_params(0))
    stream = Stream(BlockRunner(model, store.graph), tiny_models.tokens(model), store.read(store.graph.outer_params()))
    assert stream.hidden is not None
    first = stream.hidden.clone()
    stream.kept = KeptOutputs()
    stream.kept.final = {"": {op.module for op in group.linears}}
    stream.kept.storing = {"": True}
    with stream.kept.attached(model, modules_to_keep("model.layers.0", group.linears, True)):
        stream.run(0, tensors, keep=False)
        stream.hidden += 0.1 * torch.randn(stream.hidden.shape, generator=torch.Generator().manual_seed(0))
        second = stream.hidden.clone()
        stream.run(0, tensors)
    stream.kept = None
    found = stream.hidden.clone()
    stream.hidden.copy_(second)
    stream.run(0, tensors)
    assert torch.equal(found, stream.hidden)
    assert not torch.equal(first, second)
    assert all("forward" not in vars(module) for module in model.modules())
