"""What a quantization is about to do, checked as a whole before any of it is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gyroquant.calibration.observers import Pairing
from gyroquant.calibration.stream import Stream
from gyroquant.calibration.text import Text, TokenBatch, calibration_windows, load_text
from gyroquant.environment import native_bfloat16, usable_device
from gyroquant.errors import InputError, RecipeError
from gyroquant.export.folder import check_room, left_behind
from gyroquant.export.writer import saved_dtype
from gyroquant.grids import Grid, QuantizedWeight
from gyroquant.learning.learn import Setting
from gyroquant.learning.live import learnable
from gyroquant.models.fold import FoldPlan
from gyroquant.models.graph import LinearOp, ModelGraph
from gyroquant.models.online import Attachment
from gyroquant.models.runner import BlockRunner
from gyroquant.models.source import open_original
from gyroquant.models.store import WeightStore
from gyroquant.planning import plan_folds
from gyroquant.pool import Workers
from gyroquant.recipe import Recipe, load_recipe
from gyroquant.refusals import (
    check_bias,
    check_elsewhere,
    check_forms,
    check_places,
    check_seqlen,
    check_settings,
    named_in,
)
from gyroquant.rounding.allocate import grids_by_bits
from gyroquant.rounding.base import ModelSolver, Warn
from gyroquant.rounding.rtn import RoundToNearest
from gyroquant.rounding.stage import Rounding, find_targets, layer_name


@dataclass(frozen=True)
class Output:
    """Where the result goes and how: `dtype` is that of parameters which are not rounded.

    `dense` writes rounded weights as plain numbers; `offload` is a folder for activations while it runs; `fresh` does
    not go on from where a run before was stopped; `workers` round blocks side by side.
    """

    folder: Path
    dtype: torch.dtype = torch.float16
    dense: bool = False
    overwrite: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: Path | None = None
    fresh: bool = False
    workers: Workers | None = None


@dataclass
class Job:
    """Everything that a quantization needs.

    `targets` are the layers to round, `grids` those of them that have another grid than the rest, `quantizers` what
    rounds while the model runs, `tokens` (samples, length) the text, `bos` what each sample of it begins with,
    `rounded` what a solver that takes whole models has made of the targets.
    """

    store: WeightStore
    recipe: Recipe
    plan: FoldPlan
    targets: dict[str, LinearOp]
    output: Output
    tokenizer: Any
    quantizers: list[Attachment] = field(default_factory=list)
    text: Text | TokenBatch | None = None
    tokens: Tensor | None = None
    grids: dict[str, Grid] = field(default_factory=dict)
    rounded: dict[str, QuantizedWeight] = field(default_factory=dict)
    bos: tuple[int, ...] = ()

    @property
    def graph(self) -> ModelGraph:
        """The resolved description of the model."""
        return self.plan.graph

    @property
    def needs_stream(self) -> bool:
        """Whether the model has to be run on the calibration text."""
        return self.recipe.weights.needs_statistics or self.centers_keys

    @property
    def rounds_head(self) -> bool:
        """Whether something around the blocks is rounded too."""
        inside = {op.weight for group in self.graph.blocks for op in group.linears}
        return any(name not in inside for name in self.targets)

    def rounding(self, warn: Warn, grid: Grid | None = None) -> Rounding:
        """How the layers are rounded: each to its own grid, or all to this one; to nearest where a solver from outside
        is going to take the whole model.
        """
        weights = self.recipe.weights
        solver = RoundToNearest() if isinstance(weights.solver, ModelSolver) else weights.solver
        rest = (weights.refine, weights.target, {} if grid else self.grids)
        return Rounding(solver, grid or weights.grid, weights.basis, warn, *rest)

    def stream(
        self, runner: BlockRunner, tokens: Tensor, outer: Mapping[str, Tensor], offload: Path | None = None
    ) -> Stream:
        """The hidden states of tokens, shape (samples, length), on their way through the model while it is rounded."""
        weights = self.recipe.weights
        pairing = Pairing(weights.needs_drift, weights.target is not None) if weights.needs_original else None
        stream = Stream(runner, tokens, outer, self.compute_dtype, offload, self.output.device, pairing)
        stream.free_outer()
        return stream

    @property
    def measures(self) -> bool:
        """Whether maps are chosen by what is measured; until then `plan` holds stand-ins for them."""
        return self.recipe.measures

    @property
    def centers_keys(self) -> bool:
        """Whether the mean of the keys has to be measured."""
        return self.recipe.centers_keys

    def _calibrated_with(self) -> list[Attachment]:
        quiet = self.recipe.activations is not None and not self.recipe.activations.calibrate
        return [] if quiet else self.quantizers

    def running_in(self, block: int) -> list[Attachment]:
        """What runs with one block while it is calibrated."""
        return [*self.plan.online_in(block), *self.graph.in_block(block, self._calibrated_with())]

    def running_around(self) -> list[Attachment]:
        """What runs with the head while it is calibrated."""
        return self.graph.around_blocks(self._calibrated_with())

    @property
    def compute_dtype(self) -> torch.dtype:
        """What blocks compute in while they are calibrated."""
        wanted = self.recipe.calibration.dtype
        if wanted == "auto":
            wanted = "bfloat16" if native_bfloat16(self.output.device) else "float32"
        return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def prepare(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    calibration: str | Path | Sequence[str | Mapping[str, Any]] | Text | TokenBatch | None = None,
    *,
    tokenizer: Any = None,
    dense: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    save_dtype: str = "auto",
    offload: str | Path | None = None,
    fresh: bool = False,
    workers: Workers | None = None,
    reads: Sequence[str | Path] = (),
) -> Job:
    """Checks a quantization before any work: recipe, model, sites, group sizes, text, destination, room on the disk.

    `reads` are files besides these that are not to be replaced, such as the one that `recipe` was read from. Raises a
    GyroquantError that names the culprit and the remedy; nothing has been written then.
    """
    read, recipe, out = (recipe, calibration, *reads), load_recipe(recipe), Path(out)
    offload = Path(offload) if offload else None
    check_places(out, overwrite, model, (*read, *named_in(recipe)), offload)
    store = open_original(model)
    plan, targets, quantizers = plan_all(store.graph, recipe)
    check_forms(store, plan, targets, quantizers, dense, recipe.finish)
    check_settings(store)
    source = calibration if calibration is not None else recipe.calibration.text
    text = source if source is None or isinstance(source, (Text, TokenBatch)) else load_text(source)
    output = Output(
        folder=out,
        dtype=saved_dtype(save_dtype, store.dtype),
        dense=dense,
        overwrite=overwrite,
        device=usable_device(device),
        offload=offload,
        fresh=fresh,
        workers=workers,
    )
    words = text is not None and not isinstance(text, TokenBatch)
    job = Job(store, recipe, plan, targets, output, tokenizer or _tokenizer(store, words), quantizers, text)
    windows = _windows(job)
    if windows is not None:
        job.tokens, job.bos = windows.ids, windows.bos
    job.grids = grids_of(recipe, targets)
    _check_budget(job)
    _check_held_out(job)
    check_elsewhere(job.graph, targets, recipe)
    check_bias(job.graph, recipe)
    _check_workers(job)
    check_room(out, expected_bytes(job) * 2 - left_behind(out))  # pieces and the files they are put together in
    return job


def learning_setting(
    recipe: Recipe,
    tokens: Tensor | None,
    targets: Mapping[str, LinearOp],
    quantizers: Sequence[Attachment],
    dtype: torch.dtype,
) -> Setting:
    """What the rotations of a recipe are learned for."""
    return Setting(
        tokens=tokens,
        targets=targets,
        grids=grids_of(recipe, targets) if rounds_while_learning(recipe) else {},
        attachments=quantizers,
        dtype=dtype,
        seed=recipe.seed,
    )


def grids_of(recipe: Recipe, targets: Mapping[str, LinearOp]) -> dict[str, Grid]:
    """The grid of every layer that is rounded, by the name of its weight."""
    return {name: recipe.weights.grid_of(layer_name(op)) for name, op in targets.items()}


def rounds_while_learning(recipe: Recipe) -> bool:
    """Whether maps are learned on a model whose weights are rounded."""
    if recipe.learn is None or recipe.learn.round_weights is not None:
        return recipe.learn is not None and bool(recipe.learn.round_weights)
    return not recipe.weights.needs_statistics and recipe.weights.basis is None


def plan_all(graph: ModelGraph, recipe: Recipe) -> tuple[FoldPlan, dict[str, LinearOp], list[Attachment]]:
    """What a recipe does to a model: its folds (stand-ins for maps that are measured or learned), the layers that it
    rounds, and what it rounds while the model runs.

    Raises UnsupportedModelError or RecipeError, with the reason, for whatever does not fit; nothing is touched.
    """
    plan = plan_folds(graph, recipe)
    weights = recipe.weights
    if isinstance(weights.solver, ModelSolver):
        weights.solver.check()
    targets = find_targets(
        graph, weights.grid_of, weights.ignore, [one.layers for one in weights.overrides], weights.basis
    )
    quantizers = plan_quantizers(graph, recipe)
    if recipe.learn is not None:
        learnable(plan, recipe.learn.sites)
        if recipe.learn.rounds and not (quantizers or rounds_while_learning(recipe)):
            raise RecipeError(
                f"learn.objective={recipe.learn.objective} has nothing to learn from: nothing is rounded meanwhile. "
                "Round activations or the KV cache, set learn.round_weights=true, or learn.objective=weights"
            )
    return plan, targets, quantizers


def plan_quantizers(graph: ModelGraph, recipe: Recipe) -> list[Attachment]:
    """What the recipe rounds while the model runs. Raises RecipeError when a group size does not fit."""
    found: list[Attachment] = []
    for section in (recipe.activations, recipe.kv_cache):
        if section is not None:
            found += section.quantizers(graph)
    return found


def _check_budget(job: Job) -> None:
    """Refuses a budget of bits that nothing fits in."""
    allocate = job.recipe.weights.allocate
    if allocate is None:
        return
    low = grids_by_bits(job.recipe.weights.grid, allocate.bits)[min(allocate.bits)]
    inside = [op for group in job.graph.blocks for op in group.linears if op.weight in job.targets]
    if not inside:
        raise RecipeError("weights.allocate gives bits to the layers of the blocks, and weights.ignore leaves none")
    counts = [int(torch.Size(op.shape).numel()) for op in inside]
    groups = [count // low.group_of(op.in_features) for op, count in zip(inside, counts, strict=True)]
    least = low.bits + low.group_bits * sum(groups) / sum(counts)
    if least > allocate.budget:
        raise RecipeError(
            f"weights.allocate.budget is {allocate.budget}, and {low.bits} bits take {least:.3f} true bits per weight "
            "here: raise it, or take larger groups"
        )


def _check_held_out(job: Job) -> None:
    """Refuses a last touch that would have no text left to train on."""
    if job.recipe.finish is None or job.tokens is None:
        return
    held, there = job.recipe.finish.held_out, len(job.tokens)
    if there <= held:
        raise InputError(
            f"finish holds {held} windows out, and the text has {there}: use more samples, or a smaller finish.held_out"
        )


def _check_workers(job: Job) -> None:
    """Refuses workers for blocks that cannot be rounded side by side."""
    if job.output.workers is None:
        return
    if job.recipe.calibration.inputs != "original":
        raise InputError(
            "blocks are rounded one after the other, each on what the rounded ones before it give: --workers and --ray "
            "need --set calibration.inputs=original"
        )
    if isinstance(job.recipe.weights.solver, ModelSolver):
        raise InputError(f"--workers and --ray are not for {job.recipe.weights.solver.name}, which takes whole models")
    if not Path(job.store.label).exists():
        raise InputError("--workers and --ray need a model in a folder or a file, which the workers can open")


def _tokenizer(store: WeightStore, required: bool) -> Any:
    try:
        return store.tokenizer()
    except InputError:
        if required:
            raise
        return None


def _windows(job: Job) -> TokenBatch | None:
    """The windows of text to calibrate on, or None for a recipe that needs none."""
    settings = job.recipe.calibration
    if job.text is None:
        calibrates = job.needs_stream or job.measures or job.recipe.learn or job.recipe.finish
        if calibrates or job.plan.edits or job.plan.online:
            need = "calibrates" if calibrates else "is proved"
            raise InputError(f"this recipe {need} on text: give --text FILE (or a dataset's name)")
        return None
    check_seqlen(job.store.text_config, settings.seqlen)
    amount = (settings.nsamples, settings.seqlen, settings.seed, settings.add_bos)
    return calibration_windows(job.text, job.tokenizer, job.store.text_config.vocab_size, *amount)


def expected_bytes(job: Job) -> int:
    """The size of the result: codes and scales of the targets, everything else in the output's dtype."""
    basis, chosen = job.recipe.weights.basis, job.recipe.weights.allocate
    rounded, bits = 0, 0.0
    for name, op in job.targets.items():
        count, grid = int(torch.Size(op.shape).numel()), job.grids[name]
        order = op.in_features if basis is None else basis.order(op.in_features)
        each = max(chosen.bits) if chosen is not None else grid.bits
        each_group = 0.0 if grid.group_size == -1 else grid.group_bits / grid.group_size
        rounded, bits = rounded + count, bits + count * order / op.in_features * (each + each_group)
        bits += 16 * order if basis is not None and basis.needs_statistics else 0
    everything = sum(torch.Size(shape).numel() for shape in job.store.shapes.values())
    everything += sum(torch.Size(job.store.shapes[name]).numel() for name in job.graph.tied.values())  # if untied
    bits = rounded * 8 * job.output.dtype.itemsize if job.output.dense else bits
    return int(bits / 8) + (everything - rounded) * job.output.dtype.itemsize
