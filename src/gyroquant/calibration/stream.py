"""Hidden states of many sequences, carried through a model one block at a time.

Memory holds one block and the hidden states, whatever the depth of the model. Hidden states can be in files instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from gyroquant.calibration.arguments import BlockArguments
from gyroquant.calibration.kept_outputs import KeptOutputs
from gyroquant.calibration.observers import PairedForward, PairedSecondMoments, SecondMoments
from gyroquant.calibration.offload import Spilled
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockDoneError, BlockRunner
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.environment import reused_memory
from gyroquant.system.progress import Advance

_TOKENS = 4096  # this many tokens run through a block at once
_HEAD_TOKENS = 512  # this many run through the head at once, because logits are wide


class Stream:
    """The hidden states of `input_ids`, shape (sequences, length), on their way through a model.

    - dtype: what blocks compute in.
    - offload: a folder. The hidden states are then in memory-mapped files there, and memory holds those of the current
      and the next sequences. By default they are in memory.
    - pairing: the hidden states of the original model are then kept too, in `original`. `observe` runs the original's
      block on them, with the weights that it is given; `run` does not.
    - kept: the outputs of layers that `run` and `observe` do not compute again. None by default.
    - observing_seconds: the time spent in `observe` so far, in seconds.
    """

    def __init__(
        self,
        runner: BlockRunner,
        input_ids: Tensor,
        outer: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        offload: Path | None = None,
        device: torch.device | str = "cpu",
        pairing: PairedForward | None = None,
    ):
        self.runner, self.input_ids, self.dtype, self.device = runner, input_ids, dtype, torch.device(device)
        self.batch = max(1, _TOKENS // input_ids.shape[1])
        self._outer = {name: t.to(device=self.device, dtype=dtype) for name, t in outer.items()}
        self.arguments = BlockArguments(len(input_ids), runner.passed)
        self.observing_seconds = 0.0
        self.kept: KeptOutputs | None = None
        self._spilled: list[Spilled] = []
        self.hidden: Tensor | None = None
        for start, ids in self._batches():
            first, calls = runner.begin(ids, self._outer)
            if start == 0:
                self.arguments.compare(calls, runner.begin(ids.roll(1, 1), self._outer)[1])
            self.arguments.add(start, len(ids), calls)
            if self.hidden is None:
                few = range(len(ids).bit_length() if pairing else 1)  # tuning runs on a few sequences at a time
                for size in {1 << k for k in few} - self.arguments.calls.keys():
                    self.arguments.calls[size] = runner.begin(ids[:size], self._outer)[1]
                self.hidden = self._allocate((len(input_ids), *first.shape[1:]), offload)
            self.hidden[start : start + len(ids)] = first
            self._end_batch(start)
        self.pairing = pairing
        self.original: Tensor | None = None
        if pairing is not None and self.hidden is not None:
            self.original = self._allocate(tuple(self.hidden.shape), offload)
            for start, ids in self._batches():
                self.original[start : start + len(ids)] = self.hidden[start : start + len(ids)]
                self._end_batch(start)

    def _allocate(self, shape: tuple[int, ...], offload: Path | None) -> Tensor:
        if offload is None:
            return torch.empty(shape, dtype=self.dtype)
        spilled = Spilled(offload, shape, self.dtype)
        self._spilled.append(spilled)
        return spilled.tensor

    def _end_batch(self, start: int) -> None:
        """Ends the batch at `start`: in files, its rows are released, and the batch after the next is requested."""
        for spilled in self._spilled:
            spilled.behind(start, start + self.batch)
            spilled.ahead(start + 2 * self.batch, start + 3 * self.batch)

    def _batches(self) -> list[tuple[int, Tensor]]:
        return [
            (start, self.input_ids[start : start + self.batch].to(self.device))
            for start in range(0, len(self.input_ids), self.batch)
        ]

    @property
    def steps(self) -> int:
        """The number of batches in one run of a block, and of progress reports."""
        return -(-len(self.input_ids) // self.batch)

    @property
    def states(self) -> list[Tensor | Path]:
        """What a run keeps to continue later: the hidden states, then the original's; as paths if they are in files."""
        if self._spilled:
            spilled = [spilled.tensor if spilled.path is None else spilled.path for spilled in self._spilled]
            return [*spilled, *self.arguments.states]
        return [*(state for state in (self.hidden, self.original) if state is not None), *self.arguments.states]

    def free_outer(self) -> None:
        """Frees the parameters outside the blocks, which blocks do not need."""
        self._outer = {}

    def run(
        self, index: int, tensors: Mapping[str, Tensor], keep: bool = True, progress: Advance = lambda: None
    ) -> None:
        """Runs block `index` on every sequence. With `keep`, its output replaces its input."""
        assert self.hidden is not None
        local = self.local(tensors)
        with reused_memory():
            for start, ids in self._batches():
                self._run(index, local, self.hidden, start, len(ids), keep)
                self._end_batch(start)
                progress()

    def run_all(self, store: WeightStore, progress: Advance = lambda: None) -> None:
        """Runs all blocks of a model, online operations included. Reports progress once a block."""
        for index in range(len(store.graph.blocks)):
            with attached(self.runner.model, store.graph.in_block(index, store.online)):
                self.run(index, store.read(store.graph.block_params(index)))
            progress()

    def observer(self, n: int) -> SecondMoments:
        """The observer that `observe` feeds for an input of n features. With a pairing it sees input errors too."""
        return SecondMoments(n) if self.pairing is None else PairedSecondMoments(n, self.pairing)

    def observe(
        self,
        index: int,
        tensors: Mapping[str, Tensor],
        progress: Advance = lambda: None,
        original: Mapping[str, Tensor] | None = None,
        move: bool = True,
        rounded: bool = True,
    ) -> None:
        """Runs block `index` for observers. The hidden states stay; those of the original move to the block's output.

        The original runs with the parameters `original`, by default with `tensors`. Without `move`, its hidden states
        stay too. Without `rounded`, only the original runs.
        """
        started = time.perf_counter()
        local = self.local(tensors)
        unrounded = local if original is None or self.original is None else self.local(original)
        with reused_memory():
            for start, ids in self._batches():
                for hidden in self._turns(ids.numel()):
                    first = hidden is self.original
                    if not (first or rounded):
                        continue
                    weights = unrounded if first else local
                    self._run(index, weights, hidden, start, len(ids), keep=first and move)
                self._end_batch(start)
                progress()
        self.observing_seconds += time.perf_counter() - started

    def mean_error(self, index: int, tensors: Mapping[str, Tensor], progress: Advance = lambda: None) -> Tensor:
        """The output error of block `index`: the original's output, from `observe`, minus the block's own.

        The mean over tokens, shape (hidden,), fp64.
        """
        assert self.hidden is not None
        assert self.original is not None
        local, total = self.local(tensors), torch.zeros(self.hidden.shape[-1], dtype=torch.float64, device=self.device)
        for start, ids in self._batches():
            stop = start + len(ids)
            call = self.arguments.call(index, range(start, stop))
            out = self.runner.run(index, local, self.hidden[start:stop].to(self.device), call)
            total += (self.original[start:stop].to(self.device).double() - out.double()).sum((0, 1))
            self._end_batch(start)
            progress()
        return total.cpu() / self.input_ids.numel()

    def observe_head(self, outer: Mapping[str, Tensor], progress: Advance = lambda: None) -> None:
        """Runs the head for observers of its input. Reports progress once a sequence."""
        local = self.local(outer)
        for number, start, stop in self._pieces():
            for hidden in self._turns(stop - start):
                self._finish(local, hidden[number, start:stop])
            if stop == self.input_ids.shape[1]:
                progress()

    def runs_original(self) -> bool:
        """Whether the original's block is running, in `observe`."""
        return self.pairing is not None and self.pairing.original

    def _turns(self, tokens: int) -> Iterator[Tensor]:
        """The hidden states to run for each batch, one after the other."""
        assert self.hidden is not None
        if self.pairing is None or self.original is None:
            return iter([self.hidden])
        return self.pairing.turns(self.original, self.hidden, tokens)

    def local(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors on the device and in the dtype that blocks compute in."""
        return {name: tensor.to(device=self.device, dtype=self.dtype) for name, tensor in tensors.items()}

    def _run(self, index: int, local: Mapping[str, Tensor], states: Tensor, start: int, count: int, keep: bool) -> None:
        hidden, sequences = states[start : start + count], range(start, start + count)
        stream = "original" if states is self.original else ""
        try:
            call = self.arguments.call(index, sequences, stream)
            with nullcontext() if self.kept is None else self.kept.running(stream, start):
                out, *more = self.runner.step(index, local, hidden.to(self.device), call)
        except BlockDoneError:
            if keep:  # an observer stopped a block that had to run to its end
                raise
            return
        if keep:
            hidden.copy_(out)
            self.arguments.after(index, sequences, call, more, stream)

    def few(self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor, sequences: Sequence[int]) -> Tensor:
        """The output of block `index` for one sequence, shape (1, length, hidden), differentiable.

        `sequences` are the numbers of the sequences. With a pairing, there may be any power of two of them up to
        `batch`.
        """
        return self.runner.differentiable(index, tensors, hidden, self.arguments.call(index, sequences))

    def _pieces(self) -> Iterator[tuple[int, int, int]]:
        count, length = self.input_ids.shape
        for number in range(count):
            for start in range(0, length, _HEAD_TOKENS):
                yield number, start, min(start + _HEAD_TOKENS, length)

    def _finish(self, local: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        return self.runner.finish(hidden[None].to(self.device), local)[0]

    def logits(self, outer: Mapping[str, Tensor]) -> Iterator[tuple[int, int, Tensor]]:
        """The logits of every sequence, in pieces: (sequence, first position, logits (positions, vocabulary))."""
        assert self.hidden is not None
        local = self.local(outer)
        for number, start, stop in self._pieces():
            yield number, start, self._finish(local, self.hidden[number, start:stop])
