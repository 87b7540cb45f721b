"""Hidden states of many sequences, carried through a model one block at a time.

Memory holds one block and the hidden states, whatever the depth of the model. Hidden states can be in files instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gyroquant.calibration.observers import PairedForward, PairedSecondMoments, SecondMoments
from gyroquant.calibration.offload import Spilled
from gyroquant.errors import UnsupportedModelError
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockDoneError, BlockRunner, Call
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Advance

_TOKENS = 4096  # this many tokens run through a block at once
_HEAD_TOKENS = 512  # this many run through the head at once, because logits are wide


def varying(call: Call, other: Call) -> dict[str | int, Tensor]:
    """The arguments of a block that depend on the tokens: those that differ in two calls with different tokens.

    Keys are positions or names. Values are empty tensors. Raises UnsupportedModelError if such an argument is not a
    tensor with one entry for each sequence.
    """
    found: dict[str | int, Tensor] = {}
    places: list[tuple[str | int, object, object]] = [
        (i, a, b) for i, (a, b) in enumerate(zip(call[0], other[0], strict=True))
    ]
    for place, first, second in [*places, *((name, value, other[1][name]) for name, value in call[1].items())]:
        if _equal(first, second):
            continue
        if not isinstance(first, Tensor):
            raise UnsupportedModelError(
                f"the argument {place} of a block depends on the tokens and is a {type(first).__name__}, which is not "
                "supported"
            )
        found[place] = torch.empty(0)
    return found


def _equal(first: object, second: object) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and bool(torch.equal(first, second))
    if isinstance(first, (tuple, list)) and isinstance(second, (tuple, list)):
        return len(first) == len(second) and all(_equal(a, b) for a, b in zip(first, second, strict=True))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_equal(first[key], second[key]) for key in first)
    return isinstance(first, Tensor) == isinstance(second, Tensor)  # other objects are settings


class Stream:
    """The hidden states of `input_ids`, shape (sequences, length), on their way through a model.

    - dtype: what blocks compute in.
    - offload: a folder. The hidden states are then in memory-mapped files there, and memory holds those of the current
      and the next sequences. By default they are in memory.
    - pairing: the hidden states of the original model are then kept too, in `original`. `observe` runs the original's
      block on them, with the weights that it is given; `run` does not.
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
        self._calls: dict[int, list[Call]] = {}
        self._varying: dict[int, dict[str | int, Tensor]] = {}
        self.observing_seconds = 0.0
        self._spilled: list[Spilled] = []
        self.hidden: Tensor | None = None
        for start, ids in self._batches():
            first, calls = runner.begin(ids, self._outer)
            self._calls.setdefault(len(ids), calls)
            if start == 0:
                other = runner.begin(ids.roll(1, 1), self._outer)[1]
                self._varying = {i: varying(*pair) for i, pair in enumerate(zip(calls, other, strict=True))}
            self._keep(start, len(ids), calls)
            if self.hidden is None:
                few = range(len(ids).bit_length() if pairing else 1)  # tuning runs on a few sequences at a time
                for size in {1 << k for k in few} - self._calls.keys():
                    self._calls[size] = runner.begin(ids[:size], self._outer)[1]
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

    def _keep(self, start: int, count: int, calls: list[Call]) -> None:
        """Keeps the arguments of blocks that depend on the tokens of this batch."""
        for index, kept in self._varying.items():
            rest, named = calls[index]
            for place in kept:
                value = named[place] if isinstance(place, str) else rest[place]
                if kept[place].numel() == 0:
                    kept[place] = torch.empty((len(self.input_ids), *value.shape[1:]), dtype=value.dtype)
                kept[place][start : start + count] = value

    def _call(self, index: int, sequences: Sequence[int]) -> Call:
        """The arguments of a block, besides hidden states, for some sequences."""
        rest, named = self._calls[len(sequences)][index]
        kept = self._varying.get(index)
        if not kept:
            return rest, named
        chosen = {place: value[list(sequences)].to(self.device) for place, value in kept.items()}
        return (
            tuple(chosen.get(place, value) for place, value in enumerate(rest)),
            {name: chosen.get(name, value) for name, value in named.items()},
        )

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
            return [spilled.tensor if spilled.path is None else spilled.path for spilled in self._spilled]
        return [state for state in (self.hidden, self.original) if state is not None]

    def free_outer(self) -> None:
        """Frees the parameters outside the blocks, which blocks do not need."""
        self._outer = {}

    def run(
        self, index: int, tensors: Mapping[str, Tensor], keep: bool = True, progress: Advance = lambda: None
    ) -> None:
        """Runs block `index` on every sequence. With `keep`, its output replaces its input."""
        assert self.hidden is not None
        local = self.local(tensors)
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
    ) -> None:
        """Runs block `index` for observers. The hidden states stay; those of the original move to the block's output.

        The original runs with the parameters `original`, by default with `tensors`. Without `move`, its hidden states
        stay too.
        """
        started = time.perf_counter()
        local = self.local(tensors)
        unrounded = local if original is None or self.original is None else self.local(original)
        for start, ids in self._batches():
            for hidden in self._turns(ids.numel()):
                first = hidden is self.original
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
            call = self._call(index, range(start, stop))
            out = self.runner.run(index, local, self.hidden[start:stop].to(self.device), call)
            total += (self.original[start:stop].to(self.device).double() - out.double()).sum((0, 1))
            self._end_batch(start)
            progress()
        return total.cpu() / self.input_ids.numel()

    def observe_head(self, outer: Mapping[str, Tensor]) -> None:
        """Runs the head for observers of its input."""
        local = self.local(outer)
        for number, start, stop in self._pieces():
            for hidden in self._turns(stop - start):
                self._finish(local, hidden[number, start:stop])

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
        hidden = states[start : start + count]
        try:
            call = self._call(index, range(start, start + count))
            out = self.runner.run(index, local, hidden.to(self.device), call)
        except BlockDoneError:
            if keep:  # an observer stopped a block that had to run to its end
                raise
            return
        if keep:
            hidden.copy_(out)

    def few(self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor, sequences: Sequence[int]) -> Tensor:
        """The output of block `index` for one sequence, shape (1, length, hidden), differentiable.

        `sequences` are the numbers of the sequences. With a pairing, there may be any power of two of them up to
        `batch`.
        """
        return self.runner.differentiable(index, tensors, hidden, self._call(index, sequences))

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
