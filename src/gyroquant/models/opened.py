"""Whether a model was read as transformers reads it: a few tokens pass through both, block by block, in fp32.

The proof compares a folded model with the original as it was read here. It says nothing where the original was read as
another model; this does. transformers opens the folder itself, with its blocks left on disk, so that no more than one
of them is in memory at a time, here as there.
"""

from __future__ import annotations

import gc
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.models.graph import LinearOp, ModelGraph
from gyroquant.models.prove import fp32, worst_token_error
from gyroquant.models.runner import BlockRunner, auto_class, evaluating
from gyroquant.models.store import CheckpointStore, ModuleStore, WeightStore
from gyroquant.progress import Advance

TOKENS = 16
_THRESHOLD = 1e-4  # relative, in fp32: the same code on the same numbers gives 0
_COARSE = 2e-2  # for models in memory that are in 16 bits


@dataclass(frozen=True)
class Comparison:
    """How far the states behind each block, and the logits, are from transformers' own: relative, at the worst token.

    `note` says why nothing was compared, where nothing was.
    """

    tokens: int = 0
    error: float = 0.0
    logit_error: float = 0.0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def compare_with_transformers(store: WeightStore, progress: Advance = lambda: None) -> Comparison:
    """Runs a few tokens through a model as it was read and as transformers runs it; reports progress once a block.

    A model in memory is held against its own forward pass. GGUF files and folders that gyroquant wrote are not
    compared: transformers does not read them by itself.
    Raises UnsupportedModelError that names the first block where the two differ.
    """
    if isinstance(store, ModuleStore):
        with evaluating(store.model):
            ids = _some_tokens(store).to(store.model.device)
            return _compare(store, ids, *_states(store.model, store.graph, ids), progress)
    if type(store) is not CheckpointStore:
        return Comparison(note=f"transformers does not read {store.label} by itself")
    converted = 4 * sum(int(torch.Size(op.shape).numel()) for op in _stacked(store))
    with tempfile.TemporaryDirectory() as scratch:
        free = shutil.disk_usage(scratch).free
        if converted > free // 2:  # transformers keeps stacked experts in files of its own
            return Comparison(note=f"there is no room in {scratch} for the experts of {store.label} in fp32")
        model, ids = _opened_by_transformers(store, scratch), _some_tokens(store)
        states, logits = _states(model.eval(), store.graph, ids)
        del model  # before the same is done here: no more than one of the two is ever held
        gc.collect()
        return _compare(store, ids, states, logits, progress)


def _opened_by_transformers(store: CheckpointStore, scratch: str) -> Any:
    """The model as transformers opens its folder, in fp32. Raises InputError where it does not."""
    try:
        with _quiet():
            return auto_class(store.config).from_pretrained(
                store.folder,
                dtype=torch.float32,
                device_map=_blocks_on_disk(store.skeleton(), store.graph),
                offload_folder=scratch,
                key_mapping=store.key_mapping or None,
                trust_remote_code=False,
                use_safetensors=True,
            )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise InputError(f"transformers does not open {store.label}: {why[:400]}") from error


def _stacked(store: WeightStore) -> list[LinearOp]:
    """The experts that transformers puts together from several stored tensors."""
    return [op for group in store.graph.blocks for op in group.linears if op.entry.stacked]


def _blocks_on_disk(model: nn.Module, graph: ModelGraph) -> dict[str, str]:
    """Where transformers is to keep each part of a model: blocks on disk, everything else in memory."""
    blocks = graph.architecture.blocks
    places = {f"{blocks}.{i}": "disk" for i in range(len(graph.blocks))}
    parents = [""] + [blocks[:i] for i, letter in enumerate(blocks) if letter == "."]
    for parent in parents:
        module = model.get_submodule(parent)
        children, own = module.named_children(), module.named_parameters(recurse=False)
        for name, _ in (*children, *own, *module.named_buffers(recurse=False)):
            full = f"{parent}.{name}" if parent else name
            if full not in parents and full != blocks:
                places[full] = "cpu"
    return places


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from drawing bars of its own and from warnings that are for those who load a model."""
    log = transformers.utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    placing = logging.getLogger("accelerate.big_modeling")  # says that blocks are on disk, as they were meant to be
    before = placing.level
    log.disable_progress_bar()
    log.set_verbosity_error()
    placing.setLevel(logging.ERROR)
    try:
        yield
    finally:
        placing.setLevel(before)
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def _compare(store: WeightStore, ids: Tensor, theirs: list[Tensor], wanted: Tensor, progress: Advance) -> Comparison:
    """Runs a model as it was read, and holds it against `theirs`, what enters the first block and leaves each, (1,
    tokens, hidden), and against the logits that are `wanted`.
    """
    graph, memory = store.graph, isinstance(store, ModuleStore)
    typed = (lambda tensors: tensors) if memory else fp32
    threshold = _THRESHOLD if store.dtype == torch.float32 or not memory else _COARSE
    runner, outer = BlockRunner(store.skeleton(), graph), typed(store.read(graph.outer_params()))
    hidden, calls = runner.begin(ids, outer)
    errors = [_checked(store, "the embeddings", worst_token_error(theirs[0], hidden), threshold)]
    for i, call in enumerate(calls):
        hidden = runner.run(i, typed(store.read(graph.block_params(i))), hidden, call)
        errors.append(_checked(store, f"block {i}", worst_token_error(theirs[i + 1], hidden), threshold))
        progress()
    logits = runner.finish(hidden, outer)
    logit_error = _checked(store, "the last norm or the head", worst_token_error(wanted, logits), threshold)
    return Comparison(ids.numel(), max(errors), logit_error)


def _checked(store: WeightStore, place: str, error: float, threshold: float) -> float:
    if error <= threshold:
        return error
    raise UnsupportedModelError(
        f"{store.label} was not read as transformers {transformers.__version__} reads it: the first difference is in "
        f"{place} (relative error {error:.1e}). Nothing was done; please report it with config.json and the names of "
        "the stored tensors"
    )


def _some_tokens(store: WeightStore) -> Tensor:
    """Token ids of shape (1, TOKENS), none of which has a meaning of its own (padding, the place of an image)."""
    config = store.config.to_dict() | store.text_config.to_dict()
    special: set[int] = set()
    for key, value in config.items():
        if key.endswith(("token_id", "token_index")):
            special |= set(value) if isinstance(value, (list, tuple)) else {value}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(store.text_config.vocab_size, (8 * TOKENS,), generator=generator)
    plain = [one for one in ids.tolist() if one not in special] or ids.tolist()
    return torch.tensor((plain * TOKENS)[:TOKENS])[None]


def _states(model: Any, graph: ModelGraph, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """What enters the first block of a model and what leaves each, and the logits, as the model itself runs."""
    blocks: nn.ModuleList = model.get_submodule(graph.architecture.blocks)
    states: list[Tensor] = []

    def entering(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).clone())

    def leaving(_: nn.Module, args: Any, out: Any) -> None:
        states.append((out[0] if isinstance(out, tuple) else out).clone())

    hooks = [blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    hooks += [block.register_forward_hook(leaving) for block in blocks]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return states, logits
