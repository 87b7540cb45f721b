"""Hidden states of many sequences, carried through a model one block at a time.

Memory holds one block and the hidden states, which can lie in a file instead, whatever the depth of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gyroquant.models.runner import BlockRunner, Call
from gyroquant.progress import Advance

_TOKENS = 4096  # tokens that run through a block at once
_HEAD_TOKENS = 512  # tokens that run through the head at once: logits are wide


class Stream:
    """The hidden states of `input_ids`, shape (sequences, length), on their way through a model.

    `dtype` is what blocks compute in. With `offload`, a folder, the hidden states lie in a file there, memory-mapped.
    """

    def __init__(
        self,
        runner: BlockRunner,
        input_ids: Tensor,
        outer: Mapping[str, Tensor],
        dtype: torch.dtype = torch.float32,
        offload: Path | None = None,
        device: torch.device | str = "cpu",
    ):
        self.runner, self.input_ids, self.dtype, self.device = runner, input_ids, dtype, torch.device(device)
        self.batch = max(1, _TOKENS // input_ids.shape[1])
        self._outer = {name: t.to(device=self.device, dtype=dtype) for name, t in outer.items()}
        self._calls: dict[int, list[Call]] = {}
        self.hidden: Tensor | None = None
        for start, ids in self._batches():
            first, calls = runner.begin(ids, self._outer)
            self._calls.setdefault(len(ids), calls)
            if self.hidden is None:
                self.hidden = self._room((len(input_ids), *first.shape[1:]), offload)
            self.hidden[start : start + len(ids)] = first

    def _room(self, shape: tuple[int, ...], offload: Path | None) -> Tensor:
        if offload is None:
            return torch.empty(shape, dtype=self.dtype)
        offload.mkdir(parents=True, exist_ok=True)
        size = int(torch.Size(shape).numel())
        path = offload / "hidden_states.bin"
        return torch.from_file(str(path), shared=True, size=size, dtype=self.dtype).view(shape)

    def _batches(self) -> list[tuple[int, Tensor]]:
        return [
            (start, self.input_ids[start : start + self.batch].to(self.device))
            for start in range(0, len(self.input_ids), self.batch)
        ]

    @property
    def steps(self) -> int:
        """How many batches one run of a block takes, and so how often it reports progress."""
        return -(-len(self.input_ids) // self.batch)

    def free_outer(self) -> None:
        """Lets go of the parameters around the blocks, which the blocks do not need."""
        self._outer = {}

    def run(
        self, index: int, tensors: Mapping[str, Tensor], keep: bool = True, progress: Advance = lambda: None
    ) -> None:
        """Runs block `index` on every sequence. With `keep`, its output replaces its input."""
        assert self.hidden is not None
        local = {name: tensor.to(device=self.device, dtype=self.dtype) for name, tensor in tensors.items()}
        for start, ids in self._batches():
            stop = start + len(ids)
            hidden = self.hidden[start:stop].to(self.device)
            out = self.runner.run(index, local, hidden, self._calls[len(ids)][index])
            if keep:
                self.hidden[start:stop] = out
            progress()

    def logits(self, outer: Mapping[str, Tensor]) -> Iterator[tuple[int, int, Tensor]]:
        """The logits of every sequence, piece by piece: (sequence, first position, logits of shape (positions,
        words)).
        """
        assert self.hidden is not None
        local = {name: tensor.to(device=self.device, dtype=self.dtype) for name, tensor in outer.items()}
        for number, sequence in enumerate(self.hidden):
            for start in range(0, len(sequence), _HEAD_TOKENS):
                piece = sequence[None, start : start + _HEAD_TOKENS].to(self.device)
                yield number, start, self.runner.finish(piece, local)[0]
