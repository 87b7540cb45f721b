"""The job of a quantization: everything that it will do, checked as a whole before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gyroquant.calibration.observers import PairedForward
from gyroquant.calibration.stream import Stream
from gyroquant.calibration.text import Text, TokenBatch, load_text
from gyroquant.errors import InputError
from gyroquant.formats.native.writer import saved_dtype
from gyroquant.formats.output_folder import check_room, left_behind
from gyroquant.grids import Grid, QuantizedWeight
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.source import open_original
from gyroquant.pipeline.options import OutputOptions
from gyroquant.pipeline.planning import grids_of, leading_orders, plan_all, plan_tables
from gyroquant.pipeline.sizes import check_bytes, expected_bytes
from gyroquant.pipeline.state import RunState
from gyroquant.pipeline.validation import (
    check_budget,
    check_forms,
    check_guided,
    check_held_out,
    check_places,
    check_rows,
    check_seqlen,
    check_settings,
    check_steps,
    check_workers,
    named_in,
)
from gyroquant.pipeline.windows import planned_windows
from gyroquant.recipes.schema import Recipe, load_recipe
from gyroquant.rounding.base import Warn
from gyroquant.rounding.layers import RoundingConfig
from gyroquant.system.environment import native_bfloat16, usable_device
from gyroquant.system.worker_pool import Workers


@dataclass(frozen=True)
class Output:
    """Where the result goes, and how the run makes it.

    - ``folder``: the destination.
    - ``dtype``: the dtype of parameters that are not rounded.
    - ``dense``: write rounded weights as plain numbers.
    - ``overwrite``: replace what the destination holds.
    - ``device``: where blocks compute.
    - ``offload``: a folder for hidden states while the run lasts.
    - ``fresh``: discard the journal of an interrupted run.
    - ``workers``: processes that round blocks in parallel.
    """

    folder: Path
    dtype: torch.dtype = torch.float16
    dense: bool = False
    overwrite: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    offload: Path | None = None
    fresh: bool = False
    workers: Workers | None = None


@dataclass(frozen=True)
class JobSpec:
    """The fixed description of a job. The results of the run are in `RunState`.

    - ``store``: the stored model.
    - ``recipe``: the recipe.
    - ``planned``: the maps to fold, with placeholders for those that are measured or learned.
    - ``targets``: the layers to round, by the name of their weight.
    - ``output``: the destination and its options.
    - ``tokenizer``: the tokenizer; None if the model has none and no text needs it.
    - ``quantizers``: the quantizers that run with the model, as planned.
    - ``text``: the calibration text, if any.
    - ``tokens``: the calibration windows, shape (samples, length). If a stage makes them, any windows of that shape.
    - ``bos``: the tokens at the start of each window.
    - ``candidates``: the windows to choose among, shape (windows, length); None if nothing is chosen.
    """

    store: WeightStore
    recipe: Recipe
    planned: FoldPlan
    targets: dict[str, LinearOp]
    output: Output
    tokenizer: Any = None
    quantizers: tuple[OnlineOp, ...] = ()
    text: Text | TokenBatch | None = None
    tokens: Tensor | None = None
    bos: tuple[int, ...] = ()
    candidates: Tensor | None = None

    @property
    def graph(self) -> ModelGraph:
        """The resolved description of the model."""
        return self.planned.graph

    @cached_property
    def tables(self) -> dict[str, LinearOp]:
        """The tables of embeddings to round, by name."""
        return plan_tables(self.graph, self.recipe, self.planned)

    @cached_property
    def grids(self) -> dict[str, Grid]:
        """The grid of each target according to the recipe, before bits are allocated."""
        return grids_of(self.recipe, self.targets, leading_orders(self.planned, self.recipe))

    def grid(self, name: str) -> Grid:
        """The grid of a target or a table according to the recipe, by name, before bits are allocated."""
        if name not in self.tables:
            return self.grids[name]
        assert self.recipe.embeddings is not None
        return self.recipe.embeddings.grid

    @property
    def has_external_solver(self) -> bool:
        """Whether the solver takes the whole model."""
        return self.recipe.weights.solver.needs_model

    @property
    def measures(self) -> bool:
        """Whether some maps are chosen from measurements."""
        return self.recipe.measures

    @property
    def centers_keys(self) -> bool:
        """Whether the mean of the keys is measured."""
        return self.recipe.centers_keys

    @property
    def needs_stream(self) -> bool:
        """Whether rounding needs the calibration text to run through the model."""
        return self.recipe.weights.needs_statistics or self.centers_keys

    @property
    def observes_layers(self) -> bool:
        """Whether the inputs of layers are observed while the text runs. Tuning alone does not need that."""
        weights = self.recipe.weights
        return weights.observes_layers or (self.needs_stream and not weights.needs_original)

    @property
    def rounds_head(self) -> bool:
        """Whether a layer or a table outside the blocks is rounded too."""
        inside = {op.weight for group in self.graph.blocks for op in group.linears}
        return bool(self.tables) or any(name not in inside for name in self.targets)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the computation of blocks during calibration."""
        dtype = self.recipe.calibration.dtype
        if dtype == "auto":
            dtype = "bfloat16" if native_bfloat16(self.output.device) else "float32"
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32

    @property
    def proof_tokens(self) -> Tensor:
        """The tokens of the proof, shape (samples, length)."""
        return _proof_tokens(self.recipe, self.tokens)

    def stream(
        self, runner: BlockRunner, tokens: Tensor, outer: Mapping[str, Tensor], offload: Path | None = None
    ) -> Stream:
        """A stream that carries tokens, shape (samples, length), through the model while it is rounded."""
        weights = self.recipe.weights
        sums = (weights.needs_input_error, weights.needs_input_error_second_moments)
        pairing = PairedForward(*sums) if weights.needs_original else None
        stream = Stream(runner, tokens, outer, self.compute_dtype, offload, self.output.device, pairing)
        stream.free_outer()
        return stream


