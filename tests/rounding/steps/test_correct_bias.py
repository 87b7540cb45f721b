"""The mean error of a block's output, taken out of its last bias."""

from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

import gyroquant as gq
from gyroquant.calibration.stream import Stream
from gyroquant.errors import UnsupportedModelError
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare

SMALL = ["weights.group_size=16", "calibration.nsamples=16", "calibration.seqlen=32", "calibration.dtype=float32"]


def job(model: Path, out: Path, corpus: Path, *changes: str) -> Job:
    recipe = gq.load_recipe("gptq", [*SMALL, "weights.bits=2", *changes])
    return prepare(model, out, recipe, corpus, tokenizer=tiny_models.tokenizer(), save_dtype="float32")


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "starcoder2", "granite_bias"])
def test_blocks_give_the_originals_mean(name: str, folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    """On the inputs that they see: both models run block by block, and what is left of the mean is nothing."""
    for out, changes in (("plain", []), ("corrected", ["weights.correct_bias=true"])):
        asked = job(folders[name], tmp_path / out, corpus, *changes)
        pipeline.run(asked)
    assert asked.tokens is not None
    left = {out: mean_errors(folders[name], tmp_path / out, asked.tokens) for out in ("plain", "corrected")}
    assert max(left["corrected"]) < 1e-5 < min(left["plain"])
    biases = {group.last_bias for group in asked.graph.blocks}
    plain, corrected = (load_file(tmp_path / out / "model.safetensors") for out in ("plain", "corrected"))
    first = asked.graph.blocks[0].last_bias
    for key in plain:
        if ".0." in key and key not in biases:
            assert torch.equal(plain[key], corrected[key])
    assert first is not None
    assert not torch.equal(plain[first], corrected[first])


def mean_errors(model: Path, rounded: Path, tokens: torch.Tensor) -> list[float]:
    """The rms of the mean error after every block, over that of the hidden states."""
    original, store = open_model(model), open_model(rounded)
    streams = []
    for one in (original, store):
        streams.append(Stream(BlockRunner(one.skeleton(), one.graph), tokens, one.read(one.graph.outer_params())))
    found = []
    for index in range(len(original.graph.blocks)):
        for one, stream in zip((original, store), streams, strict=True):
            stream.run(index, one.read(one.graph.block_params(index)))
        first, second = (stream.hidden for stream in streams)
        assert first is not None
        assert second is not None
        gap = (first - second).mean((0, 1))
        found.append(float(gap.square().mean().sqrt() / first.square().mean().sqrt()))
    return found


def test_models_without_such_a_bias_are_refused(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="and llama has none there"):
        job(folders["llama_tied"], tmp_path / "out", corpus, "weights.correct_bias=true")
