"""Runs a model in pieces: the embeddings, one block at a time, and the head.

The caller gives the weights of each piece. The modules are those of transformers on the meta device, so every
architecture runs its own code. Only the parameters are passed in. Blocks have arguments besides their input, such as
masks and positions. To record them, the model runs once with stubs in place of its blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.models.execution.online import OnlineOp, attached
from gyroquant.models.graph.model_graph import ModelGraph
from gyroquant.models.graph.spec import Architecture

_MAX_BUFFERS = 1 << 30  # bytes of one module; rotary frequencies and scales take some kilobytes

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a block besides its hidden states: by position, and by name."""
Place = str | int
"""The place of an argument in a call: its name, or its position after the hidden states."""
Places = dict[Place, Any]


def with_arguments(call: Call, changed: Mapping[Place, Any]) -> Call:
    """A call with some arguments changed."""
    if not changed:
        return call
    rest, named = call
    return (
        tuple(changed.get(place, value) for place, value in enumerate(rest)),
        {name: changed.get(name, value) for name, value in named.items()},
    )


def own_mappings(call: Call) -> Call:
    """A call with its own copies of the mappings that blocks fill, so that other runs of the block do not see them."""
    places: Places = dict(enumerate(call[0])) | call[1]
    return with_arguments(
        call, {place: copy(value) for place, value in places.items() if isinstance(value, MutableMapping)}
    )


class _StopRun(Exception):  # noqa: N818 - not an error
    """Raised by the last stub to end a run in which only the arguments of blocks are recorded."""


class BlockDoneError(Exception):
    """Raised by a hook to end a block early, after the hook has observed everything that the block runs for."""


class _Stub(nn.Module):
    """Stands in for a block: records its arguments and returns its input, or `answer` if there is one.

    `returns` is the length of the tuple that the block returns, or 0 if it returns a tensor.
    """

    def __init__(self, block: nn.Module, returns: int) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # not a submodule, so that traversal does not find it
        self.returns = returns
        self.call: Call | None = None
        self.answer: Tensor | None = None
        self.stop = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, rest, named = _split_call(args, kwargs)
        self.call = (rest, named)
        self.first = hidden
        if self.stop:
            raise _StopRun
        out = hidden if self.answer is None else self.answer
        return (out, *[None] * (self.returns - 1)) if self.returns else out


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], dict(kwargs)
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def auto_class(config: Any) -> Any:
    """The auto class of transformers for a configuration: of language models, or of multimodal models.

    Raises InputError if the configuration does not belong to a language model.
    """
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return AutoModelForMultimodalLM
    raise InputError(
        f"transformers has no language model of the type {config.model_type!r}: only decoders that predict the next "
        "token can be opened"
    )


