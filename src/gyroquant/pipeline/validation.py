"""Checks before any work. They refuse destinations, models and recipes that cannot give a valid result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError, RecipeError, UnsupportedModelError
from gyroquant.finetuning import Finetune
from gyroquant.formats.output_folder import check_destination, check_writable
from gyroquant.grids import Grid
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import FoldPlan, fold
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.models.stores.base import WeightStore
from gyroquant.models.stores.ranges import Ranges
from gyroquant.recipes.schema import Recipe
from gyroquant.rounding.bit_allocation import grids_by_bits
from gyroquant.rounding.layers import is_ignored
from gyroquant.system.checksums import CHECKSUM_FILE
from gyroquant.system.journal import Journal
from gyroquant.system.worker_pool import Workers


def check_places(out: Path, overwrite: bool, model: Any, read: Sequence[Any], offload: Path | None = None) -> None:
    """Checks the destination and the folder for activations. Raises InputError.

    Refuses a destination that cannot be written, that lies in the model's folder, or that holds one of the files in
    `read` (entries that are not existing files are ignored). Refuses a folder `offload` that cannot be written or lies
    in the destination.
    """
    keep = [Path(path) for path in (model, *read, offload) if isinstance(path, (str, Path)) and _exists(path)]
    check_destination(out, overwrite or only_journal_left(out), keep)
    if offload is not None:
        check_writable(offload)
        if offload.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{offload} lies in {out}, which may hold only the result; choose a folder beside it")
    check_beside(out, model)


def check_beside(out: Path, model: Any) -> None:
    """Refuses a destination that is the model's folder or lies in it."""
    if isinstance(model, (str, Path)) and Path(model).is_dir() and out.resolve().is_relative_to(Path(model).resolve()):
        raise InputError(f"{out} lies in the folder of the model, {model}; choose a folder beside it")


def check_seqlen(config: Any, seqlen: int, option: str = "--seqlen") -> None:
    """Refuses windows that are longer than the positions of a model with this configuration."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and seqlen > limit:
        remedy = f"; --set {option}={limit}, or less" if "." in option else ""
        raise InputError(f"{option} {seqlen} is longer than the {limit} positions of the model{remedy}")


def only_journal_left(out: Path) -> bool:
    """Whether a run has put `out` in place and was killed before it removed its journal."""
    try:
        return out.is_dir() and Journal(out).finished(out / CHECKSUM_FILE)
    except OSError:  # not a valid name of a folder
        return False


def named_in(recipe: Recipe) -> list[str]:
    """All strings in a recipe, which may be names of files."""

    def strings(data: Any) -> Iterator[str]:
        if isinstance(data, str):
            yield data
        elif isinstance(data, (Mapping, list)):
            for value in data.values() if isinstance(data, Mapping) else data:
                yield from strings(value)

    return list(strings(recipe.to_dict()))


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # not a valid name of a file
        return False


def check_settings(store: WeightStore) -> None:
    """Refuses a configuration that can be read but not written to the result, because transformers checks it again.

    The generation configuration is copied without these checks, but it must be readable.
    """
    store.generation_config()
    try:
        store.config.validate()
    except Exception as error:  # each class has its own checks
        reason = " ".join(str(error).split())
        raise InputError(f"{store.label}: its configuration contradicts itself: {reason} Correct it") from error


def check_forms(
    store: WeightStore,
    plan: FoldPlan,
    targets: Mapping[str, LinearOp],
    quantizers: Sequence[OnlineOp],
    dense: bool,
    finetune: Finetune | None,
) -> None:
    """Refuses jobs whose result the output format cannot hold."""
    tied = [name for name in targets if name in store.tied]
    if tied and not plan.unties(store.read(store.graph.outer_params())):
        raise UnsupportedModelError(f"{tied[0]} is tied to the embedding; keep lm_head in weights.ignore")
    if dense and plan.online:
        raise UnsupportedModelError(
            f"--dense cannot keep the online map at {plan.online[0].module}: plain weights have no "
            "place for it. Leave --dense out, or leave the online sites out of the recipe"
        )
    if dense and finetune is not None:
        raise UnsupportedModelError("--dense keeps no scales for finetune to tune: leave one of them out")
    if dense and quantizers:
        raise UnsupportedModelError(
            "--dense cannot keep the rounding of activations or of the KV cache: plain weights have no place for it. "
            "Leave --dense out, or set activations=null and kv_cache=null"
        )


def check_steps(graph: ModelGraph, targets: Mapping[str, LinearOp], recipe: Recipe) -> None:
    """Refuses layers that one of the recipe's steps cannot work on."""
    for step in recipe.weights.steps:
        step.check_layers(graph, targets)
    branch, activations = recipe.weights.low_rank, recipe.activations
    if branch is not None and branch.needs_rounded_inputs and activations is not None:
        exact = [op.name for op in targets.values() if is_ignored(op.name, activations.ignore)]
        if exact:
            raise RecipeError(
                f"weights.low_rank.metric {branch.metric} is of rounded inputs, and activations.ignore leaves those of "
                f"{exact[0]} as they are: shorten it, or set metric: hessian"
            )


