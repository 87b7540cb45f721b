"""What a quantization refuses before any work: places, models and recipes that its result could not be made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.export.folder import check_destination, check_writable
from gyroquant.integrity import FILE
from gyroquant.journal import Journal
from gyroquant.learning import Finish
from gyroquant.models.fold import FoldPlan, fold
from gyroquant.models.graph import LinearOp, ModelGraph
from gyroquant.models.online import Attachment
from gyroquant.models.prove import folded_outer
from gyroquant.models.ranges import Ranges
from gyroquant.models.store import WeightStore
from gyroquant.recipe import Recipe
from gyroquant.rounding.base import ModelSolver
from gyroquant.rounding.stage import layer_name


def check_places(out: Path, overwrite: bool, model: Any, read: Sequence[Any], offload: Path | None = None) -> None:
    """Refuses a destination that cannot be written, that lies in the model's folder or holds one of the files that are
    `read` (what names none is passed over), and a folder for activations, `offload`, that cannot be written or lies in
    the destination.
    """
    keep = [Path(one) for one in (model, *read, offload) if isinstance(one, (str, Path)) and _is_there(one)]
    check_destination(out, overwrite or only_journal_left(out), keep)
    if offload is not None:
        check_writable(offload)
        if offload.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{offload} lies in {out}, which holds the result alone; choose a place beside it")
    check_beside(out, model)


def check_beside(out: Path, model: Any) -> None:
    """Refuses a destination that is the model's folder or lies in it."""
    if isinstance(model, (str, Path)) and Path(model).is_dir() and out.resolve().is_relative_to(Path(model).resolve()):
        raise InputError(f"{out} lies in the folder of the model, {model}; choose a place beside it")


def check_seqlen(config: Any, seqlen: int, option: str = "--seqlen") -> None:
    """Refuses windows of text that are longer than a model of this configuration can take."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and seqlen > limit:
        remedy = f"; --set {option}={limit}, or less" if "." in option else ""
        raise InputError(f"{option} {seqlen} is longer than the {limit} positions that the model knows{remedy}")


def only_journal_left(out: Path) -> bool:
    """Whether a run has put `out` in place and was killed before it had removed its journal."""
    try:
        return out.is_dir() and Journal(out).finished(out / FILE)
    except OSError:  # no name of a folder
        return False


def named_in(recipe: Recipe) -> list[str]:
    """What may be names of files in a recipe: all its texts."""

    def texts(data: Any) -> Iterator[str]:
        if isinstance(data, str):
            yield data
        elif isinstance(data, (Mapping, list)):
            for one in data.values() if isinstance(data, Mapping) else data:
                yield from texts(one)

    return list(texts(recipe.to_dict()))


def _is_there(place: str | Path) -> bool:
    try:
        return Path(place).exists()
    except OSError:  # no name of a file
        return False


def check_settings(store: WeightStore) -> None:
    """Refuses settings that could be read or made, but not written into the result: transformers checks them again.

    Those of generation are carried over as they are, whatever transformers holds of them, but have to be readable.
    """
    store.generation_config()
    try:
        store.config.validate()
    except Exception as error:  # each class has checks of its own
        why = " ".join(str(error).split())
        raise InputError(f"{store.label}: its configuration contradicts itself: {why} Mend it") from error


def check_forms(
    store: WeightStore,
    plan: FoldPlan,
    targets: Mapping[str, LinearOp],
    quantizers: Sequence[Attachment],
    dense: bool,
    finish: Finish | None,
) -> None:
    """Refuses results that the output could not hold."""
    tied = [name for name in targets if name in store.tied]
    if tied and not plan.unties(store.read(store.graph.outer_params())):
        raise UnsupportedModelError(f"{tied[0]} is tied to the embedding; keep lm_head in weights.ignore")
    if dense and plan.online:
        raise UnsupportedModelError(
            f"--dense cannot keep the online map in front of {plan.online[0].module}: plain weights have no "
            "place for it. Leave --dense out, or leave the online sites out of the recipe"
        )
    if dense and finish is not None:
        raise UnsupportedModelError("--dense keeps no scales for finish to tune: leave one of them out")
    if dense and quantizers:
        raise UnsupportedModelError(
            "--dense cannot keep the rounding of activations or of the KV cache: plain weights have no place for it. "
            "Leave --dense out, or set activations=null and kv_cache=null"
        )


def check_bias(graph: ModelGraph, recipe: Recipe) -> None:
    """Refuses to correct biases where a block has none that its output could be corrected by."""
    if recipe.weights.correct_bias and any(group.last_bias is None for group in graph.blocks):
        raise UnsupportedModelError(
            f"weights.correct_bias needs a bias in the last layer of every block, and {graph.config.model_type} has "
            "none there: leave it out"
        )


def check_elsewhere(graph: ModelGraph, targets: Mapping[str, LinearOp], recipe: Recipe) -> None:
    """Refuses layers that a solver which takes whole models does not know."""
    if not isinstance(recipe.weights.solver, ModelSolver):
        return
    inside = {op.weight for group in graph.blocks for op in group.linears}
    for name, op in targets.items():
        if name not in inside or op.entry.stacked or op.entry.transposed:
            raise UnsupportedModelError(
                f"the solver {recipe.weights.solver.name} rounds plain linear layers of blocks, and {layer_name(op)} "
                "is none: put it into weights.ignore, or take another solver"
            )


def check_folded(store: WeightStore, plan: FoldPlan, targets: Mapping[str, LinearOp], dtype: torch.dtype) -> list[str]:
    """Refuses plain parameters that the output's dtype does not hold once maps are folded into them: those around the
    blocks, and vectors in blocks. Returns what to say of biases that are too small for it.
    """
    ranges, graph = Ranges(dtype), store.graph
    changed = {name for name, edits in plan.edits.items() if edits and name not in targets}
    if changed.intersection((*graph.outer_params(), *graph.tied)):
        for name, tensor in folded_outer(plan, store.read(graph.outer_params())).items():
            if name not in targets:
                ranges.add(name, tensor.float())
    for index in range(len(graph.blocks)):
        vectors = [name for name in graph.block_params(index) if len(store.shapes[name]) == 1]
        here = [name for name in vectors if name in changed]
        for name, tensor in fold(plan, store.read(vectors), here).items() if here else ():
            ranges.add(name, tensor.float())
    return ranges.check(ranges.largest)
