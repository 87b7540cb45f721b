"""How much every calibration token counts for every layer, from the gradient of the loss (`weights.guided`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.pipeline.backward import BackwardPass, See
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.kronecker import KeptFactors, KroneckerSums
from gyroquant.rounding.guided import Guided
from gyroquant.system.journal import Journal
from gyroquant.system.progress import Progress

TOKEN_WEIGHTS = "token-weights"
"""Their name in a run's journal."""

AT_ONCE = 16  # windows of one backward pass, whose block inputs are in memory
_LARGEST = float(torch.finfo(torch.float16).max)


class TokenWeights:
    """Collects the squared gradients at the outputs of layers, window after window.

    - `windows`: the number of windows so far.
    - `kronecker`: also collects the factors of `guided.kronecker`, with files in `folder`; None without that setting.
    """

    def __init__(self, settings: Guided, folder: Path | None = None):
        self.settings, self.windows = settings, 0
        self.kronecker = None if settings.kronecker is None else KroneckerSums(settings, folder)
        self._squares: dict[str, list[Tensor]] = {}

    def visit(self, index: int, tensors: Mapping[str, Tensor]) -> See:
        """As `BackwardPass.run` calls it."""
        if self.kronecker is not None:
            self.kronecker.release()
        return self._see

    def _see(self, op: LinearOp, inputs: Tensor, gradient: Tensor | None) -> None:
        if self.kronecker is not None and gradient is not None:
            self.kronecker.add(op, inputs, gradient)
        if self.settings.kronecker == "sequences":  # its second moments are not those of weighted tokens
            return
        groups = min(self.settings.groups, op.numel // op.in_features)
        if gradient is None:
            squares = torch.zeros(groups, len(inputs))
        else:
            parts = gradient.float().tensor_split(groups, 1)
            squares = torch.stack([part.square().mean(1) for part in parts]).cpu()
        self._squares.setdefault(op.weight, []).append(squares)

    def result(self) -> dict[str, Tensor]:
        """The weights of tokens, shape (groups, tokens), fp16, by the name of the layer's weight. The mean of each
        group is 1. A group without any gradient counts all tokens equally. Empty for `kronecker: sequences`.
        """
        found = {}
        for name, squares in self._squares.items():
            weights = torch.cat(squares, 1).double() ** self.settings.power
            mean = weights.mean(1, keepdim=True)
            equal = torch.where(mean > 0, weights / torch.where(mean > 0, mean, 1.0), 1.0)
            found[name] = equal.clamp_max(_LARGEST).half()
        return found


def collect(job: Job, collected: TokenWeights, progress: Progress) -> dict[str, Tensor]:
    """The weights of all calibration tokens. Runs the windows that were not collected yet, some at a time."""
    assert job.tokens is not None
    outer, runner = job.plan.read_outer(job.store), BlockRunner.of(job.store, job.plan.online)
    starts = range(collected.windows, len(job.tokens), AT_ONCE)
    with progress.stage("guide", 2 * len(job.graph.blocks) * len(starts)) as advance:
        for start in starts:
            tokens = job.tokens[start : start + AT_ONCE]
            arguments = (job.compute_dtype, job.output.offload, job.output.device)
            stream = Stream(runner, tokens, outer, *arguments)
            BackwardPass(job, stream, outer, start).run(collected.visit, advance)
            collected.windows += len(tokens)
    return collected.result()


def keep(job: Job, collected: TokenWeights, journal: Journal, progress: Progress) -> None:
    """Collects what is missing, and writes all of it to the journal. The weights of tokens are written last."""
    weights = collect(job, collected, progress)
    if collected.kronecker is not None:
        collected.kronecker.keep(job.graph, journal)
    journal.put(TOKEN_WEIGHTS, weights, {})


def restore(job: Job, journal: Journal) -> None:
    """Reads from the journal what `keep` wrote, into the state of the job."""
    guided = job.recipe.weights.guided
    job.state.token_weights = journal.tensors(TOKEN_WEIGHTS)
    job.state.kronecker = None if guided is None or guided.kronecker is None else KeptFactors(journal)
