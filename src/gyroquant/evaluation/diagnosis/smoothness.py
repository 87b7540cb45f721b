"""The smoothness ratio: how much steeper or flatter the rounded model's loss is in its input than the original's.

FINE ("Fitting Is Not Enough", arXiv 2605.08894) takes the norm of the loss's gradient at the input as a proxy of how
smooth a model is. The ratio is ``|dL/dx|`` of the rounded model over that of the original. Here x is the input of the
first block, L the mean negative log-likelihood of a window, and the norm is that of a token's gradient, averaged over
tokens. An orthogonal change of basis does not change it. Gradients pass straight through the rounding of activations.

FINE also finds that fewer tokens are likely candidates. `candidates` counts the tokens whose probability is above
EPSILON, which is this project's choice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from gyroquant.calibration.stream import Stream
from gyroquant.evaluation.perplexity import interval
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner, evaluating
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.files import save_tensors
from gyroquant.system.progress import Advance

EPSILON = 0.01
MOST_TOKENS = 4096  # the gradient is taken on the first windows with so many tokens, and on one at least
_HEAD_TOKENS = 512  # the head has gradients for this many at once


def candidates(probabilities: Tensor) -> Tensor:
    """How many tokens have a probability above EPSILON: shape (...), from probabilities of shape (..., vocabulary)."""
    return (probabilities > EPSILON).sum(-1)


def measured_windows(input_ids: Tensor) -> Tensor:
    """The windows on which gradients are taken."""
    return input_ids[: max(1, MOST_TOKENS // input_ids.shape[1])]


def input_gradients(store: WeightStore, input_ids: Tensor, counted: Tensor, device: str, advance: Advance) -> Tensor:
    """The norm of the gradient of a window's mean loss at the input of the first block, mean over its tokens.

    Shape (windows,), fp64. `input_ids` has shape (windows, length), and so has `counted`, which says whose prediction
    counts. The model runs in fp32, forwards and then backwards, one block at a time; the inputs of all blocks are in
    files meanwhile. Reports progress twice a block.
    """
    blocks = len(store.graph.blocks)
    outer = store.read(store.graph.outer_params())
    with evaluating(store.skeleton()), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        stream = Stream(BlockRunner.of(store), input_ids, outer, device=device)
        stream.free_outer()
        assert stream.hidden is not None
        for index in range(blocks):
            save_tensors({"states": stream.hidden}, _inputs(folder, index))
            with attached(store.skeleton(), store.graph.in_block(index, store.online)):
                stream.run(index, store.read(store.graph.block_params(index)))
            advance()
        gradients = _at_head(store, stream, outer, counted)
        for index in reversed(range(blocks)):
            states = load_file(_inputs(folder, index))["states"]
            gradients = _through_block(store, stream, index, states, gradients)
            advance()
    return torch.stack([gradient.double().norm(dim=-1).mean().cpu() for gradient in gradients])


def _inputs(folder: str, index: int) -> Path:
    return Path(folder) / f"{index}.safetensors"


def _at_head(store: WeightStore, stream: Stream, outer: Mapping[str, Tensor], counted: Tensor) -> list[Tensor]:
    """For every window, the gradient of its mean loss at the last hidden states, shape (1, length, ..., hidden)."""
    assert stream.hidden is not None
    local, gradients = stream.local(outer), []
    with attached(store.skeleton(), store.graph.around_blocks(store.online)), torch.enable_grad():
        for window, (ids, keep) in enumerate(zip(stream.input_ids, counted, strict=True)):
            total, parts = float(keep[1:].sum()), []
            for start in range(0, len(ids), _HEAD_TOKENS):
                state = stream.hidden[window : window + 1, start : start + _HEAD_TOKENS].to(stream.device)
                state = state.clone().requires_grad_()
                wanted, kept = (x[start + 1 : start + 1 + state.shape[1]].to(stream.device) for x in (ids, keep))
                logs = stream.runner.logits(state, local)[0, : len(wanted)].float().log_softmax(-1)
                loss = -(logs.gather(1, wanted[:, None])[:, 0] * kept).sum() / total
                parts.append(torch.autograd.grad(loss, state)[0])
            gradients.append(torch.cat(parts, 1))
    return gradients


def _through_block(
    store: WeightStore, stream: Stream, index: int, states: Tensor, gradients: list[Tensor]
) -> list[Tensor]:
    """The gradients at the inputs of a block, from those at its outputs, for every window."""
    local, found = stream.local(store.read(store.graph.block_params(index))), []
    with attached(store.skeleton(), store.graph.in_block(index, store.online)), torch.enable_grad():
        for window, gradient in enumerate(gradients):
            state = states[window : window + 1].to(stream.device).requires_grad_()
            out = stream.few(index, local, state, [window])
            found.append(torch.autograd.grad(out, state, gradient)[0])
    return found


def smoothness(rounded: Tensor, original: Tensor) -> dict[str, Any]:
    """The ratio of the mean gradient norms of two models, shape (windows,), with its bootstrap interval."""
    return {
        "ratio": float(rounded.mean() / original.mean()),
        "interval": list(interval(rounded, original)),
        "rounded": float(rounded.mean()),
        "original": float(original.mean()),
        "windows": len(rounded),
    }
