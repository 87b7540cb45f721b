"""Running a model piece by piece: embeddings, one block at a time, and the head, with weights handed in for each step.

The modules are transformers' own, on the meta device, so every architecture runs its own code; only their parameters
come from elsewhere. What a block is called with besides its input (masks, positions) is learned by running the model
once with stubs in place of its blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.models.graph import ModelGraph

_MAX_BUFFERS = 1 << 30  # bytes of one module; rotary frequencies and scales take some kilobytes

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _StopRun(Exception):  # noqa: N818 - not an error
    """Raised by the last stub when only the calls are wanted."""


class BlockDoneError(Exception):
    """Raised by a hook that has seen all that a block is run for; the rest of the block need not be computed."""


class _Stub(nn.Module):
    """Stands in for a block: notes how it is called, hands its input on, or returns what it is given."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["_block"] = block  # out of sight of module traversal
        self.call: Call | None = None
        self.answer: Tensor | None = None
        self.stop = False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden, rest, named = _split_call(args, kwargs)
        self.call = (rest, named)
        self.first = hidden
        if self.stop:
            raise _StopRun
        return hidden if self.answer is None else self.answer


def _split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], dict(kwargs)
    named = dict(kwargs)
    return named.pop("hidden_states"), (), named


def auto_class(config: Any) -> Any:
    """The class of transformers that opens the model of a configuration: a language model, or one around it that also
    takes images or sound. Raises InputError for a configuration that no language model has.
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
    """The model of a configuration with every parameter on the meta device and every buffer filled.

    Buffers are computed as transformers computes them when it loads a model: rotary frequencies and embedding scales,
    which no file stores, and persistent ones, which hold their initial values until a file's are handed in. Raises
    InputError where they come out infinite or are far too large.
    """
    stored = config.dtype
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    config.dtype = stored  # which transformers has overwritten
    for module in model.modules():
        empty = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        if empty:
            if sum(buffer.nbytes for buffer in empty.values()) > _MAX_BUFFERS:
                raise InputError(
                    f"its configuration makes {', '.join(empty)} larger than any model's: mend config.json"
                )
            for name, buffer in empty.items():
                persistent = name not in module._non_persistent_buffers_set
                setattr(module, name, nn.Buffer(torch.empty_like(buffer, device="cpu"), persistent=persistent))
            model._init_weights(module)
            wrong = [name for name in empty if not bool(getattr(module, name).isfinite().all())]
            if wrong:
                raise InputError(f"its configuration makes {', '.join(wrong)} infinite or NaN: mend its RoPE settings")
    return model.eval()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """A model in evaluation mode (no dropout) for the duration of a with block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def pass_back(made: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
    """Takes the gradients that have gathered in leaves, of any dtype, on to what these were made from."""
    moved = [name for name, value in made.items() if value.requires_grad and leaves[name].grad is not None]
    gradients = [leaves[name].grad.to(made[name].dtype) for name in moved]  # type: ignore[union-attr]
    torch.autograd.backward([made[name] for name in moved], gradients)


class BlockRunner:
    """Runs a model in pieces on weights that are handed in, each a mapping from full parameter names to tensors."""

    def __init__(self, model: Any, graph: ModelGraph):
        self.model = model
        self.tied = graph.tied
        self.prefix = blocks = graph.architecture.blocks
        self.blocks: nn.ModuleList = model.get_submodule(blocks)
        self._parent, self._name = model.get_submodule(blocks.rpartition(".")[0]), blocks.rpartition(".")[2]

    @torch.no_grad()
    def begin(self, input_ids: Tensor, outer: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        """The hidden states that enter the first block, shape (batch, length, hidden), and how each block is called."""
        stubs = [_Stub(block) for block in self.blocks]
        stubs[-1].stop = True
        self._with_stubs(stubs, input_ids, outer)
        if any(stub.call is None for stub in stubs):
            raise UnsupportedModelError(
                f"{self.model.config.model_type} does not run its blocks once each and in order"
            )
        return stubs[0].first, [stub.call for stub in stubs if stub.call is not None]

    @torch.no_grad()
    def run(self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor, call: Call) -> Tensor:
        """The output of block `index` for `hidden`, shape (batch, length, hidden), as it comes out and goes in."""
        return self.differentiable(index, tensors, hidden, call)

    def differentiable(self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor, call: Call) -> Tensor:
        """The same with gradients."""
        prefix = f"{self.prefix}.{index}."
        local = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        out = functional_call(self.blocks[index], local, (hidden, *call[0]), call[1])
        return out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def finish(self, hidden: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        """The logits for what leaves the last block, shape (batch, length, vocabulary)."""
        return self.logits(hidden, outer)

    def logits(self, hidden: Tensor, outer: Mapping[str, Tensor]) -> Tensor:
        """The same with gradients."""
        stubs = [_Stub(block) for block in self.blocks]
        stubs[-1].answer = hidden
        padding = getattr(self.model.config.get_text_config(decoder=True), "pad_token_id", None)
        any_token = 1 if padding == 0 else 0  # padding would change how some models mask
        input_ids = torch.full(hidden.shape[:2], any_token, dtype=torch.long, device=hidden.device)
        out = self._with_stubs(stubs, input_ids, outer)
        assert out is not None
        return out

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
