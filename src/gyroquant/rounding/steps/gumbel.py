"""GSQ (arXiv 2604.18556; code of IST-DASLab): learns the choice between neighbouring codes with Gumbel noise.

It runs after any solver, on grids of even steps. Each weight has a logit for each code near that of the solver. A step
draws Gumbel noise, and the weight is the mean of these codes under the softmax of logits and noise, at a temperature
that falls from step to step. At the end each weight takes the code with the largest logit. The scale of each group is
learned too.

From the source: the candidates, the initial logits, the noise, the ranges of temperature and of the factor on logits,
and the optimizer Lion with its rates. Ours, where the source does not say it or fits another loop: the loss is the
error of the block's output, as for SignRound, in place of one layer's; temperature and factor change geometrically; the
initial noise is normal; scales are learned as factors, without decay; Lion has its usual constants; the result is only
taken if it is better than the solver's codes. The source rounds to symmetric grids.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from gyroquant.grids import EvenGrid, Grid, GroupParams, QuantizedWeight, straight_through
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.rounding.base import When
from gyroquant.rounding.steps.base import BlockStep, RoundedBlock
from gyroquant.rounding.steps.signround import BlockTuner, TuningState
from gyroquant.rounding.steps.tunable import in_basis
from gyroquant.system.environment import reused_memory

_SHIFTS = (-2, -1, 0, 1, 2)  # neighbours of a code of 3 bits or more; below, every code is a candidate
_INITIAL, _DISTANCE = 0.01, 6.0  # the size of the initial logits, and what half a squared step counts in them
_TEMPERATURES, _FACTORS = (2.0, 0.05), (100.0, 500.0)
_BETAS = 0.9, 0.99  # Lion's (Chen et al., arXiv 2302.06675)
_STRETCH = (0.5, 1.5)
_PIECE = 1 << 14  # weights of a piece, each of which has a number for each candidate


class GumbelSoftmax(BlockStep):
    """Learns the codes and scales of a block. The result is used only if its error is below that of the solver's codes.

    - `iters`: steps. Default 1000.
    - `batch_size`: sequences per step. Default 8.
    - `lr`: the length of a step of the logits. Default 2e-4. It falls to 0 as a cosine.
    - `scale_lr`: that of a step of the scales, as a share of the scale. Default 1e-4. 0: they stay.
    - `weight_decay`: of the logits, times `lr` a step. Default 1.
    """

    key = "gumbel"
    when = When.TUNE_BLOCK
    needs_single_codes = True
    random = True

    iters: Annotated[int, Field(gt=0, le=1_000_000)] = 1000
    batch_size: Annotated[int, Field(gt=0)] = 8
    lr: Annotated[float, Field(gt=0, le=1)] = 2e-4
    scale_lr: Annotated[float, Field(ge=0, le=1)] = 1e-4
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 1.0

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(iters=3, batch_size=2), cls(iters=3, batch_size=2, lr=0.02, scale_lr=0.0)]

    @property
    def iterations(self) -> int:
        return self.iters

    def with_iterations(self, count: int) -> GumbelSoftmax:
        return self.model_copy(update={"iters": count})

    def grid_conflicts(self, grid: Grid) -> str:
        if isinstance(grid, EvenGrid):
            return ""
        return f"gumbel chooses between neighbouring codes of even steps, and the grid {grid.grid} has none: use tune"

    def held_bytes(self, weights: int) -> int:
        return weights * 2 * 4 * len(_SHIFTS)  # logits and their momentum, fp32

    def apply_block(self, block: RoundedBlock) -> RoundedBlock:
        with reused_memory():
            return replace(block, layers=GumbelTuner(block, self).tune(self))

    def fall(self, step: int) -> float:
        """The share of a rate that is left at step number `step`: a half period of a cosine."""
        return (1 + math.cos(math.pi * step / self.iters)) / 2

    def anneal(self, step: int) -> tuple[float, float]:
        """The temperature, and the factor on logits, at step number `step`."""
        done = step / max(1, self.iters - 1)
        low, high = ((ends[0] * (ends[1] / ends[0]) ** done) for ends in (_TEMPERATURES, _FACTORS))
        return low, high


class GumbelWeight:
    """A weight as the mean of codes near those of the solver, with its gradients. All of it can be stored once hard.

    - `logits`, shape (rows, groups, group size, candidates): of the codes. Codes that the grid lacks have -inf.
    - `stretch`, shape (rows, groups, 1): factors on the scales of groups.
    - `momenta`: those of both.

    `draw` sets noise and temperature, and `matrix` is then the mean. Before the first `draw` and after `harden`, it
    is the matrix of the codes with the largest logits.
    """

    def __init__(self, rounded: QuantizedWeight, *seed: int):
        self.start, self.grid, self._seed = rounded, rounded.grid, seed
        assert isinstance(self.grid, EvenGrid), "checked with the recipe"
        rows, groups = rounded.params.scale.shape[:2]
        self._shape = (rows, groups, rounded.codes.shape[1] // groups)
        self._codes = rounded.codes.view(self._shape).float()
        self._top = self.grid.code_count - 1
        self._candidates = torch.tensor(
            range(self._top + 1) if self._top < len(_SHIFTS) - 1 else _SHIFTS, dtype=torch.float32
        ).to(self._codes)
        noise = torch.randn((*self._shape, len(self._candidates)), generator=seeded(*seed)).to(self._codes)
        for rows_, codes in self._pieces():
            near = _DISTANCE * -0.5 * (codes - self._codes[rows_][..., None]).square()
            near -= near.mean(-1, keepdim=True)
            logits = _INITIAL * (noise[rows_] + near)
            noise[rows_] = logits.masked_fill((codes < 0) | (codes > self._top), -math.inf)
        self.logits = noise
        self.stretch = torch.ones_like(rounded.params.scale)
        self.momenta = (torch.zeros_like(self.logits), torch.zeros_like(self.stretch))
        self._drawn: tuple[int, float, float] | None = None

    @property
    def moving(self) -> tuple[Tensor, ...]:
        """What tuning changes."""
        return (self.logits, self.stretch, *self.momenta)

    def draw(self, step: int, temperature: float, factor: float) -> None:
        """Makes `matrix` the mean under the softmax of ``(factor logits + noise) / temperature``, noise of `step`."""
        self._drawn = step, temperature, factor

    def harden(self) -> None:
        """Makes `matrix` that of the codes with the largest logits, which `result` returns."""
        self._drawn = None

    def _pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Some rows after the others, and the codes of their candidates."""
        rows, each = self._shape[0], max(1, _PIECE // max(1, self._shape[1] * self._shape[2]))
        absolute = len(self._candidates) != len(_SHIFTS)
        for start in range(0, rows, each):
            piece = slice(start, start + each)
            codes = self._codes[piece][..., None]
            yield piece, (torch.zeros_like(codes) if absolute else codes) + self._candidates

    def _params(self, stretch: Tensor) -> tuple[GroupParams, GroupParams]:
        """The parameters with gradients to `stretch`, and the ones that are stored. Both have the same values."""
        scale, zero = self.grid.rescale(self.start.params, stretch, stretch)
        kept = self.grid.round_params(scale.detach(), zero.detach())
        return GroupParams(straight_through(scale, kept.scale), straight_through(zero, kept.zero)), kept

    def _shares(self, piece: slice) -> Tensor:
        """The shares of the candidates in some rows, shape (rows, groups, group size, candidates)."""
        assert self._drawn is not None
        step, temperature, factor = self._drawn
        logits = self.logits[piece]
        generator = seeded(*self._seed, step, piece.start)
        uniform = torch.rand(logits.shape, generator=generator).to(logits)
        noise = -(-uniform.clamp_min(1e-30).log()).clamp_min(1e-30).log()
        return ((factor * logits + noise) / temperature).softmax(-1)

    def _means(self, piece: slice, codes: Tensor) -> Tensor:
        """The codes of some rows: means under the shares, or those with the largest logits."""
        if self._drawn is None:
            return codes.gather(-1, self.logits[piece].argmax(-1, keepdim=True)).squeeze(-1)
        return (self._shares(piece) * codes).sum(-1)

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """The matrix, shape (out, in), fp32."""
        numbers, (_, kept) = torch.empty_like(self._codes), self._params(self.stretch)
        for piece, codes in self._pieces():
            numbers[piece] = (self._means(piece, codes) - kept.zero[piece]) * kept.scale[piece]
        flat = numbers.view(len(numbers), -1)
        return flat if self.start.basis is None else self.start.basis.decode(flat)

    @torch.no_grad()
    def result(self) -> QuantizedWeight:
        """The codes with the largest logits, and the scales."""
        self.harden()
        chosen, (_, kept) = torch.empty_like(self._codes), self._params(self.stretch)
        for piece, codes in self._pieces():
            chosen[piece] = self._means(piece, codes)
        return replace(self.start, codes=chosen.to(self.start.codes.dtype).view(self.start.codes.shape), params=kept)

    @torch.no_grad()
    def descend(self, gradient: Tensor, lr: float, scale_lr: float, weight_decay: float) -> None:
        """One step of Lion. `gradient` is that of the loss to `matrix()` as it was drawn, shape (out, in)."""
        assert self._drawn is not None
        _, temperature, factor = self._drawn
        gradient = in_basis(gradient, self.start.basis, self._codes).view(self._shape)
        stretch = self.stretch.clone().requires_grad_()
        with torch.enable_grad():
            params, kept = self._params(stretch)
        of_scale, of_zero = torch.empty_like(kept.scale), torch.empty_like(kept.scale)
        for piece, codes in self._pieces():
            shares, pull = self._shares(piece), gradient[piece]
            mean = (shares * codes).sum(-1)
            of_scale[piece] = (pull * (mean - kept.zero[piece])).sum(-1, keepdim=True)
            of_zero[piece] = -(pull * kept.scale[piece]).sum(-1, keepdim=True)
            slope = shares * (codes - mean[..., None]) * (pull * kept.scale[piece])[..., None] * (factor / temperature)
            move(self.logits[piece], self.momenta[0][piece], slope, lr, weight_decay)
        if scale_lr:
            ends = [(params.scale, of_scale), (params.zero, of_zero)]
            ends = [pair for pair in ends if pair[0].requires_grad]
            (slope,) = torch.autograd.grad([end for end, _ in ends], stretch, [pull for _, pull in ends])
            move(self.stretch, self.momenta[1], slope, scale_lr, 0.0)
            self.stretch.clamp_(*_STRETCH)


def seeded(*numbers: int) -> torch.Generator:
    """A generator that is random in each of some numbers: the seed, and the number of a layer, a step or a row."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def move(tensor: Tensor, momentum: Tensor, slope: Tensor, lr: float, weight_decay: float) -> None:
    """One step of Lion (Chen et al., arXiv 2302.06675) in place. Numbers that are infinite stay so."""
    first, second = _BETAS
    tensor.mul_(1 - lr * weight_decay).sub_(torch.lerp(slope, momentum, first).sign_(), alpha=lr)
    momentum.mul_(second).add_(slope, alpha=1 - second)


class GumbelTuner(BlockTuner[GumbelWeight, GumbelSoftmax]):
    """One block whose codes are learned."""

    def __init__(self, block: RoundedBlock, settings: GumbelSoftmax):
        self._settings, self._count = settings, 0
        super().__init__(block)

    @property
    def _mark(self) -> str:
        return f"gumbel {super()._mark}"

    def _tunable(self, matrix: Tensor, rounded: QuantizedWeight) -> GumbelWeight:
        self._count += 1
        return GumbelWeight(rounded, self.block.seed, self._count)

    def _step(self, settings: GumbelSoftmax, state: TuningState, step: int) -> None:
        picks = state.picks(step, min(settings.batch_size, len(self.hidden)))
        if step == 0:
            state.first = self.loss(picks, backward=False)  # of the solver's codes
        for weight in self.tunable.values():
            weight.draw(step, *settings.anneal(step))
        self._refresh()
        self.loss(picks, backward=True)
        rates = settings.lr * settings.fall(step), settings.scale_lr * settings.fall(step)
        for name, weight in self.tunable.items():
            gradient, self.leaves[name].grad = self.leaves[name].grad, None
            if gradient is not None:
                weight.descend(self.block.layers[name].op.to_matrix(gradient), *rates, settings.weight_decay)
        state.done = step + 1

    def _better_layers(self, settings: GumbelSoftmax, state: TuningState) -> dict[str, RoundedLayer]:
        for weight in self.tunable.values():
            weight.harden()
        return super()._better_layers(settings, state)
