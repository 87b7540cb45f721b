"""All blocks in turn: each calibrated on what the rounded ones before it give, and kept as soon as it is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from gyroquant.blockwise import observed_in_turn, round_block
from gyroquant.calibration.observers import observing
from gyroquant.calibration.stream import Stream
from gyroquant.errors import InputError
from gyroquant.export.folder import OutputFolder
from gyroquant.export.writer import DenseWriter, PackedWriter, Rounded, Writer
from gyroquant.grids import QuantizedWeight
from gyroquant.job import Job
from gyroquant.journal import Journal
from gyroquant.models.fold import fold
from gyroquant.models.online import CacheQuantizer, attached
from gyroquant.models.prove import folded_outer
from gyroquant.models.ranges import Ranges
from gyroquant.models.runner import BlockRunner
from gyroquant.models.sites import attention_module
from gyroquant.progress import Advance, Stages
from gyroquant.rounding.judge import LayerReport, judge_part
from gyroquant.rounding.stage import Part, round_part

_OUTER = "outer"
TUNING = "tuning"
_USUAL = (2.0**-12, 2.0**7)  # scales with which float16 holds what is decoded, whatever the codes


@torch.no_grad()
def round_model(
    job: Job, writer: Writer, journal: Journal, progress: Stages, warnings: list[str]
) -> list[dict[str, Any]]:
    """Folds, observes, rounds and keeps every block that the journal has not; returns the reports of all layers."""
    outer = folded_outer(job.plan, job.store.read(job.graph.outer_params()))
    runner, stream = BlockRunner(job.store.skeleton(), job.graph), None
    if job.needs_stream:
        assert job.tokens is not None
        stream = job.stream(runner, job.tokens, outer, job.output.offload)
    records = []
    if not job.rounds_head:
        records.append(_outer(job, outer, None, writer, journal))
        outer = {}
    steps, behind = [_steps(job, stream, i) for i in range(len(job.graph.blocks))], 0
    with progress.stage("round", sum(steps)) as advance:
        for i, count in enumerate(steps):
            record = journal.get(block_name(i))
            if record is None:
                if stream is not None and behind != i:
                    _catch_up(job, behind, i, records[-1], stream, journal)
                record, behind = keep_block(job, i, writer, journal, stream, advance), i + 1
            else:
                _restore_keys(job, i, record)
                for _ in range(count):
                    advance()
            writer.take(journal.path(block_name(i)), record["notes"])
            records.append(record)
    if job.rounds_head:
        if stream is not None and behind != len(steps) and journal.get(_OUTER) is None:
            _catch_up(job, behind, len(steps), records[-1], stream, journal)
        records.append(_outer(job, outer, stream, writer, journal))
    for record in records:
        warnings += record["warnings"]
    return [layer for record in records for layer in record["layers"]]


def block_name(index: int) -> str:
    """What the journal calls a block."""
    return f"block-{index:05d}"


def _steps(job: Job, stream: Stream | None, index: int) -> int:
    """How often work on a block reports progress."""
    if stream is None:
        return 1
    tune, runs = job.recipe.weights.tune, 1 + int(job.centers_keys) + int(job.recipe.weights.correct_bias)
    return stream.steps * (len(observed_in_turn(job, index)) + runs) + (tune.iters if tune else 0)


def writer_of(job: Job, folder: OutputFolder | None = None) -> Writer:
    """The writer of a job's pieces; without a folder one that only makes them."""
    return (DenseWriter if job.output.dense else PackedWriter)(folder, job.store, job.output.dtype)


def carry(
    job: Job,
    index: int,
    stream: Stream,
    unrounded: Mapping[str, Tensor],
    deployed: Mapping[str, Tensor] | None = None,
    advance: Advance = lambda: None,
) -> None:
    """Carries the text through a block, to what the next one is calibrated on: as deployed, or as it was unrounded."""
    if job.recipe.calibration.inputs == "original":
        with attached(job.store.skeleton(), job.plan.online_in(index)):
            stream.run(index, unrounded, progress=advance)
        if stream.original is not None and stream.hidden is not None:
            stream.original.copy_(stream.hidden)
        return
    assert deployed is not None
    with attached(job.store.skeleton(), job.running_in(index)):
        stream.run(index, deployed, progress=advance)


def folded_block(job: Job, index: int) -> dict[str, Tensor]:
    """A block's parameters with the job's maps folded in."""
    return fold(job.plan, job.store.read(job.graph.block_params(index)))


