"""Rounds one block: observes, rounds and reports its layers, and applies the steps on whole blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.kept_outputs import KeptOutputs, can_be_kept, kept_features, modules_to_keep
from gyroquant.calibration.observers import (
    GuidedSecondMoments,
    Key,
    SecondMoments,
    input_key,
    modules_with_own_map,
    observing,
)
from gyroquant.calibration.rounding_errors import RoundingErrors, observing_rounding_errors
from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.low_rank import branches
from gyroquant.models.execution.online import CacheQuantizer, OnlineOp, attached, observing_keys
from gyroquant.models.execution.switches import all_experts
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.models.graph.sites import attention_module
from gyroquant.pipeline.job import Job
from gyroquant.rounding.activations import KeyMean
from gyroquant.rounding.base import When
from gyroquant.rounding.layer_report import LayerReport, layer_reports
from gyroquant.rounding.layers import LayerGroup, by_shared_input, round_layers
from gyroquant.rounding.steps.base import BlockStep, RoundedBlock
from gyroquant.system.environment import available_memory
from gyroquant.system.progress import Advance

_SHARE = 0.25  # of the available memory that kept outputs may take


def quantize_block(
    job: Job,
    index: int,
    tensors: dict[str, Tensor],
    stream: Stream | None,
    advance: Advance,
    warnings: list[str],
    steps: Sequence[BlockStep],
    checkpoint: Path | None = None,
) -> tuple[RoundedBlock, list[LayerReport]]:
    """Observes and rounds a block, and applies `steps` to it. Returns the final block, and the reports of its layers.

    - `tensors`: the folded parameters of the block.
    - `stream`: the calibration text at its input.
    - `checkpoint`: the file for the state of tuning.
    """
    group = job.graph.blocks[index]
    if stream and job.centers_keys:
        _center_keys(job, index, tensors, stream, advance)
    layers, observed = _round_in_turn(job, index, tensors, stream, advance, warnings)
    plain = {name: tensor.to(job.output.dtype) for name, tensor in tensors.items() if name not in layers}
    seed, multiplier = job.recipe.seed + index, job.graph.residual_multiplier
    block = RoundedBlock(index, group, tensors, layers, plain, stream, seed, multiplier, advance, checkpoint)
    block = apply_steps(job, block, [step for step in steps if step.when < When.CORRECT_BLOCK])
    observed_layers = LayerGroup(group, job.targets, tensors, observed, job.running_in(index))
    reports = layer_reports(observed_layers, block.layers, job.recipe.weights.bound)
    return apply_steps(job, block, [step for step in steps if step.when >= When.CORRECT_BLOCK]), reports


def apply_steps(job: Job, block: RoundedBlock, steps: Sequence[BlockStep]) -> RoundedBlock:
    """A block after some steps, which run with the online operations of the block attached."""
    with attached(job.store.skeleton(), [*job.running_in(block.index), *block.branches]):
        for step in steps:
            block = step.apply_block(block)
    return block


def observed_in_turn(job: Job, index: int) -> list[dict[str, LinearOp]]:
    """The layers of a block to round, in parts. The parts are observed and rounded one after another."""
    readers = by_shared_input(job.graph.blocks[index], job.targets, job.running_in(index))
    parts = [{op.weight: op for op in ops} for ops in readers.values()]
    if job.recipe.weights.observes_in_turn and parts:
        return parts
    return [{name: op for part in parts for name, op in part.items()}]


def _round_in_turn(
    job: Job,
    index: int,
    tensors: Mapping[str, Tensor],
    stream: Stream | None,
    advance: Advance,
    warnings: list[str],
) -> tuple[dict[str, RoundedLayer], dict[Key, SecondMoments]]:
    """The rounded layers of a block, and the second moments of their inputs."""
    group, online, config = job.graph.blocks[index], job.running_in(index), job.rounding(warnings.append)
    layers, observed = dict[str, RoundedLayer](), dict[Key, SecondMoments]()
    turns, errors = observed_in_turn(job, index), dict[str, RoundingErrors]()
    for number, targets in enumerate(turns):
        if stream:
            current = {**tensors, **{name: layer.param for name, layer in layers.items()}}
            if stream.kept:
                stream.kept.final = {
                    "original": _modules(group.linears),
                    "": _modules(layers[name].op for name in layers),
                }
                stream.kept.storing = {"original": number < len(turns) - 1, "": True}
            last, keys = number == len(turns) - 1, by_shared_input(group, targets, online).keys()
            model = job.store.skeleton()
            every = all_experts(job.recipe.calibration.all_experts)
            observes = job.observes_layers
            watching: AbstractContextManager[dict[Key, Any]] = nullcontext({})
            if observes:
                watching = observing(model, group, online, stream.observer, keys, _ends(stream, last))
            running = [*online, *branches(layers.values())]
            seen = keys if job.recipe.weights.needs_rounding_errors else ()
            seeing = observing_rounding_errors(model, group, online, seen)
            with every, attached(model, running), watching as new, seeing as errors:
                _guide(job, stream, targets, new, online)
                stream.observe(index, current, advance, tensors, move=last, rounded=observes)
            observed |= new
            if stream.kept:
                stream.kept.final = {}
        if job.rounded:
            layers |= {name: RoundedLayer(op, job.rounded[name]) for name, op in targets.items()}
        else:
            factors = {} if job.state.kronecker is None else job.state.kronecker.of(index)
            layers |= round_layers(LayerGroup(group, targets, tensors, observed, online, errors, factors), config)
    return layers, observed


def _modules(layers: Iterable[LinearOp]) -> frozenset[str]:
    return frozenset(op.module for op in layers if can_be_kept(op))


def _ends(stream: Stream, last: bool) -> Callable[[], bool]:
    """Whether a run ends after the observed input. In the last turn, the original runs on, to the next block."""
    return lambda: not (last and stream.runs_original())


def kept_bytes(job: Job, index: int) -> int:
    """Bytes of the outputs that are kept while a block is rounded.

    0 where none are: if layers are not observed in turn, in workers, on other devices than CPUs, and if they would take
    more than a part of the memory.
    """
    parts = [list(part.values()) for part in observed_in_turn(job, index)]
    if job.tokens is None or len(parts) == 1 or job.output.workers is not None or job.output.device.type != "cpu":
        return 0
    needed = kept_features(parts, job.graph.hidden) * job.tokens.numel() * job.compute_dtype.itemsize
    return needed if needed < _SHARE * available_memory() else 0


@contextmanager
def keeping_outputs(job: Job, index: int, stream: Stream | None) -> Iterator[None]:
    """Keeps outputs of a block's layers from run to run for the duration of a with block, if there is memory."""
    if stream is None or not kept_bytes(job, index):
        yield
        return
    stream.kept = KeptOutputs()
    try:
        block = job.graph.architecture.block_prefix(index).removesuffix(".")
        modules = modules_to_keep(block, job.graph.blocks[index].linears, stream.arguments.separate(index))
        with stream.kept.attached(job.store.skeleton(), modules):
            yield
    finally:
        stream.kept = None


