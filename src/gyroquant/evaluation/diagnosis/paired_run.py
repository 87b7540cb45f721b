"""Runs a rounded model and its original on the same windows, one block of both after the other.

Memory holds one block of each model and the hidden states of some windows, as in `evaluation.perplexity`: the states of
both models before and after the block, and what the rounded block makes of the original's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from gyroquant.calibration.stream import Stream
from gyroquant.evaluation.diagnosis.basis import Basis
from gyroquant.evaluation.diagnosis.hidden_states import BlockStates
from gyroquant.evaluation.perplexity import (
    WindowScores,
    counted_tokens,
    paired_logs,
    window_sums,
    windows_at_once,
)
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner, evaluating, own_mappings
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Advance


@dataclass(frozen=True)
class TokenPredictions:
    """What both models predict for tokens of one window that count, in their order.

    - window: the number of the window.
    - wanted: the tokens that came, shape (tokens,).
    - rounded, original: probabilities, shape (tokens, vocabulary), fp32.
    """

    window: int
    wanted: Tensor
    rounded: Tensor
    original: Tensor


class SeeBlock(Protocol):
    """Takes the states around a block, and whether they are of the first windows."""

    def __call__(self, states: BlockStates, first: bool) -> None: ...


SeeTokens = Callable[[TokenPredictions], None]


class PairedRun:
    """The rounded model `store` and its original, `against`, on windows of shape (windows, length).

    - dtype, device: what blocks compute in, and where.
    - bos: tokens whose predictions do not count.
    - basis: the change of basis from the original's states to those of `store`.
    """

    def __init__(
        self,
        store: WeightStore,
        against: WeightStore,
        basis: Basis,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        bos: Sequence[int] = (),
    ):
        self.stores, self.basis, self.dtype, self.device, self.bos = (store, against), basis, dtype, device, bos

    def pieces(self, input_ids: Tensor) -> range:
        """The numbers of the first windows of all pieces that run at once."""
        return range(0, len(input_ids), windows_at_once(self.stores, input_ids.shape[1], self.dtype))

    @torch.no_grad()
    def run(self, input_ids: Tensor, see_block: SeeBlock, see_tokens: SeeTokens, advance: Advance) -> WindowScores:
        """Runs all windows and returns their scores, the same as `score_windows`. Reports progress once a block."""
        totals = torch.zeros(3, len(input_ids), dtype=torch.float64)
        counted = counted_tokens(input_ids, self.bos)
        pieces = self.pieces(input_ids)
        for first in pieces:
            ids = input_ids[first : first + pieces.step]
            with evaluating(self.stores[0].skeleton()), evaluating(self.stores[1].skeleton()):
                streams = self._after_blocks(ids, partial(see_block, first=first == 0), advance)
                for number, start, logs in paired_logs(list(self.stores), streams):
                    keep = counted[first + number]
                    totals[:, first + number] += window_sums(ids[number], start, logs, keep)
                    for predictions in _predictions(first + number, ids[number], start, logs, keep):
                        see_tokens(predictions)
        return WindowScores(totals[0], counted[:, 1:].sum(1).cpu(), totals[1], totals[2])

    def _after_blocks(
        self, ids: Tensor, see: Callable[[BlockStates], None], advance: Advance
    ) -> list[tuple[Stream, dict[str, Tensor]]]:
        streams = []
        for store in self.stores:
            outer = store.read(store.graph.outer_params())
            streams.append((Stream(BlockRunner.of(store), ids, outer, self.dtype, device=self.device), outer))
            streams[-1][0].free_outer()
        (rounded, _), (original, _) = streams
        expected = self.basis.apply(_states(original).clone())
        for index in range(len(self.stores[0].graph.blocks)):
            before, rounded_before = _states(original).clone(), _states(rounded).clone()
            with _block(self.stores[0], index) as tensors:
                own = _own(rounded, index, tensors, expected)
                rounded.run(index, tensors)
            with _block(self.stores[1], index) as tensors:
                original.run(index, tensors)
            after = self.basis.apply(_states(original))
            see(BlockStates(index, before, _states(original), expected, after, rounded_before, _states(rounded), own))
            expected = after.clone() if after is _states(original) else after
            advance()
        return streams


@contextmanager
def _block(store: WeightStore, index: int) -> Iterator[dict[str, Tensor]]:
    """The parameters of a block, while its online operations are attached."""
    with ExitStack() as stack:
        stack.enter_context(attached(store.skeleton(), store.graph.in_block(index, store.online)))
        yield store.read(store.graph.block_params(index))


def _states(stream: Stream) -> Tensor:
    assert stream.hidden is not None
    return stream.hidden


def _own(stream: Stream, index: int, tensors: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
    """The output of a stream's block for other inputs. The stream stays as it is."""
    local, outputs = stream.local(tensors), torch.empty_like(inputs)
    for start in range(0, len(inputs), stream.batch):
        piece = inputs[start : start + stream.batch]
        call = own_mappings(stream.arguments.call(index, range(start, start + len(piece))))
        outputs[start : start + len(piece)] = stream.runner.run(index, local, piece.to(stream.device), call)
    return outputs


def _predictions(
    window: int, ids: Tensor, start: int, logs: Sequence[Tensor], counted: Tensor
) -> Iterator[TokenPredictions]:
    """The predictions of one piece of a window whose next token is counted; nothing if there are none."""
    where = slice(start + 1, start + 1 + len(logs[0]))
    keep = counted[where].to(logs[0].device)
    if bool(keep.any()):
        wanted = ids[where].to(logs[0].device)[keep]
        rounded, original = (log[: len(keep)][keep].exp() for log in logs)
        yield TokenPredictions(window, wanted, rounded, original)