def build_skeleton(config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a configuration with all parameters on the meta device and all buffers filled.

    Buffers are computed as transformers computes them when it loads a model. Rotary frequencies and embedding scales
    are not stored in files. Persistent buffers have their initial values until those of a file are passed in. Raises
    InputError if buffers are infinite, NaN or larger than 1 GiB.
    """
    stored = config.dtype
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    config.dtype = stored  # transformers has overwritten it
    empty = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if buffer.is_meta
    ]
    for module, name, buffer in empty:
        if buffer.nbytes > _MAX_BUFFERS:
            raise InputError(f"its configuration makes the buffer {name} larger than 1 GiB: correct config.json")
        persistent = name not in module._non_persistent_buffers_set
        setattr(module, name, nn.Buffer(torch.full_like(buffer, 0, device="cpu"), persistent=persistent))
    if empty:
        _initialise(model, model)
    wrong = [name for module, name, _ in empty if not bool(getattr(module, name).isfinite().all())]
    if wrong:
        raise InputError(
            f"its configuration makes the buffers {', '.join(sorted(set(wrong)))} infinite or NaN: correct the RoPE "
            "settings in config.json"
        )
    return model.eval()


def _initialise(module: nn.Module, owner: Any) -> None:
    """Initialises a module and its children as transformers does: each by the closest model that contains it."""
    owner = module if isinstance(module, PreTrainedModel) else owner
    for child in module.children():
        _initialise(child, owner)
    owner._init_weights(module)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode (no dropout) for the duration of a with block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def pass_back(made: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
    """Propagates the gradients of leaves to the tensors from which the leaves were detached.

    - made: the tensors, by name.
    - leaves: the leaves, under the same names, of any dtype.
    """
    moved = [name for name, value in made.items() if value.requires_grad and leaves[name].grad is not None]
    gradients = [leaves[name].grad.to(made[name].dtype) for name in moved]  # type: ignore[union-attr]
    torch.autograd.backward([made[name] for name in moved], gradients)


def tokens_first(hidden: Tensor, architecture: Architecture) -> Tensor:
    """Hidden states of a model's block with the axes of sequences and positions first."""
    axis = architecture.batch_axis
    return hidden if axis == 0 else hidden.movedim((axis, axis + 1), (0, 1))


class _Store(Protocol):
    """A model that can be run in pieces: a module without weights, and its graph."""

    @property
    def graph(self) -> ModelGraph: ...

    def skeleton(self) -> Any: ...


class BlockRunner:
    """Runs a model in pieces. Each call gets its weights as a mapping from full parameter names to tensors.

    `online` are the operations outside the blocks that run with these weights before the first block.
    """

    def __init__(self, model: Any, graph: ModelGraph, online: Iterable[OnlineOp] = ()):
        self.model, self.online = model, tuple(online)
        self.tied = graph.tied
        self.architecture, blocks = graph.architecture, graph.architecture.blocks
        self._returns, self._axis = graph.architecture.returns, graph.architecture.batch_axis
        self.blocks: nn.ModuleList = model.get_submodule(blocks)
        self._parent, self._name = model.get_submodule(blocks.rpartition(".")[0]), blocks.rpartition(".")[2]

    @classmethod
    def of(cls, store: _Store, online: Iterable[OnlineOp] = ()) -> BlockRunner:
        """A runner of a store's skeleton. Of the operations `online`, those outside the blocks count."""
        return cls(store.skeleton(), store.graph, store.graph.around_blocks(online))

    @torch.no_grad()
    def begin(self, input_ids: Tensor, outer: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        """The input of the first block, shape (batch, length, hidden), and the other arguments of each block.

        A model with several residual streams has one more axis: (batch, length, streams, hidden).

        Raises UnsupportedModelError if the model does not run each block once and in order, or adds positions.
        """
        stubs = self._stubs()
        stubs[-1].stop = True
        with attached(self.model, self.online):
            self._with_stubs(stubs, input_ids, outer)
        if any(stub.call is None for stub in stubs):
            raise UnsupportedModelError(
                f"{self.model.config.model_type} does not run each of its blocks once and in order, which is not "
                "supported: choose a model that does"
            )
        first = self._tokens_first(stubs[0].first)
        if first.shape[:2] != input_ids.shape:
            raise UnsupportedModelError(
                f"{self.model.config.model_type} runs its blocks on {first.shape[1]} positions for "
                f"{input_ids.shape[1]} tokens, which is not supported: choose a model that adds none"
            )
        return first, [stub.call for stub in stubs if stub.call is not None]

    @property
    def passed(self) -> Mapping[int, Place]:
        """What a block returns besides hidden states and the next one takes: places by the number of the result."""
        return dict(self.architecture.passed)

    @torch.no_grad()
    def step(self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor, call: Call) -> tuple[Any, ...]:
        """The result of `run`, and what the block returns besides it."""
        return self._results(index, tensors, hidden, call)

    def check_separate(self, work: str) -> None:
        """Raises UnsupportedModelError if blocks take more than hidden states from the block before."""
        if self.passed:
            raise UnsupportedModelError(
                f"{self.model.config.model_type} passes more than hidden states from block to block, and {work} does "
                "not support that: leave it out of the recipe"
            )

    def advance(self, calls: list[Call], index: int, more: Sequence[Any]) -> None:
        """Gives the next block's call what block `index` returned besides its hidden states."""
        if self.passed and index + 1 < len(calls):
            given = {place: more[number] for number, place in self.passed.items() if number < len(more)}
            calls[index + 1] = with_arguments(calls[index + 1], given)

    @torch.no_grad()
    def run(self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor, call: Call) -> Tensor:
        """The output of block `index` for the input `hidden`. Both have shape (batch, length, hidden)."""
        return self.differentiable(index, tensors, hidden, call)

    def differentiable(self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor, call: Call) -> Tensor:
        """The result of `run`, with gradients."""
        return self._results(index, tensors, hidden, call)[0]

    def _results(self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor, call: Call) -> tuple[Any, ...]:
        prefix = self.architecture.block_prefix(index)
        local = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        out = functional_call(self.blocks[index], local, (self._as_given(hidden), *call[0]), call[1])
        out, *more = out if isinstance(out, (tuple, list)) else (out,)
        return (self._tokens_first(out), *more)

    @torch.no_grad()
    def finish(self, hidden: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        """The logits for the output of the last block, shape (batch, length, vocabulary)."""
        return self.logits(hidden, outer)

    def logits(self, hidden: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        """The result of `finish`, with gradients."""
        stubs = self._stubs()
        stubs[-1].answer = self._as_given(hidden)
        padding = getattr(self.model.config.get_text_config(decoder=True), "pad_token_id", None)
        any_token = 1 if padding == 0 else 0  # padding would change the mask of some models
        input_ids = torch.full(hidden.shape[:2], any_token, dtype=torch.long, device=hidden.device)
        out = self._with_stubs(stubs, input_ids, outer)
        assert out is not None
        return out

    def _tokens_first(self, hidden: Tensor) -> Tensor:
        return tokens_first(hidden, self.architecture)

    def _as_given(self, hidden: Tensor) -> Tensor:
        axis = self._axis
        return hidden if axis == 0 else hidden.movedim((0, 1), (axis, axis + 1))

    def _stubs(self) -> list[_Stub]:
        return [_Stub(block, self._returns) for block in self.blocks]

    def _with_stubs(self, stubs: Sequence[_Stub], input_ids: Tensor, outer: Mapping[str, Tensor]) -> Tensor | None:
        weights = {alias: outer[name] for alias, name in self.tied.items()} | dict(outer)
        setattr(self._parent, self._name, nn.ModuleList(stubs))
        try:
            arguments = {"input_ids": input_ids, "use_cache": False}
            out = functional_call(self.model, weights, (), arguments, tie_weights=False)
            return out.logits
        except _StopRun:
            return None
        finally:
            setattr(self._parent, self._name, self.blocks)