def reuse_outputs(block: RoundedBlock) -> None:
    """Lets the last run of a block, which no step has changed, use the outputs that were kept while it was rounded.

    Modules are computed anew if storing has changed a bias or a gain in them.
    """
    if block.stream is not None and block.stream.kept is not None:
        kept, stored, tensors = block.stream.kept, block.plain, block.tensors
        kept.changed = {name for name in stored if not torch.equal(stored[name].float(), tensors[name].float())}
        kept.final, kept.storing = {"": _modules(layer.op for layer in block.layers.values())}, {}


def _guide(
    job: Job,
    stream: Stream,
    targets: Mapping[str, LinearOp],
    observed: dict[Key, SecondMoments],
    online: Sequence[OnlineOp],
) -> None:
    """Replaces observers by guided ones, if tokens have weights."""
    own, readers = modules_with_own_map(online), dict[str, dict[str, Tensor]]()
    for name, op in targets.items():
        if name in job.state.token_weights:
            readers.setdefault(input_key(op, own), {})[name] = job.state.token_weights[name]
    for key, weights in readers.items():
        width = len(observed[key, None].lower)
        observed[key, None] = GuidedSecondMoments(width, weights, stream.observer, stream.pairing)


def _center_keys(job: Job, index: int, tensors: Mapping[str, Tensor], stream: Stream, advance: Advance) -> None:
    """Measures the mean of a block's keys, and adds it to the block's cache quantizer, which subtracts it."""
    model, module = job.store.skeleton(), attention_module(job.graph.blocks[index])
    if module is None:
        return
    mean = KeyMean()
    with attached(model, job.plan.online_in(index)), observing_keys(model, module, mean):
        stream.run(index, tensors, keep=False, progress=advance)
    for place, quantizer in enumerate(job.quantizers):
        if isinstance(quantizer, CacheQuantizer) and quantizer.module == module:
            job.quantizers[place] = replace(quantizer, key_mean=mean.result())


__all__ = ["apply_steps", "keeping_outputs", "kept_bytes", "observed_in_turn", "quantize_block", "reuse_outputs"]
