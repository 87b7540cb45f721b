"""Rounds all blocks in order. Each is calibrated on the outputs of the rounded blocks before it, and journaled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.observers import Key, SecondMoments, observing
from gyroquant.calibration.stream import Stream
from gyroquant.errors import InputError
from gyroquant.formats.native.writer import DenseWriter, PackedWriter, Writer
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.models.execution.online import CacheQuantizer, attached
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.models.graph.sites import attention_module
from gyroquant.models.stores.ranges import Ranges
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.quantize_block import keeping_outputs, observed_in_turn, quantize_block, reuse_outputs
from gyroquant.pipeline.tables import round_table, table_statistics, table_steps
from gyroquant.rounding.layer_report import LayerReport, layer_reports, table_report
from gyroquant.rounding.layers import LayerGroup, RoundingConfig, round_layers
from gyroquant.rounding.steps.base import RoundedBlock
from gyroquant.system.journal import Journal
from gyroquant.system.progress import Advance, Progress

_OUTER = "outer"
TUNING = "tuning"
_USUAL = (2.0**-12, 2.0**7)  # with scales in this range, float16 holds all decoded weights


@torch.no_grad()
def quantize_model(
    job: Job, writer: Writer, journal: Journal, progress: Progress, warnings: list[str]
) -> list[dict[str, Any]]:
    """Folds, observes and rounds every block that is not in the journal, and writes it there.

    Returns the reports of all layers.
    """
    outer = job.plan.read_outer(job.store)
    runner, stream = BlockRunner.of(job.store, job.plan.online), None
    if job.needs_stream:
        assert job.tokens is not None
        stream = job.stream(runner, job.tokens, outer, job.output.offload)
    records = []
    if not job.rounds_head:
        records.append(_outer(job, outer, None, writer, journal))
        outer = {}
    ticks, position = [_ticks(job, stream, i) for i in range(len(job.graph.blocks))], 0
    around = _outer_ticks(job, stream) if job.rounds_head else 0
    with progress.stage("quantize", sum(ticks) + around) as advance:
        for i, count in enumerate(ticks):
            record = journal.get(block_name(i))
            if record is None:
                if stream is not None and position != i:
                    _catch_up(job, position, i, records[-1], stream, journal)
                record, position = keep_block(job, i, writer, journal, stream, advance), i + 1
            else:
                _restore_keys(job, i, record)
                for _ in range(count):
                    advance()
            writer.add_piece(journal.path(block_name(i)), record["notes"])
            records.append(record)
        if job.rounds_head:
            if stream is not None and position != len(ticks) and journal.get(_OUTER) is None:
                _catch_up(job, position, len(ticks), records[-1], stream, journal)
            records.append(_outer(job, outer, stream, writer, journal, advance))
    for record in records:
        warnings += record["warnings"]
    return [layer for record in records for layer in record["layers"]]


def block_name(index: int) -> str:
    """The name of a block in the journal."""
    return f"block-{index:05d}"


def _ticks(job: Job, stream: Stream | None, index: int) -> int:
    """How many times the work on a block reports progress."""
    if stream is None:
        return 1
    steps = job.recipe.weights.block_steps
    passes = len(observed_in_turn(job, index)) + 1 + int(job.centers_keys) + sum(step.passes for step in steps)
    return stream.steps * passes + sum(step.iterations for step in steps)


def _outer_ticks(job: Job, stream: Stream | None) -> int:
    """The same of the work on heads and tables."""
    observed = len(stream.input_ids) if stream is not None else 0
    return observed + sum(table_steps(op, job.spec.grid(name)) for name, op in job.tables.items())


def writer_for(job: Job, folder: OutputFolder | None = None) -> Writer:
    """The writer of a job's pieces. Without a folder it makes pieces but writes none."""
    return (DenseWriter if job.output.dense else PackedWriter)(folder, job.store, job.output.dtype)


def carry(
    job: Job,
    index: int,
    stream: Stream,
    unrounded: Mapping[str, Tensor],
    deployed: RoundedBlock | None = None,
    advance: Advance = lambda: None,
) -> None:
    """Carries the text through a block, to the calibration input of the next block.

    The text runs through the deployed block, or through the unrounded one with ``calibration.inputs: original``.
    """
    if job.recipe.calibration.inputs == "original":
        with attached(job.store.skeleton(), job.plan.online_in(index)):
            stream.run(index, unrounded, progress=advance)
        if stream.original is not None and stream.hidden is not None:
            stream.original.copy_(stream.hidden)
        return
    assert deployed is not None
    with attached(job.store.skeleton(), [*job.running_in(index), *deployed.branches]):
        stream.run(index, deployed.deployed, progress=advance)


def folded_block(job: Job, index: int) -> dict[str, Tensor]:
    """A block's parameters with the job's maps folded in."""
    return job.plan.read_block(job.store, index)


def _catch_up(job: Job, start: int, index: int, record: Mapping[str, Any], stream: Stream, journal: Journal) -> None:
    """Moves a stream from the input of block `start` to that of block `index`. `record` is of the block before that."""
    if "states" in record:
        stream.arguments.allocate(record.get("arguments", ()))
        journal.get_states(record["states"], stream.states)
    else:  # blocks were rounded in parallel
        for before in range(start, index):
            carry(job, before, stream, folded_block(job, before))