@dataclass(frozen=True)
class Job:
    """A spec together with the state of its run. The properties are read-only; stages write to `state`."""

    spec: JobSpec
    state: RunState

    @classmethod
    def begin(cls, spec: JobSpec) -> Job:
        """A job before its first stage."""
        return cls(spec, RunState(spec.planned, dict(spec.grids), list(spec.quantizers)))

    @property
    def store(self) -> WeightStore:
        return self.spec.store

    @property
    def recipe(self) -> Recipe:
        return self.spec.recipe

    @property
    def targets(self) -> dict[str, LinearOp]:
        return self.spec.targets

    @property
    def output(self) -> Output:
        return self.spec.output

    @property
    def tokenizer(self) -> Any:
        return self.spec.tokenizer

    @property
    def text(self) -> Text | TokenBatch | None:
        return self.spec.text

    @property
    def tokens(self) -> Tensor | None:
        return self.spec.tokens if self.state.tokens is None else self.state.tokens

    @property
    def bos(self) -> tuple[int, ...]:
        return self.spec.bos

    @property
    def candidates(self) -> Tensor | None:
        return self.spec.candidates

    @property
    def graph(self) -> ModelGraph:
        return self.spec.graph

    @property
    def has_external_solver(self) -> bool:
        return self.spec.has_external_solver

    @property
    def measures(self) -> bool:
        return self.spec.measures

    @property
    def centers_keys(self) -> bool:
        return self.spec.centers_keys

    @property
    def needs_stream(self) -> bool:
        return self.spec.needs_stream

    @property
    def observes_layers(self) -> bool:
        return self.spec.observes_layers

    @property
    def tables(self) -> dict[str, LinearOp]:
        return self.spec.tables

    @property
    def rounds_head(self) -> bool:
        return self.spec.rounds_head

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.spec.compute_dtype

    @property
    def proof_tokens(self) -> Tensor:
        return _proof_tokens(self.recipe, self.tokens)

    @property
    def plan(self) -> FoldPlan:
        return self.state.plan

    @property
    def grids(self) -> dict[str, Grid]:
        return self.state.grids

    @property
    def quantizers(self) -> list[OnlineOp]:
        return self.state.quantizers

    def grid(self, name: str) -> Grid:
        """The grid of a target or a table, by name."""
        return self.grids.get(name) or self.spec.grid(name)

    @property
    def rounded(self) -> dict[str, QuantizedWeight]:
        """The layers that an external solver has rounded."""
        return self.state.external_codes

    def stream(
        self, runner: BlockRunner, tokens: Tensor, outer: Mapping[str, Tensor], offload: Path | None = None
    ) -> Stream:
        """As `JobSpec.stream`."""
        return self.spec.stream(runner, tokens, outer, offload)

    def rounding(self, warn: Warn, grid: Grid | None = None) -> RoundingConfig:
        """The rounding of the layers: each to its own grid, or all to `grid`."""
        weights, grids = self.recipe.weights, {} if grid else self.grids
        places = self.state.row_places
        return RoundingConfig(weights.layer_steps, grid or weights.grid, weights.basis, warn, grids, places)

    def _calibration_quantizers(self) -> list[OnlineOp]:
        excluded = self.recipe.activations is not None and not self.recipe.activations.calibrate
        return [] if excluded else self.quantizers

    def running_in(self, block: int) -> list[OnlineOp]:
        """The online operations of one block during calibration."""
        return [*self.plan.online_in(block), *self.graph.in_block(block, self._calibration_quantizers())]

    def running_around(self) -> list[OnlineOp]:
        """The online operations around the blocks during calibration."""
        return self.graph.around_blocks([*self.plan.online, *self._calibration_quantizers()])


