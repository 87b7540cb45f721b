"""SignRound (Cheng et al., arXiv 2309.05516; Intel's auto-round): rounding tuned on the outputs of whole blocks.

Behind any solver: a block's rounded layers are tuned together, so that the block's output on the inputs that it will
see comes near to what the unrounded model gave. What is tuned is where each weight lies between two codes, and the ends
of every group's span, by the signs of the gradients alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from gyroquant.grids import QuantizedWeight
from gyroquant.journal import get_state, put_state
from gyroquant.models.graph import LinearOp
from gyroquant.models.packed import as_matrix, from_matrix
from gyroquant.models.runner import pass_back
from gyroquant.progress import Advance
from gyroquant.rounding.rtn import rows_on_grid
from gyroquant.rounding.tunable import TunableWeight

_CHECKPOINT = 20  # steps between states that are kept
Run = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""A block on some weights: hidden states in, hidden states out, both of shape (sequences, length, hidden)."""


class SignRound(BaseModel):
    """How long and how a block is tuned.

    Each of `iters` steps looks at `batch_size` sequences. `lr` is a step's length, in steps of the grid for
    what decides codes and as a share for the ends of spans (`minmax_lr`); 1 / iters where it is not given, falling to
    nothing by `schedule`. `codes` and `minmax` say what is tuned: the ends alone are OmniQuant's learned clipping
    (arXiv 2308.13137). With `best` the state of the least loss is kept rather than the last. The result is only taken
    where it is better than what the solver left, on sequences that both are measured on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    iters: Annotated[int, Field(gt=0, le=1_000_000)] = 200
    batch_size: Annotated[int, Field(gt=0)] = 8
    lr: Annotated[float, Field(gt=0, le=1)] | None = None
    minmax_lr: Annotated[float, Field(gt=0, le=1)] | None = None
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    codes: bool = True
    minmax: bool = True
    best: bool = True

    @model_validator(mode="after")
    def _something(self) -> SignRound:
        if not (self.codes or self.minmax):
            raise ValueError("codes: false and minmax: false leave nothing to tune")
        return self

    def rate(self, lr: float | None, step: int) -> float:
        """The length of a step."""
        done = step / self.iters
        falling = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
        return (lr or 1 / self.iters) * falling[self.schedule]


@dataclass
class _State:
    """How far tuning is: what moves (with its rate), the best of it so far with its loss, and where chance stands."""

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
        """Takes up a state with the same mark; any other file is started over."""
        found = get_state(path, mark)
        if found is None:
            return
        tensors, (self.done, self.least) = found
        self.generator.set_state(tensors["generator"])
        self.best = [tensors[f"best.{i}"] for i in range(len(self.moving))] if "best.0" in tensors else None
        with torch.no_grad():
            for i, (tensor, _) in enumerate(self.moving):
                tensor.copy_(tensors[f"moving.{i}"])


class BlockTuner:
    """One block: its folded weights, what a solver made of some of them, its inputs and the outputs to reach.

    `hidden` and `target` have the shape (sequences, length, hidden); `run` computes in their dtype, on any power of two
    of sequences up to `most`.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        ops: Mapping[str, LinearOp],
        rounded: Mapping[str, QuantizedWeight],
        hidden: Tensor,
        target: Tensor,
        run: Run,
        most: int,
    ):
        self.ops, self.rounded, self.hidden, self.target = ops, dict(rounded), hidden, target
        self.run, self.most = run, most
        self.tunable: dict[str, TunableWeight] = {}
        self.rest = {name: tensor.to(hidden.dtype) for name, tensor in tensors.items() if name not in rounded}
        for name, weight in rounded.items():
            matrix = as_matrix(tensors[name].float(), ops[name])
            there = matrix if weight.basis is None else weight.basis.encode(matrix)
            if bool((rows_on_grid(there, weight) | ~there.any(1)).all()):  # it lay on the grid, and stays there
                kept = from_matrix(weight.dequantize(), ops[name].shape, ops[name].entry.transposed)
                self.rest[name] = kept.to(hidden.dtype)
            else:
                self.tunable[name] = TunableWeight(matrix, weight)

    def _weights(self) -> dict[str, Tensor]:
        return {
            name: from_matrix(one.matrix(), self.ops[name].shape, self.ops[name].entry.transposed)
            for name, one in self.tunable.items()
        }

    def _error(self, weights: Mapping[str, Tensor], sequences: list[int]) -> Tensor:
        """The squared error of the block's output on each sequence, over that of changing nothing, summed."""
        hidden, target = self.hidden[sequences], self.target[sequences].float()
        scale = (target - hidden.float()).square().mean((1, 2)).clamp_min(1e-30)
        return ((self.run(weights, hidden).float() - target).square().mean((1, 2)) / scale).sum()

    def _pieces(self, sequences: list[int]) -> Iterator[list[int]]:
        """The sequences in lists that the block can be run on."""
        start = 0
        while start < len(sequences):
            size = min(1 << (self.most.bit_length() - 1), 1 << ((len(sequences) - start).bit_length() - 1))
            yield sequences[start : start + size]
            start += size

    def loss(self, sequences: list[int], backward: bool) -> float:
        """The mean error over sequences; with `backward` its gradients are left in the tuned tensors."""
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

    def tune(
        self, settings: SignRound, seed: int, progress: Advance = lambda: None, checkpoint: Path | None = None
    ) -> dict[str, QuantizedWeight]:
        """Tunes and returns the weights, or those that were there where nothing was gained.

        With `checkpoint`, a file, the state is kept there now and then, and what was stopped goes on from it.
        """
        if not self.tunable:
            for _ in range(settings.iters):
                progress()
            return self.rounded
        state = _State(self._moving(settings), torch.Generator().manual_seed(seed))
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
        return self._better(settings, state.generator)

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
        for one in self.tunable.values():
            one.limit()
        state.done = step + 1

    def _moving(self, settings: SignRound) -> list[tuple[Tensor, float | None]]:
        found: list[tuple[Tensor, float | None]] = []
        for one in self.tunable.values():
            found += [(one.offset, settings.lr)] if settings.codes else []
            found += [(one.stretch, settings.minmax_lr or settings.lr)] if settings.minmax else []
        for tensor, _ in found:
            tensor.requires_grad_()
        return found

    def _better(self, settings: SignRound, generator: torch.Generator) -> dict[str, QuantizedWeight]:
        """The tuned weights, or those at the start, whichever does better on twice a step's sequences."""
        picks = torch.randperm(len(self.hidden), generator=generator)[: 2 * settings.batch_size].tolist()
        tuned = self.loss(picks, backward=False)
        after = {name: one.result() for name, one in self.tunable.items()}
        for one in self.tunable.values():
            with torch.no_grad():
                one.offset.zero_()
                one.stretch.fill_(1)
        after = self.rounded | after
        return after if tuned < self.loss(picks, backward=False) else self.rounded


def tune_block(
    settings: SignRound, tuner: BlockTuner, seed: int, progress: Any, checkpoint: Path | None = None
) -> dict[str, QuantizedWeight]:
    """As `BlockTuner.tune`, from within code that computes without gradients."""
    with torch.enable_grad():
        return tuner.tune(settings, seed, progress, checkpoint)
