"""SignRound (Cheng et al., arXiv 2309.05516; Intel's auto-round): tunes rounding on the outputs of whole blocks.

It runs after any solver. The rounded layers of a block are tuned together, so that the block's output on its inputs in
the rounded model approaches the output of the unrounded model. Two kinds of numbers are tuned: the position of each
weight between two codes, and the two ends of each group's range. The steps use only the signs of the gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from gyroquant.models.execution.runner import pass_back
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.rounding.base import When
from gyroquant.rounding.solvers.rtn import rows_on_grid
from gyroquant.rounding.steps.base import BlockStep, RoundedBlock
from gyroquant.rounding.steps.tunable import TunableWeight
from gyroquant.system.journal import get_state, put_state

_CHECKPOINT = 20  # steps between two saved states


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
    - `best`: whether the state with the least loss is kept instead of the last one. Default true.
    """

    key = "tune"
    when = When.TUNE_BLOCK
    random = True

    iters: Annotated[int, Field(gt=0, le=1_000_000)] = 200
    batch_size: Annotated[int, Field(gt=0)] = 8
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    minmax_lr: Annotated[float, Field(gt=0, le=1)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    codes: bool = True
    minmax: bool = True
    best: bool = True

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(iters=4, batch_size=2), cls(iters=2, batch_size=2, codes=False, schedule="cosine")]

    @model_validator(mode="after")
    def _tunes_something(self) -> SignRound:
        if not (self.codes or self.minmax):
            raise ValueError("codes: false and minmax: false leave nothing to tune: set one of them to true")
        return self

    @property
    def iterations(self) -> int:
        return self.iters

    def with_iterations(self, count: int) -> SignRound:
        return self.model_copy(update={"iters": count})

    def apply_block(self, block: RoundedBlock) -> RoundedBlock:
        tuner = BlockTuner(block)
        with torch.enable_grad():
            return replace(block, layers=tuner.tune(self))

    def rate(self, lr: float | None, step: int) -> float:
        """The length of step number `step`."""
        done = step / self.iters
        factor = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return (lr or 1 / self.iters) * factor[self.schedule]


@dataclass
class _State:
    """The state of tuning: tuned tensors with their step lengths, the best values with their loss, the generator."""

    moving: list[tuple[Tensor, float | None]]
    generator: torch.Generator
    done: int = 0
    best: list[Tensor] | None = None
    least: float = math.inf

    def save(self, path: Path, mark: str) -> None:
        tensors = {f"moving.{i}": tensor for i, (tensor, _) in enumerate(self.moving)}
        tensors |= {f"best.{i}": tensor for i, tensor in enumerate(self.best or ())}
        put_state(path, tensors | {"generator": self.generator.get_state()}, mark, [self.done, self.least])

    def resume(self, path: Path, mark: str) -> None:
        """Loads a state with the same mark. Any other file is ignored."""
        saved = get_state(path, mark)
        if saved is None:
            return
        tensors, (self.done, self.least) = saved
        self.generator.set_state(tensors["generator"])
        self.best = [tensors[f"best.{i}"] for i in range(len(self.moving))] if "best.0" in tensors else None
        with torch.no_grad():
            for i, (tensor, _) in enumerate(self.moving):
                tensor.copy_(tensors[f"moving.{i}"])


