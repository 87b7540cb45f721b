"""Models whose blocks hand more than hidden states to each other: whole runs, and runs that were interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from selection import some
from tiny_runs import run, streamed_logits
from transformers import PreTrainedModel

import gyroquant as gq
from gyroquant.models.deriving.tiny import default_config, tiny_model, tiny_tokens
from gyroquant.pipeline import quantize_model


def model_of(model_type: str) -> PreTrainedModel:
    """A tiny model whose layers share keys and values (Gemma), a router's states (ZAYA) or an index of tokens (HY)."""
    config = default_config(model_type)
    if model_type == "gemma4_text":
        config.num_kv_shared_layers = 12
    model: PreTrainedModel = tiny_model(config)
    return model


CHANGES = ("calibration.nsamples=6", "calibration.seqlen=24", "proof.nsamples=2", "proof.seqlen=24")


@pytest.mark.parametrize("model_type", some(["gemma4_text", "zaya", "hy_v4"], ["gemma4_text"]))
def test_an_interrupted_run_ends_with_the_same_bytes(
    model_type: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gyroquant.calibration.stream._TOKENS", 48)  # two sequences in a batch
    model_of(model_type).save_pretrained(source := tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(source)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(source, whole, "gptq-w4", corpus, "weights.group_size=-1", *CHANGES)
    kept = quantize_model.keep_block

    def stopped(job: Any, index: int, *args: Any, **kwargs: Any) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return kept(job, index, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize_model, "keep_block", stopped)
        run(source, broken, "gptq-w4", corpus, "weights.group_size=-1", *CHANGES)
    run(source, broken, "gptq-w4", corpus, "weights.group_size=-1", *CHANGES)
    names = sorted(path.name for path in whole.glob("*.safetensors"))
    assert names
    for name in names:
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name


@pytest.mark.parametrize("model_type", ["gemma4_text", "zaya", "hy_v4"])
def test_blocks_run_one_by_one_as_the_whole_model_runs(
    model_type: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gyroquant.calibration.stream._TOKENS", 48)
    model = model_of(model_type)
    run(model, tmp_path / "out", "rtn-w4", corpus, "weights.group_size=-1", *CHANGES)
    ids = tiny_tokens(model, batch=5)
    logits = streamed_logits(tmp_path / "out", ids)
    loaded = gq.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = loaded(input_ids=ids, use_cache=False).logits
    assert float((logits - expected).norm() / expected.norm()) < 1e-5


def test_learning_that_needs_single_blocks_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(gq.UnsupportedModelError, match="passes more than hidden states"):
        run(model_of("zaya"), tmp_path / "out", "rtn-w4", corpus, "weights.group_size=-1", "finetune={}", *CHANGES)