def _catch_up(job: Job, behind: int, index: int, record: Mapping[str, Any], stream: Stream, journal: Journal) -> None:
    """Brings a stream from where it is, in front of block `behind`, to block `index`: `record` is that of the one
    before it.
    """
    if "states" in record:
        journal.get_states(record["states"], stream.states)
    else:  # blocks were rounded side by side
        for before in range(behind, index):
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
    """Rounds a block whose inputs are in `stream`, and keeps it; returns the record. The text is carried on and kept,
    too, unless another process rounds the next block, `apart` from this one.
    """
    tensors, said = folded_block(job, index), list[str]()
    tuning = journal.path(f"{TUNING}-{index}" if apart else TUNING)
    rounded, reports, deployed = round_block(
        job, index, job.graph.blocks[index], tensors, stream, advance, said, job.recipe.weights.tune, tuning
    )
    _check_rounded(rounded, tensors, job.output.dtype)
    piece = writer.piece(_saved(deployed, job.output.dtype, rounded), _by_op(job, rounded))
    record: dict[str, Any] = {"notes": piece.notes, "layers": [asdict(one) for one in reports], "warnings": said}
    record["key_mean"] = _key_mean(job, index)
    if stream is None:
        advance()
    elif not apart:
        carry(job, index, stream, tensors, deployed, advance)
        last = index == len(job.graph.blocks) - 1 and not job.rounds_head
        record["states"] = [] if last else journal.put_states(f"states-{index % 2}", stream.states)
    journal.put(block_name(index), piece.arrays, record)
    tuning.unlink(missing_ok=True)
    return record


def _cache_quantizer(job: Job, index: int) -> int | None:
    """The place among a job's quantizers of the one for a block's keys and values, if there is one."""
    module = attention_module(job.graph.blocks[index]) if job.centers_keys else None
    there = [n for n, one in enumerate(job.quantizers) if isinstance(one, CacheQuantizer) and one.module == module]
    return there[0] if there else None


def _key_mean(job: Job, index: int) -> list[Any] | None:
    """The mean of a block's keys, as data, where it was measured."""
    place = _cache_quantizer(job, index)
    if place is None:
        return None
    mean = getattr(job.quantizers[place], "key_mean", None)
    return None if mean is None else [str(mean.dtype).removeprefix("torch."), mean.tolist()]


def _restore_keys(job: Job, index: int, record: Mapping[str, Any]) -> None:
    """Gives a block's cache quantizer the mean of the keys that its record has."""
    place = _cache_quantizer(job, index)
    one = None if place is None else job.quantizers[place]
    if isinstance(one, CacheQuantizer) and place is not None and record["key_mean"] is not None:
        dtype, values = record["key_mean"]
        job.quantizers[place] = replace(one, key_mean=torch.tensor(values, dtype=getattr(torch, dtype)))


def _outer(
    job: Job, outer: dict[str, Tensor], stream: Stream | None, writer: Writer, journal: Journal
) -> dict[str, Any]:
    """Keeps what lies around the blocks; the head, which reads what leaves the last norm, may be rounded."""
    record = journal.get(_OUTER)
    if record is None:
        said: list[str] = []
        rounded, reports = _round_head(job, outer, stream, said) if job.rounds_head else ({}, [])
        _check_rounded(rounded, outer, job.output.dtype)
        piece = writer.piece(_saved(outer, job.output.dtype, rounded), _by_op(job, rounded))
        record = {"notes": piece.notes, "layers": [asdict(one) for one in reports], "warnings": said}
        journal.put(_OUTER, piece.arrays, record)
    writer.take(journal.path(_OUTER), record["notes"])
    return record


def _round_head(
    job: Job, outer: dict[str, Tensor], stream: Stream | None, warnings: list[str]
) -> tuple[dict[str, QuantizedWeight], list[LayerReport]]:
    model, group = job.store.skeleton(), job.graph.outer
    observed: dict[Any, Any] = {}
    if stream:
        with attached(model, job.running_around()), observing(model, group, [], stream.observer) as observed:
            stream.observe_head(outer)
    part = Part(group, job.targets, outer, observed, [])
    rounded = round_part(part, job.rounding(warnings.append))
    return rounded, judge_part(part, rounded)


def _by_op(job: Job, rounded: Mapping[str, QuantizedWeight]) -> Rounded:
    return [(job.targets[name], weight) for name, weight in rounded.items()]


def _saved(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, rounded: Mapping[str, QuantizedWeight]
) -> dict[str, Tensor]:
    """The parameters that are stored as they are, in the dtype of the output."""
    saved = {name: tensor.to(dtype) for name, tensor in tensors.items() if name not in rounded}
    for name, tensor in saved.items():
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{name} is too large for {dtype}; choose another with --save-dtype bfloat16 or float32")
    return saved


def _check_rounded(rounded: Mapping[str, QuantizedWeight], unrounded: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuses rounded weights that the output's dtype does not hold decoded; only odd scales need a look. Of weights
    that are all zero nothing can be lost, whatever scales they have.
    """
    ranges = Ranges(dtype)
    for name, weight in rounded.items():
        usual = _USUAL[0] < float(weight.params.scale.abs().max()) < _USUAL[1]
        if not usual and bool(unrounded[name].any()):
            ranges.add(name, weight.dequantize())
    ranges.check(ranges.largest)