def _proof_tokens(recipe: Recipe, tokens: Tensor | None) -> Tensor:
    if tokens is None:
        return torch.zeros(1, 1, dtype=torch.long)
    return tokens[: recipe.proof.nsamples, : recipe.proof.seqlen]


def prepare(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    text: str | Path | Sequence[str | Mapping[str, Any]] | Text | TokenBatch | None = None,
    *,
    tokenizer: Any = None,
    options: OutputOptions | None = None,
    reads: Sequence[str | Path] = (),
    **changes: Any,
) -> Job:
    """Checks a quantization before any work: recipe, model, sites, group sizes, text, destination, room on the disk.

    - `text`: the calibration text. Default: the recipe's `calibration.text`.
    - `options`: the options of the output. `changes` are changes of its fields, by name.
    - `reads`: further input files that the output must not replace, such as the file of the recipe.

    Raises a GyroquantError that names the culprit and the remedy, before anything is written.
    """
    options = (options or OutputOptions()).changed("prepare", changes)
    read, recipe, out = (recipe, text, *reads), load_recipe(recipe), Path(out)
    offload = Path(options.offload) if options.offload else None
    check_places(out, options.overwrite, model, (*read, *named_in(recipe)), offload)
    store = open_original(model)
    plan, targets, quantizers = plan_all(store.graph, recipe)
    check_forms(store, plan, targets, quantizers, options.dense, recipe.finetune)
    check_settings(store)
    source = text if text is not None else recipe.calibration.text
    loaded = source if source is None or isinstance(source, (Text, TokenBatch)) else load_text(source)
    output = Output(
        folder=out,
        dtype=saved_dtype(options.save_dtype, store.dtype),
        dense=options.dense,
        overwrite=options.overwrite,
        device=usable_device(options.device),
        offload=offload,
        fresh=options.fresh,
        workers=options.workers,
    )
    words = loaded is not None and not isinstance(loaded, TokenBatch)
    tokenizer = tokenizer or _tokenizer(store, words)
    spec = _with_windows(JobSpec(store, recipe, plan, targets, output, tokenizer, tuple(quantizers), loaded))
    _ = spec.tables  # raises an error for tables that cannot be rounded
    check_budget(store.graph, targets, recipe)
    check_bytes(Job.begin(spec))
    check_held_out(recipe, spec.tokens)
    check_steps(store.graph, targets, recipe)
    check_guided(store, targets, recipe)
    check_rows(store, targets, recipe)
    check_workers(options.workers, recipe, store)
    job = Job.begin(spec)
    check_room(out, expected_bytes(job) * 2 - left_behind(out))  # the pieces, and the files that they are merged into
    return job


def planned(store: WeightStore, recipe: Recipe) -> Job:
    """A job of which only sizes are asked: without text and destination.

    Raises UnsupportedModelError or RecipeError if the recipe does not fit the model.
    """
    plan, targets, quantizers = plan_all(store.graph, recipe)
    output = Output(folder=Path(), dtype=saved_dtype("auto", store.dtype))
    spec = JobSpec(store, recipe, plan, targets, output, None, tuple(quantizers))
    _ = spec.tables  # raises an error for tables that cannot be rounded
    return Job.begin(spec)


def _tokenizer(store: WeightStore, required: bool) -> Any:
    try:
        return store.tokenizer()
    except InputError:
        if required:
            raise
        return None


def _with_windows(spec: JobSpec) -> JobSpec:
    """The spec with its calibration windows, if it has a text. Raises InputError if the recipe needs one."""
    settings, recipe = spec.recipe.calibration, spec.recipe
    calibrates = spec.needs_stream or spec.measures or recipe.learn or recipe.finetune
    needed = bool(calibrates or spec.planned.edits or spec.planned.online)
    if spec.text is None and (settings.source == "text" or not needed):
        if needed:
            need = "calibrates" if calibrates else "is proved"
            raise InputError(f"this recipe {need} on text: give --text FILE (or a dataset's name)")
        return spec
    check_seqlen(spec.store.text_config, settings.seqlen)
    windows = planned_windows(settings, spec.text, spec.tokenizer, spec.store)
    return replace(spec, tokens=windows.tokens, bos=windows.bos, candidates=windows.candidates)
