"""SignRound (Cheng et al., arXiv 2309.05516; Intel's auto-round): tunes rounding on the outputs of whole blocks.

It runs after any solver. The rounded layers of a block are tuned together, so that the block's output on its inputs in
the rounded model approaches the output of the unrounded model. Two kinds of numbers are tuned: the position of each
weight between two codes, and the two ends of each group's range. The steps use only the signs of the gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Generic, Literal, Protocol, TypeVar

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids import QuantizedWeight
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.rounding.base import Solver, When
from gyroquant.rounding.solvers.rtn import rows_on_grid
from gyroquant.rounding.steps.base import BlockStep, RoundedBlock
from gyroquant.rounding.steps.scale_search import with_searched_scales
from gyroquant.rounding.steps.tunable import TunableWeight
from gyroquant.system.environment import reused_memory
from gyroquant.system.journal import get_state, put_state

_CHECKPOINT = 20  # steps between two saved states
_PIECE_TOKENS = 1024  # this many tokens run through the block at once


class SignRound(BlockStep):
    """Tunes the rounding of a block. The result is used only if its error is below that of the solver's codes, both
    measured on the same sequences.

    - `iters`: steps. Default 200.
    - `batch_size`: sequences per step. Default 8.
    - `lr`: the length of a step, in steps of the grid. Default 1 / iters.
    - `minmax_lr`: the length of a step for the ends of ranges, as a share of the range. Default `lr`.
    - `schedule`: how lengths change: `linear` (default) or `cosine` to 0, or `constant`.
    - `codes`: whether codes are tuned. Default true.
    - `minmax`: whether the ends of ranges are tuned. Default true. Without codes, this is OmniQuant's learned clipping
      (arXiv 2308.13137).
    - `search_scales`: whether the scale of each group is first searched, for the least error of weights rounded to
      nearest that count by the mean squares of their inputs, as SignRoundV2 does. Default false. It needs a solver that
      rounds to nearest.
    - `outliers`: the share of the block's outputs, those with the largest errors, that the loss leaves out. Default 0.
      SignRoundV2 (arXiv 2512.04746) leaves out 0.001 below 4 bits.
    - `best`: whether the state with the least loss is kept instead of the last one. Default true.
    """

    key = "tune"
    when = When.TUNE_BLOCK
    needs_single_codes = True
    random = True

    iters: Annotated[int, Field(gt=0, le=1_000_000)] = 200
    batch_size: Annotated[int, Field(gt=0)] = 8
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    minmax_lr: Annotated[float, Field(gt=0, le=1)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    codes: bool = True
    minmax: bool = True
    search_scales: bool = False
    outliers: Annotated[float, Field(ge=0, lt=1)] = 0.0
    best: bool = True

    @classmethod
    def examples(cls) -> list[Self]:
        return [
            cls(iters=4, batch_size=2),
            cls(iters=2, batch_size=2, outliers=0.01, search_scales=True),
            cls(iters=2, batch_size=2, codes=False, schedule="cosine"),
        ]

    @model_validator(mode="after")
    def _tunes_something(self) -> SignRound:
        if not (self.codes or self.minmax):
            raise ValueError("codes: false and minmax: false leave nothing to tune: set one of them to true")
        return self

    @property
    def iterations(self) -> int:
        return self.iters

    @property
    def passes(self) -> int:
        return int(self.search_scales)

    def conflicts(self, solver: Solver) -> str:
        if not (self.search_scales and solver.needs_statistics):
            return ""
        return (
            f"tune.search_scales rounds to nearest anew, which undoes what the solver {solver.name} has compensated: "
            "take the solver rtn, or leave search_scales out"
        )

    def with_iterations(self, count: int) -> SignRound:
        return self.model_copy(update={"iters": count})

    def apply_block(self, block: RoundedBlock) -> RoundedBlock:
        with reused_memory():
            if self.search_scales:
                block = with_searched_scales(block, {name: _tuned_matrix(block, name) for name in block.layers})
            return replace(block, layers=SignRoundTuner(block, self.outliers).tune(self))

    def rate(self, lr: float | None, step: int) -> float:
        """The length of step number `step`."""
        done = step / self.iters
        factor = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return (lr or 1 / self.iters) * factor[self.schedule]


@dataclass
class TuningState:
    """The state of tuning.

    - `moving`: the tuned tensors.
    - `order`: the order of the sequences in this epoch, from `generator`.
    - `done`: the number of finished steps.
    - `best`, `least`: the values with the least loss, and that loss.
    - `first`: the loss of the first step, before anything moved.
    """

    moving: list[Tensor]
    generator: torch.Generator
    order: Tensor
    done: int = 0
    best: list[Tensor] | None = None
    least: float = math.inf
    first: float = math.inf

    def save(self, path: Path, mark: str) -> None:
        tensors = {f"moving.{i}": tensor for i, tensor in enumerate(self.moving)}
        tensors |= {f"best.{i}": tensor for i, tensor in enumerate(self.best or ())}
        tensors |= {"generator": self.generator.get_state(), "order": self.order}
        put_state(path, tensors, mark, [self.done, self.least, self.first])

    def resume(self, path: Path, mark: str) -> None:
        """Loads a state with the same mark. Any other file is ignored."""
        saved = get_state(path, mark)
        if saved is None:
            return
        tensors, (self.done, self.least, self.first) = saved
        self.generator.set_state(tensors["generator"])
        self.order = tensors["order"]
        self.best = [tensors[f"best.{i}"] for i in range(len(self.moving))] if "best.0" in tensors else None
        for i, tensor in enumerate(self.moving):
            tensor.copy_(tensors[f"moving.{i}"])

    def keep(self) -> None:
        """Makes the current values the best ones."""
        if self.best is None:
            self.best = [tensor.clone() for tensor in self.moving]
            return
        for kept, tensor in zip(self.best, self.moving, strict=True):
            kept.copy_(tensor)

    def picks(self, step: int, count: int) -> list[int]:
        """The `count` sequences of a step. All sequences are used before one is used again."""
        position = step % max(1, len(self.order) // count) * count
        if position == 0:
            self.order = torch.randperm(len(self.order), generator=self.generator)
        return self.order[position : position + count].tolist()


def _tuned_matrix(block: RoundedBlock, name: str) -> Tensor | None:
    """The matrix that the codes of a layer stand for, shape (out, in), fp32. None if it already lies on the grid."""
    layer = block.layers[name]
    matrix, weight = layer.op.to_matrix(block.tensors[name].float()), layer.weight
    if weight.low_rank is not None:  # its branch runs with the block
        matrix = matrix - weight.low_rank.product()
    moved = matrix if weight.basis is None else weight.basis.encode(matrix)
    return None if bool((rows_on_grid(moved, weight) | ~moved.any(1)).all()) else matrix


class Tunable(Protocol):
    """A rounded weight that is tuned."""

    @property
    def moving(self) -> tuple[Tensor, ...]:
        """What tuning changes."""

    def matrix(self) -> Tensor:
        """The matrix that the block runs with, shape (out, in)."""

    def result(self) -> QuantizedWeight:
        """The current codes and scales."""


class Settings(Protocol):
    """The options that every way of tuning has."""

    @property
    def iters(self) -> int:
        """Steps."""

    @property
    def batch_size(self) -> int:
        """Sequences in a step."""


W = TypeVar("W", bound=Tunable)
S = TypeVar("S", bound=Settings)


class BlockTuner(ABC, Generic[W, S]):
    """One block and its tuned tensors. It computes in the dtype of the block's input.

    `outliers` is the share of outputs that the loss leaves out, as in `SignRound`.
    """

    def __init__(self, block: RoundedBlock, outliers: float = 0.0):
        hidden, target = block.text.hidden, block.text.original
        assert hidden is not None
        assert target is not None
        self.block, self.hidden, self.target, self.outliers = block, hidden, target, outliers
        self.tunable: dict[str, W] = {}
        self.rest = {name: t.to(hidden.dtype) for name, t in block.tensors.items() if name not in block.layers}
        for name, layer in block.layers.items():
            matrix = _tuned_matrix(block, name)
            if matrix is None:
                self.rest[name] = layer.param.to(hidden.dtype)
            else:
                self.tunable[name] = self._tunable(matrix, layer.weight)
        self.leaves = {name: block.layers[name].param.to(hidden.dtype, copy=True) for name in self.tunable}

    @abstractmethod
    def _tunable(self, matrix: Tensor, rounded: QuantizedWeight) -> W:
        """A rounded weight as it is tuned, and the matrix that it stands for, shape (out, in)."""

    @abstractmethod
    def _step(self, settings: S, state: TuningState, step: int) -> None:
        """Step number `step`. The first one sets `state.first` to the loss of the solver's codes."""

    @property
    def _mark(self) -> str:
        """What a saved state must be marked with to be continued."""
        return str(self.block.seed)

    def _refresh(self) -> None:
        """Writes the current rounded weights to the leaves."""
        for name, weight in self.tunable.items():
            self.leaves[name].detach().copy_(self.block.layers[name].op.to_param(weight.matrix()))

    def _error(self, sequences: list[int]) -> Tensor:
        """The sum over sequences of the squared error of the block's output, relative to that of returning the
        input.
        """
        hidden, target = self.hidden[sequences], self.target[sequences].float()
        scale = (target - hidden.float()).square().flatten(1).mean(1).clamp_min(1e-30)
        output = self.block.run(self.leaves | self.rest, hidden, sequences)
        squares = (output.float() - target).square()
        kept = squares.numel() - int(self.outliers * squares.numel())
        if kept < squares.numel():
            squares = squares * (squares <= squares.detach().flatten().kthvalue(kept).values)
        return (squares.flatten(1).mean(1) / scale).sum()

    def _pieces(self, sequences: list[int]) -> Iterator[list[int]]:
        """The sequences in batches of sizes that the block can run on."""
        start, most = 0, self.block.text.batch
        if self.hidden.device.type == "cpu":  # the activations of a small batch stay in the processor's cache
            most = min(most, max(1, _PIECE_TOKENS // self.hidden.shape[1]))
        while start < len(sequences):
            size = min(1 << (most.bit_length() - 1), 1 << ((len(sequences) - start).bit_length() - 1))
            yield sequences[start : start + size]
            start += size

    def loss(self, sequences: list[int], backward: bool) -> float:
        """The mean error over sequences. With `backward`, its gradients are added to the leaves."""
        total = 0.0
        for leaf in self.leaves.values():
            leaf.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            for piece in self._pieces(sequences):
                error = self._error(piece) / len(sequences)
                total += float(error.detach())
                if backward:
                    error.backward()
        return total

    def tune(self, settings: S) -> dict[str, RoundedLayer]:
        """Tunes and returns the layers, or those of the solver if tuning did not help.

        With a checkpoint, the state is saved every few steps, and a run that was interrupted continues from it.
        """
        seed, progress, checkpoint = self.block.seed, self.block.progress, self.block.checkpoint
        if not self.tunable:
            for _ in range(settings.iters):
                progress()
            return dict(self.block.layers)
        moving = [tensor for weight in self.tunable.values() for tensor in weight.moving]
        state = TuningState(moving, torch.Generator().manual_seed(seed), torch.arange(len(self.hidden)))
        if checkpoint is not None:
            state.resume(checkpoint, self._mark)
        for step in range(settings.iters):
            if step >= state.done:
                self._step(settings, state, step)
                if checkpoint is not None and state.done % _CHECKPOINT == 0:
                    state.save(checkpoint, self._mark)
            progress()
        return self._better_layers(settings, state)

    def _better_layers(self, settings: S, state: TuningState) -> dict[str, RoundedLayer]:
        """The tuned layers, or the initial ones if their loss is lower. Both are measured on the sequences of the first
        step, which measured the initial layers.
        """
        if state.best is not None:
            for tensor, value in zip(state.moving, state.best, strict=True):
                tensor.copy_(value)
        before = dict(self.block.layers)
        first = TuningState(
            state.moving, torch.Generator().manual_seed(self.block.seed), torch.arange(len(self.hidden))
        )
        self._refresh()
        loss = self.loss(first.picks(0, min(settings.batch_size, len(self.hidden))), backward=False)
        if loss >= state.first:
            return before
        return before | {name: RoundedLayer(before[name].op, weight.result()) for name, weight in self.tunable.items()}


class SignRoundTuner(BlockTuner[TunableWeight, SignRound]):
    """A block whose weights move between codes by the signs of their gradients."""

    def _tunable(self, matrix: Tensor, rounded: QuantizedWeight) -> TunableWeight:
        return TunableWeight(matrix, rounded)

    def _step(self, settings: SignRound, state: TuningState, step: int) -> None:
        picks = state.picks(step, min(settings.batch_size, len(self.hidden)))
        if step:
            self._refresh()
        loss = self.loss(picks, backward=True)
        if step == 0:
            state.first = loss
        if settings.best and loss < state.least:
            state.keep()
            state.least = loss
        steps = (
            settings.rate(settings.lr, step) if settings.codes else 0.0,
            settings.rate(settings.minmax_lr or settings.lr, step) if settings.minmax else 0.0,
        )
        for name, weight in self.tunable.items():
            gradient, self.leaves[name].grad = self.leaves[name].grad, None
            if gradient is not None:
                weight.descend(self.block.layers[name].op.to_matrix(gradient), *steps)
        state.done = step + 1
