"""Quantizing tiny models with little text, and the logits of what was saved, block by block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tiny_models
import torch

import gyroquant as gq
from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import Job, prepare

BRIEF = ["calibration.nsamples=8", "calibration.seqlen=32", "calibration.dtype=float32"]
SMALL = ["weights.group_size=16", *BRIEF]


def run(
    model: object, out: Path, recipe: str, corpus: Path | None, *changes: str, **options: object
) -> dict[str, object]:
    small = BRIEF if any(change.startswith("weights.grid=") for change in changes) else SMALL
    loaded = gq.load_recipe(recipe, [*small, *changes])
    options.setdefault("tokenizer", tiny_models.tokenizer())
    return pipeline.run(prepare(model, out, loaded, corpus, **options))  # type: ignore[arg-type]


def streamed_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a saved model, run block by block."""
    store = open_model(folder)
    outer = store.read(store.graph.outer_params())
    stream = Stream(BlockRunner(store.skeleton(), store.graph), ids, outer)
    for i in range(len(store.graph.blocks)):
        prefix = f"{store.graph.architecture.blocks}.{i}."
        with attached(store.skeleton(), [o for o in store.online if o.module.startswith(prefix)]):
            stream.run(i, store.read(store.graph.block_params(i)))
    return torch.stack([logits for _, _, logits in stream.logits(outer)])


def with_text_repeated(job: Job, times: int) -> Job:
    """The same job on a text that is so many times as long."""
    assert job.tokens is not None
    return Job.begin(replace(job.spec, tokens=job.tokens.repeat(times, 1)))
