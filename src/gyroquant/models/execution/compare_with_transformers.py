"""Checks that a model was read as transformers reads it: a few tokens pass through both, block by block, in fp32.

The proof compares a folded model with the original as gyroquant read it. It cannot show that gyroquant misread the
model. This check can. transformers opens the folder itself and keeps the blocks on disk, so memory never holds more
than one block.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.models.execution.messages import quiet
from gyroquant.models.execution.runner import BlockRunner, auto_class, evaluating, tokens_first
from gyroquant.models.folding.fold import fp32
from gyroquant.models.folding.prove import worst_token_error
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.models.stores.base import CheckpointStore, ModuleStore, WeightStore
from gyroquant.system.progress import Advance

TOKENS = 16
_THRESHOLD = 1e-4  # relative error in fp32; the same code on the same numbers gives 0
_COARSE = 2e-2  # relative error of 16-bit models in memory


@dataclass(frozen=True)
class Comparison:
    """The relative errors, at the worst token, against transformers' own results.

    - tokens: the number of tokens that were compared.
    - error: the largest error of the hidden states before the first block and after each block.
    - logit_error: the error of the logits.
    - note: the reason why nothing was compared. Empty if the models were compared.
    """

    tokens: int = 0
    error: float = 0.0
    logit_error: float = 0.0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def compare_with_transformers(store: WeightStore, progress: Advance = lambda: None) -> Comparison:
    """Runs a few tokens through a model as it was read and as transformers runs it. Reports progress after each block.

    A model in memory is compared with its own forward pass. GGUF files and folders that gyroquant wrote are not
    compared, because transformers does not read them without gyroquant. Raises UnsupportedModelError, with the first
    block where the two differ, and InputError if transformers does not open the folder.
    """
    if isinstance(store, ModuleStore):
        with evaluating(store.model):
            ids = _some_tokens(store).to(store.model.device)
            return _compare(store, ids, *_states(store.model, store.graph, ids), progress)
    if type(store) is not CheckpointStore:
        return Comparison(note=f"transformers does not read {store.label} without gyroquant")
    converted = 4 * sum(op.numel for op in _stacked(store))
    with tempfile.TemporaryDirectory() as scratch:
        free = shutil.disk_usage(scratch).free
        if converted > free // 2:  # transformers writes stacked experts to its own files
            return Comparison(note=f"{scratch} does not have enough room for the experts of {store.label} in fp32")
        model, ids = _opened_by_transformers(store, scratch), _some_tokens(store)
        states, logits = _states(model.eval(), store.graph, ids)
        del model  # before this model runs, so that memory holds only one of the two
        gc.collect()
        return _compare(store, ids, states, logits, progress)


def _opened_by_transformers(store: CheckpointStore, scratch: str) -> Any:
    """The model as transformers opens its folder, in fp32. Raises InputError if transformers does not open it."""
    try:
        with quiet():
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
        reason = " ".join(str(error).split())
        raise InputError(
            f"transformers does not open {store.label}: {reason[:400]}; correct config.json, or download it again"
        ) from error


def _stacked(store: WeightStore) -> list[LinearOp]:
    """The stacked experts, which transformers assembles from several stored tensors."""
    return [op for op in store.graph.block_linears if op.entry.stacked]


def _blocks_on_disk(model: nn.Module, graph: ModelGraph) -> dict[str, str]:
    """The device map of a model for transformers: blocks are on disk, all other modules in memory.

    accelerate fills a parameter when the module that holds it runs. Blocks with a parameter that may be used without
    its module stay in memory: one that is beside other modules, or whose products are intercepted.
    """
    blocks = graph.architecture.blocks
    devices = {}
    for i in range(len(graph.blocks)):
        inside = model.get_submodule(f"{blocks}.{i}").modules()
        mixed = any([*module.children()] and [*module.parameters(recurse=False)] for module in inside)
        mixed |= any(op.entry.intercepted for op in graph.blocks[i].linears)
        devices[f"{blocks}.{i}"] = "cpu" if mixed else "disk"
    parents = [""] + [blocks[:i] for i, letter in enumerate(blocks) if letter == "."]
    for parent in parents:
        module = model.get_submodule(parent)
        children, own = module.named_children(), module.named_parameters(recurse=False)
        for name, _ in (*children, *own, *module.named_buffers(recurse=False)):
            full = f"{parent}.{name}" if parent else name
            if full not in parents and full != blocks:
                devices[full] = "cpu"
    return devices


def _compare(
    store: WeightStore, ids: Tensor, states: list[Tensor], expected_logits: Tensor, progress: Advance
) -> Comparison:
    """Runs a model as it was read and compares it with transformers' hidden states and logits.

    `states` are the input of the first block and the output of each block, shape (1, tokens, hidden).
    """
    graph, in_memory = store.graph, isinstance(store, ModuleStore)
    typed = (lambda tensors: tensors) if in_memory else fp32
    threshold = _THRESHOLD if store.dtype == torch.float32 or not in_memory else _COARSE
    runner, outer = BlockRunner.of(store), typed(store.read(graph.outer_params()))
    hidden, calls = runner.begin(ids, outer)
    errors = [_checked(store, "the embeddings", worst_token_error(states[0], hidden), threshold)]
    for i in range(len(calls)):
        hidden, *more = runner.step(i, typed(store.read(graph.block_params(i))), hidden, calls[i])
        runner.advance(calls, i, more)
        errors.append(_checked(store, f"block {i}", worst_token_error(states[i + 1], hidden), threshold))
        progress()
    logits = runner.finish(hidden, outer)
    logit_error = _checked(store, "the last norm or the head", worst_token_error(expected_logits, logits), threshold)
    return Comparison(ids.numel(), max(errors), logit_error)


def _checked(store: WeightStore, place: str, error: float, threshold: float) -> float:
    """The error. Raises UnsupportedModelError if it is larger than the threshold."""
    if error <= threshold:
        return error
    raise UnsupportedModelError(
        f"{store.label} was not read as transformers {transformers.__version__} reads it: the first difference is in "
        f"{place} (relative error {error:.1e}). Nothing was written; please report it with config.json and the names "
        "of the stored tensors"
    )


def _some_tokens(store: WeightStore) -> Tensor:
    """Token ids of shape (1, TOKENS). There are no special tokens among them, such as padding or image placeholders."""
    config = store.config.to_dict() | store.text_config.to_dict()
    special: set[int] = set()
    for key, value in config.items():
        if key.endswith(("token_id", "token_index")):
            special |= set(value) if isinstance(value, (list, tuple)) else {value}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(store.text_config.vocab_size, (8 * TOKENS,), generator=generator)
    plain = [token for token in ids.tolist() if token not in special] or ids.tolist()
    return torch.tensor((plain * TOKENS)[:TOKENS])[None]


def _states(model: Any, graph: ModelGraph, ids: Tensor) -> tuple[list[Tensor], Tensor]:
    """The input of the first block, the output of each block, and the logits, from the model's own forward pass."""
    blocks: nn.ModuleList = model.get_submodule(graph.architecture.blocks)
    states: list[Tensor] = []

    def keep_input(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        states.append(tokens_first(given.clone(), graph.architecture))

    def keep_output(_: nn.Module, args: Any, out: Any) -> None:
        made = out[0] if isinstance(out, (tuple, list)) else out
        states.append(tokens_first(made.clone(), graph.architecture))

    hooks = [blocks[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    hooks += [block.register_forward_hook(keep_output) for block in blocks]
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return states, logits