class BlockTuner:
    """One block and its tuned tensors. It computes in the dtype of the block's input."""

    def __init__(self, block: RoundedBlock):
        hidden, target = block.text.hidden, block.text.original
        assert hidden is not None
        assert target is not None
        self.block, self.hidden, self.target = block, hidden, target
        self.tunable: dict[str, TunableWeight] = {}
        self.rest = {name: t.to(hidden.dtype) for name, t in block.tensors.items() if name not in block.layers}
        for name, layer in block.layers.items():
            matrix, weight = layer.op.to_matrix(block.tensors[name].float()), layer.weight
            moved = matrix if weight.basis is None else weight.basis.encode(matrix)
            if bool((rows_on_grid(moved, weight) | ~moved.any(1)).all()):  # already on the grid: not tuned
                self.rest[name] = layer.param.to(hidden.dtype)
            else:
                self.tunable[name] = TunableWeight(matrix, weight)

    def _weights(self) -> dict[str, Tensor]:
        return {name: self.block.layers[name].op.to_param(weight.matrix()) for name, weight in self.tunable.items()}

    def _error(self, weights: Mapping[str, Tensor], sequences: list[int]) -> Tensor:
        """The sum over sequences of the squared error of the block's output, relative to that of returning the
        input.
        """
        hidden, target = self.hidden[sequences], self.target[sequences].float()
        scale = (target - hidden.float()).square().flatten(1).mean(1).clamp_min(1e-30)
        output = self.block.run(weights, hidden, sequences)
        return ((output.float() - target).square().flatten(1).mean(1) / scale).sum()

    def _pieces(self, sequences: list[int]) -> Iterator[list[int]]:
        """The sequences in batches of sizes that the block can run on."""
        start, most = 0, self.block.text.batch
        while start < len(sequences):
            size = min(1 << (most.bit_length() - 1), 1 << ((len(sequences) - start).bit_length() - 1))
            yield sequences[start : start + size]
            start += size

    def loss(self, sequences: list[int], backward: bool) -> float:
        """The mean error over sequences. With `backward`, its gradients are added to the tuned tensors."""
        with torch.set_grad_enabled(backward):
            rounded = self._weights()
            leaves = {name: value.detach().to(self.hidden.dtype) for name, value in rounded.items()}
            total = 0.0
            for leaf in leaves.values():
                leaf.requires_grad_(backward)
            for piece in self._pieces(sequences):
                error = self._error(leaves | self.rest, piece) / len(sequences)
                total += float(error.detach())
                if backward:
                    error.backward()
            if backward:
                pass_back(rounded, leaves)
        return total

    def tune(self, settings: SignRound) -> dict[str, RoundedLayer]:
        """Tunes and returns the layers, or those of the solver if tuning did not help.

        With a checkpoint, the state is saved every few steps, and a run that was interrupted continues from it.
        """
        seed, progress, checkpoint = self.block.seed, self.block.progress, self.block.checkpoint
        if not self.tunable:
            for _ in range(settings.iters):
                progress()
            return dict(self.block.layers)
        state = _State(self._tuned_tensors(settings), torch.Generator().manual_seed(seed))
        if checkpoint is not None:
            state.resume(checkpoint, str(seed))
        for step in range(settings.iters):
            if step >= state.done:
                self._step(settings, state, step)
                if checkpoint is not None and state.done % _CHECKPOINT == 0:
                    state.save(checkpoint, str(seed))
            progress()
        if state.best is not None:
            with torch.no_grad():
                for (tensor, _), value in zip(state.moving, state.best, strict=True):
                    tensor.copy_(value)
        return self._better_layers(settings, state.generator)

    def _step(self, settings: SignRound, state: _State, step: int) -> None:
        picks = torch.randperm(len(self.hidden), generator=state.generator)[: settings.batch_size].tolist()
        loss = self.loss(picks, backward=True)
        if settings.best and loss < state.least:
            state.best, state.least = [tensor.detach().clone() for tensor, _ in state.moving], loss
        with torch.no_grad():
            for tensor, lr in state.moving:
                if tensor.grad is not None:
                    tensor.sub_(tensor.grad.sign(), alpha=settings.rate(lr, step))
                    tensor.grad = None
        for weight in self.tunable.values():
            weight.clamp()
        state.done = step + 1

    def _tuned_tensors(self, settings: SignRound) -> list[tuple[Tensor, float | None]]:
        moving: list[tuple[Tensor, float | None]] = []
        for weight in self.tunable.values():
            moving += [(weight.offset, settings.lr)] if settings.codes else []
            moving += [(weight.stretch, settings.minmax_lr or settings.lr)] if settings.minmax else []
        for tensor, _ in moving:
            tensor.requires_grad_()
        return moving

    def _better_layers(self, settings: SignRound, generator: torch.Generator) -> dict[str, RoundedLayer]:
        """The tuned layers or the initial ones, whichever have the lower loss on twice as many sequences as a step
        uses.
        """
        before = dict(self.block.layers)
        picks = torch.randperm(len(self.hidden), generator=generator)[: 2 * settings.batch_size].tolist()
        loss = self.loss(picks, backward=False)
        tuned = {name: RoundedLayer(before[name].op, weight.result()) for name, weight in self.tunable.items()}
        for weight in self.tunable.values():
            with torch.no_grad():
                weight.offset.zero_()
                weight.stretch.fill_(1)
        return before | tuned if loss < self.loss(picks, backward=False) else before
