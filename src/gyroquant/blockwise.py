"""Rounding one block: its layers observed, rounded, tuned and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gyroquant.calibration.observers import observing
from gyroquant.calibration.stream import Stream
from gyroquant.grids import QuantizedWeight
from gyroquant.job import Job
from gyroquant.models.graph import Group, LinearOp
from gyroquant.models.online import CacheQuantizer, attached, observing_keys
from gyroquant.models.packed import from_matrix
from gyroquant.models.sites import attention_module
from gyroquant.rounding.activations import KeyMean
from gyroquant.rounding.judge import LayerReport, judge_part
from gyroquant.rounding.signround import BlockTuner, SignRound, tune_block
from gyroquant.rounding.stage import Part, round_part, together


def round_block(
    job: Job,
    index: int,
    group: Group,
    tensors: dict[str, Tensor],
    stream: Stream | None,
    advance: Any,
    warnings: list[str],
    tune: SignRound | None,
    checkpoint: Path | None = None,
) -> tuple[dict[str, QuantizedWeight], list[LayerReport], dict[str, Tensor]]:
    """Observes, rounds and tunes a block; returns codes, errors and the block's weights as they will be deployed.

    `checkpoint` is the file that the state of tuning is kept in.
    """
    model = job.store.skeleton()
    if stream and job.centers_keys:
        _center_keys(job, index, tensors, stream, advance)
    online, observed, rounded = job.running_in(index), dict[Any, Any](), dict[str, QuantizedWeight]()
    how, turns = job.rounding(warnings.append), observed_in_turn(job, index)
    for number, targets in enumerate(turns):
        if stream:
            current, last = tensors | decoded(job, rounded), number == len(turns) - 1
            keys = together(group, targets, online).keys()
            with attached(model, online), observing(model, group, online, stream.observer, keys, stop=not last) as seen:
                stream.observe(index, current, advance, tensors, move=last)
            observed |= seen
        if job.rounded:
            rounded |= {name: job.rounded[name] for name in targets}
        else:
            rounded |= round_part(Part(group, targets, tensors, observed, online), how)
    if stream and tune is not None:
        rounded = tune_rounded(job, index, tensors, rounded, stream, tune, advance, checkpoint)
    reports = judge_part(Part(group, job.targets, tensors, observed, online), rounded)
    deployed = {name: tensor.to(job.output.dtype) for name, tensor in tensors.items() if name not in rounded}
    deployed |= decoded(job, rounded)
    if stream and job.recipe.weights.correct_bias:
        with attached(model, online):
            gap = stream.gap(index, deployed, advance)
        name = group.last_bias
        assert name is not None
        share = getattr(job.graph.config, "residual_multiplier", 1.0)  # Granite scales what a layer adds
        deployed[name] = (deployed[name].double() + gap / share).to(job.output.dtype)
    return rounded, reports, deployed


def observed_in_turn(job: Job, index: int) -> list[dict[str, LinearOp]]:
    """The layers of a block to round, in the parts in which they are observed and rounded one after another."""
    parts = together(job.graph.blocks[index], job.targets, job.running_in(index))
    found = [{op.weight: op for op in ops} for ops in parts.values()]
    if job.recipe.weights.observes_in_turn and found:
        return found
    return [{name: op for part in found for name, op in part.items()}]


def tune_rounded(
    job: Job,
    index: int,
    tensors: Mapping[str, Tensor],
    rounded: Mapping[str, QuantizedWeight],
    stream: Stream,
    tune: SignRound,
    advance: Any,
    checkpoint: Path | None = None,
) -> dict[str, QuantizedWeight]:
    """Tunes what a solver made of a block that was observed: towards what the unrounded model gave."""
    assert stream.hidden is not None
    assert stream.original is not None

    def run(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return stream.few(index, weights, hidden)

    with attached(job.store.skeleton(), job.running_in(index)):
        tuner = BlockTuner(tensors, job.targets, rounded, stream.hidden, stream.original, run, stream.batch)
        return tune_block(tune, tuner, job.recipe.seed + index, advance, checkpoint)


def _center_keys(job: Job, index: int, tensors: Mapping[str, Tensor], stream: Stream, advance: Any) -> None:
    """Measures the mean of a block's keys and lets its cache quantizer take it away."""
    model, module = job.store.skeleton(), attention_module(job.graph.blocks[index])
    mean = KeyMean()
    with attached(model, job.plan.online_in(index)), observing_keys(model, module, mean):
        stream.run(index, tensors, keep=False, progress=advance)
    for place, one in enumerate(job.quantizers):
        if isinstance(one, CacheQuantizer) and one.module == module:
            job.quantizers[place] = replace(one, key_mean=mean.result())


def decoded(job: Job, rounded: Mapping[str, QuantizedWeight]) -> dict[str, Tensor]:
    """Rounded weights as numbers, in the shapes of their parameters."""
    return {
        name: from_matrix(weight.dequantize(), job.targets[name].shape, job.targets[name].entry.transposed)
        for name, weight in rounded.items()
    }