def backward_problem(store: WeightStore, targets: Mapping[str, LinearOp], recipe: Recipe) -> str:
    """Why the loss's gradient at every layer cannot be found block by block; empty if it can.

    Stacked experts have no module of their own to observe. A basis has no weights that are rounded in place.
    """
    if recipe.weights.basis is not None:
        return "weights are rounded in another basis (weights.basis)"
    if any(op.entry.stacked for op in targets.values()):
        return "the experts of this model are stacked in one parameter"
    if BlockRunner.of(store).passed:
        return "the blocks of this model pass on more than hidden states"
    return ""


def check_guided(store: WeightStore, targets: Mapping[str, LinearOp], recipe: Recipe) -> None:
    """Refuses `weights.guided` where there are no gradients."""
    problem = backward_problem(store, targets, recipe) if recipe.weights.guided is not None else ""
    if problem:
        raise UnsupportedModelError(f"weights.guided needs the gradient at every layer, but {problem}: leave it out")


def check_rows(store: WeightStore, targets: Mapping[str, LinearOp], recipe: Recipe) -> None:
    """Refuses bits for single rows (`granularity: rows` of `weights.allocate`) where there are no gradients."""
    allocate = recipe.weights.allocate
    problem = backward_problem(store, targets, recipe) if allocate is not None and allocate.by_rows else ""
    if problem:
        raise UnsupportedModelError(
            f"weights.allocate.granularity: rows needs the gradient at every layer, but {problem}: set "
            "granularity: layers"
        )


def check_budget(graph: ModelGraph, targets: Mapping[str, LinearOp], recipe: Recipe) -> None:
    """Refuses a bit budget that is too small for the fewest bits of every layer."""
    allocate = recipe.weights.allocate
    if allocate is None:
        return
    low = grids_by_bits(recipe.weights.grid, allocate.bits)[min(allocate.bits)]
    inside = [op for group in graph.blocks for op in group.linears if op.weight in targets]
    if not inside:
        raise RecipeError(
            "weights.allocate gives bits to the layers of the blocks, and weights.ignore leaves none: shorten it"
        )
    factors = sum(recipe.weights.low_rank_bits(op) for op in inside)
    if allocate.by_rows:
        factors += sum((len(set(allocate.bits)) - 1).bit_length() * op.out_features for op in inside)
    least = (factors + sum(_bits(op, low.for_columns(op.in_features)) for op in inside)) / sum(
        op.numel for op in inside
    )
    if allocate.budget is not None and least > allocate.budget:
        raise RecipeError(
            f"weights.allocate.budget is {allocate.budget}, and {low.bits} bits take {least:.3f} true bits per weight "
            "here: raise it, or take larger groups"
        )


def _bits(op: LinearOp, grid: Grid) -> int:
    groups = op.numel // grid.group_of(op.in_features, op.name)
    rows = op.numel // op.in_features
    return int(grid.code_bits * op.numel) + grid.group_bits * groups + grid.row_bits * rows + grid.tensor_bits


def check_held_out(recipe: Recipe, tokens: Tensor | None) -> None:
    """Refuses finetuning if no window is left for training."""
    if recipe.finetune is None or tokens is None:
        return
    held_out, windows = recipe.finetune.held_out, len(tokens)
    if windows <= held_out:
        raise InputError(
            f"finetune.held_out is {held_out} windows, and the text has {windows}: use more samples, or hold fewer out"
        )


def check_workers(workers: Workers | None, recipe: Recipe, store: WeightStore) -> None:
    """Refuses workers for blocks that cannot be rounded in parallel."""
    if workers is None:
        return
    if recipe.calibration.inputs != "original":
        raise InputError(
            "with calibration.inputs=rounded, each block is calibrated on the rounded blocks before it, one after the "
            "other: --workers and --ray need --set calibration.inputs=original"
        )
    if recipe.weights.solver.needs_model:
        raise InputError(
            f"--workers and --ray do not work with {recipe.weights.solver.name}, which rounds whole models"
        )
    if not Path(store.label).exists():
        raise InputError("--workers and --ray need a model in a folder or a file, which the workers can open")


def check_folded(store: WeightStore, plan: FoldPlan, targets: Mapping[str, LinearOp], dtype: torch.dtype) -> list[str]:
    """Refuses parameters that do not fit the output's dtype after folding: those around the blocks, and vectors in
    blocks. Returns warnings about biases that are too small for it.
    """
    ranges, graph = Ranges(dtype), store.graph
    changed = {name for name, edits in plan.edits.items() if edits and name not in targets}
    if changed.intersection((*graph.outer_params(), *graph.tied)):
        for name, tensor in plan.read_outer(store).items():
            if name not in targets:
                ranges.add(name, tensor.float())
    for index in range(len(graph.blocks)):
        vectors = [name for name in graph.block_params(index) if len(store.shapes[name]) == 1]
        folded = [name for name in vectors if name in changed]
        for name, tensor in fold(plan, store.read(vectors), folded).items() if folded else ():
            ranges.add(name, tensor.float())
    return ranges.check(ranges.largest)