def keep_block(
    job: Job,
    index: int,
    writer: Writer,
    journal: Journal,
    stream: Stream | None,
    advance: Advance = lambda: None,
    apart: bool = False,
) -> dict[str, Any]:
    """Rounds a block whose inputs are in `stream`, and writes it to the journal. Returns its record.

    The text is then carried through the block and its hidden states are written too, unless `apart`: in a worker, which
    rounds a single block.
    """
    tensors, warnings = folded_block(job, index), list[str]()
    tuning = journal.path(f"{TUNING}-{index}" if apart else TUNING)
    steps = job.recipe.weights.block_steps
    with keeping_outputs(job, index, stream):
        block, reports = quantize_block(job, index, tensors, stream, advance, warnings, steps, tuning)
        layers = [*block.layers.values()]
        _check_rounded(layers, tensors, job.output.dtype)
        if stream is not None and not apart:
            if not steps and job.recipe.calibration.inputs != "original":
                reuse_outputs(block)
            carry(job, index, stream, tensors, block, advance)
    piece = writer.piece(_stored(block.plain, job.output.dtype), layers)
    record: dict[str, Any] = {
        "notes": piece.notes,
        "layers": [asdict(report) for report in reports],
        "warnings": warnings,
    }
    record["key_mean"] = _key_mean(job, index)
    if stream is None:
        advance()
    elif not apart:
        last = index == len(job.graph.blocks) - 1 and not job.rounds_head
        record["states"] = [] if last else journal.put_states(f"states-{index % 2}", stream.states)
        record["arguments"] = stream.arguments.layout
    journal.put(block_name(index), piece.arrays, record)
    tuning.unlink(missing_ok=True)
    return record


def _cache_quantizer(job: Job, index: int) -> int | None:
    """The index of a block's cache quantizer in the job's quantizers; None if no mean of keys is measured."""
    module = attention_module(job.graph.blocks[index]) if job.centers_keys else None
    for place, quantizer in enumerate(job.quantizers):
        if isinstance(quantizer, CacheQuantizer) and quantizer.module == module:
            return place
    return None


def _key_mean(job: Job, index: int) -> list[Any] | None:
    """The mean of a block's keys, as data; None if it was not measured."""
    place = _cache_quantizer(job, index)
    if place is None:
        return None
    mean = getattr(job.quantizers[place], "key_mean", None)
    return None if mean is None else [str(mean.dtype).removeprefix("torch."), mean.tolist()]


def _restore_keys(job: Job, index: int, record: Mapping[str, Any]) -> None:
    """Adds the mean of keys in a block's record to the block's cache quantizer."""
    place = _cache_quantizer(job, index)
    quantizer = None if place is None else job.quantizers[place]
    if isinstance(quantizer, CacheQuantizer) and place is not None and record["key_mean"] is not None:
        dtype, values = record["key_mean"]
        job.quantizers[place] = replace(quantizer, key_mean=torch.tensor(values, dtype=getattr(torch, dtype)))


def _outer(
    job: Job,
    outer: dict[str, Tensor],
    stream: Stream | None,
    writer: Writer,
    journal: Journal,
    advance: Advance = lambda: None,
) -> dict[str, Any]:
    """Writes the parameters around the blocks to the journal and the writer. Rounds the head, if it is a target."""
    record = journal.get(_OUTER)
    if record is None:
        warnings: list[str] = []
        rounded, reports = _round_head(job, outer, stream, warnings, advance) if job.rounds_head else ({}, [])
        layers = [*rounded.values()]
        _check_rounded(layers, outer, job.output.dtype)
        plain = {name: tensor for name, tensor in outer.items() if name not in rounded}
        piece = writer.piece(_stored(plain, job.output.dtype), layers)
        record = {"notes": piece.notes, "layers": [asdict(report) for report in reports], "warnings": warnings}
        journal.put(_OUTER, piece.arrays, record)
    else:
        for _ in range(_outer_ticks(job, stream)):
            advance()
    writer.add_piece(journal.path(_OUTER), record["notes"])
    return record


def _round_head(
    job: Job, outer: dict[str, Tensor], stream: Stream | None, warnings: list[str], advance: Advance
) -> tuple[dict[str, RoundedLayer], list[LayerReport]]:
    model, group = job.store.skeleton(), job.graph.outer
    observed: dict[Key, SecondMoments] = {}
    if stream:
        with attached(model, job.running_around()), observing(model, group, [], stream.observer) as observed:
            stream.observe_head(outer, advance)
    layers = LayerGroup(group, job.targets, outer, observed, [])
    rounded = round_layers(layers, job.rounding(warnings.append))
    tables, reports = _round_tables(job, layers, job.rounding(warnings.append), advance)
    return rounded | tables, [*layer_reports(layers, rounded, job.recipe.weights.bound), *reports]


def _round_tables(
    job: Job, layers: LayerGroup, config: RoundingConfig, advance: Advance
) -> tuple[dict[str, RoundedLayer], list[LayerReport]]:
    rounded, reports = dict[str, RoundedLayer](), list[LayerReport]()
    for name, op in job.tables.items():
        statistics = table_statistics(job.graph, name, layers)
        rounded[name] = round_table(layers, op, statistics, job.grid(name), config, advance)
        bound = job.recipe.weights.bound
        reports.append(table_report(op.name, layers.matrix(op), rounded[name], statistics, bound))
    return rounded, reports


def _stored(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters that are not rounded, in the dtype of the output. Raises InputError if they do not fit it."""
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    for name, tensor in stored.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{name} is too large for {dtype}; choose another with --save-dtype bfloat16 or float32")
    return stored


def _check_rounded(layers: Iterable[RoundedLayer], unrounded: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuses rounded weights whose decoded numbers do not fit the output's dtype.

    Only weights with unusual scales are checked. Weights that are all zero fit, whatever their scales.
    """
    ranges = Ranges(dtype)
    for layer in layers:
        usual = _USUAL[0] < float(layer.weight.params.scale.abs().max()) < _USUAL[1]
        if not usual and bool(unrounded[layer.op.weight].any()):
            ranges.add(layer.op.weight, layer.matrix)
    ranges.check(ranges.largest)
