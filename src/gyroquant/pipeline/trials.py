"""Models in which one layer or table is rounded: what they predict, and what each costs.

Two ways to a cost: run every one of them, or take the gradient of the loss at each layer's output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from torch import Tensor

from gyroquant.calibration.observers import observing
from gyroquant.calibration.stream import Stream
from gyroquant.evaluation.divergence import mean_divergence
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.pipeline.backward import BackwardPass, See
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.tables import round_table, table_statistics
from gyroquant.pipeline.token_weights import TokenWeights
from gyroquant.pipeline.validation import backward_problem
from gyroquant.rounding.base import Warn
from gyroquant.rounding.bit_allocation import Choice, grids_by_bits
from gyroquant.rounding.layers import LayerGroup, is_head, round_layers
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.system.progress import Progress

_HEAD_WINDOWS = 2  # windows on which rounded heads are compared


def _around(job: Job) -> AbstractContextManager[None]:
    """The online maps around the blocks attached."""
    return attached(job.store.skeleton(), job.graph.around_blocks(job.plan.online))


class Trials:
    """Models in which one layer or table is rounded, and their predictions on some windows of the calibration text.

    - ``sizes``: the stored bits of each choice.
    """

    def __init__(self, job: Job, warn: Warn):
        settings = job.recipe.weights.allocate
        assert settings is not None
        assert job.tokens is not None
        self.job, self.warn, self.settings = job, warn, settings
        self.outer = job.plan.read_outer(job.store)
        self.runner = BlockRunner.of(job.store, job.plan.online)
        arguments = (job.compute_dtype, job.output.offload, job.output.device)
        self.stream = Stream(self.runner, self._tokens(job.tokens), self.outer, *arguments)
        self.windows = range(min(self._compared, len(job.tokens)))
        self.sizes: dict[Choice, int] = {}
        self._states: dict[Choice, list[Tensor]] = {}  # hidden states with a layer or table rounded
        self._heads: dict[Choice, RoundedLayer] = {}  # rounded heads, and tables that are heads too

    def _tokens(self, tokens: Tensor) -> Tensor:
        """The calibration windows that are used."""
        return tokens

    @property
    def _compared(self) -> int:
        """The number of windows on which predictions are compared."""
        return self.settings.nsamples

    def run(self, progress: Progress) -> None:
        """Runs all of them up to the last block."""
        job, model = self.job, self.job.store.skeleton()
        self._tables()
        with progress.stage("allocate", len(job.graph.blocks)) as advance:
            for index in range(len(job.graph.blocks)):
                with attached(model, job.plan.online_in(index)):
                    self._block(index)
                advance()
        self._round_heads()

    def _tables(self) -> None:
        """Starts the models with a rounded table. It is rounded to nearest: nothing has been observed yet."""
        layers = LayerGroup(self.job.graph.outer, self.job.targets, self.outer, {}, [])
        for name, op in self.job.tables.items() if self.settings.embeddings else ():
            for bits in self.settings.embeddings:
                grid = self.job.spec.grid(name).at_bits(bits)
                rounded = round_table(layers, op, None, grid, self.job.rounding(self.warn))
                self.sizes[name, bits] = rounded.weight.bits
                local = self.stream.local(self.outer | {name: rounded.param})
                ids = [self.stream.input_ids[k : k + 1].to(self.stream.device) for k in self.windows]
                self._states[name, bits] = [self.runner.begin(window, local)[0] for window in ids]

    def _block(self, index: int) -> None:
        stream, job, group = self.stream, self.job, self.job.graph.blocks[index]
        assert stream.hidden is not None
        tensors, online = job.plan.read_block(job.store, index), job.plan.online_in(index)
        with observing(job.store.skeleton(), group, online, stream.observer) as observed:
            stream.observe(index, tensors)
        local = stream.local(tensors)
        for states in self._states.values():
            states[:] = [stream.few(index, local, state, [k]) for k, state in enumerate(states)]
        part = LayerGroup(group, job.targets, tensors, observed, online)
        for bits, grid in grids_by_bits(job.recipe.weights.grid, self.settings.bits).items():
            for name, layer in round_layers(part, job.rounding(self.warn, grid)).items():
                changed = local | stream.local({name: layer.merged})
                layer.release()
                inputs = [stream.hidden[k : k + 1].to(stream.device) for k in self.windows]
                self._states[name, bits] = [stream.few(index, changed, state, [k]) for k, state in enumerate(inputs)]
                self.sizes[name, bits] = layer.weight.bits
        stream.run(index, tensors)

    def _round_heads(self) -> None:
        """Rounds the heads, and the tables that are tied to one, on the inputs of the head in the unrounded model."""
        job, group, stream = self.job, self.job.graph.outer, self.stream
        heads = [op for op in group.linears if op.weight in job.targets and is_head(op)]
        if not self.settings.embeddings or not (heads or job.tables):
            return
        with _around(job), observing(job.store.skeleton(), group, [], stream.observer) as observed:
            stream.observe_head(self.outer)
        layers = LayerGroup(group, {op.weight: op for op in heads}, self.outer, observed, [])
        config = job.rounding(self.warn)
        for bits in self.settings.embeddings:
            for name, op in job.tables.items():
                statistics = table_statistics(job.graph, name, layers)
                if statistics is not None:
                    grid = job.spec.grid(name).at_bits(bits)
                    self._heads[name, bits] = round_table(layers, op, statistics, grid, config)
            for op in heads:
                grids = {op.weight: job.spec.grid(op.weight).at_bits(bits)}
                (rounded,) = round_layers(layers, replace(config, others=grids)).values()
                self._heads[op.weight, bits] = rounded
                self.sizes[op.weight, bits] = rounded.weight.bits
        for rounded in self._heads.values():
            rounded.release()

    def divergences(self, progress: Progress) -> dict[Choice, float]:
        """The mean KL divergence, in nats per token, of each one's predictions from those of the unrounded model.

        A table that is also a head has the sum of its two costs.
        """
        assert self.stream.hidden is not None
        local, costs, count = self.stream.local(self.outer), dict.fromkeys(self.sizes, 0.0), len(self.windows)
        total = (len(self._states) + len(self._heads)) * count
        if not total:
            return costs
        with _around(self.job), progress.stage("allocate: compare predictions", total) as advance:
            for window in self.windows:
                state = self.stream.hidden[window : window + 1].to(self.stream.device)
                expected = self.runner.finish(state, local).float().log_softmax(-1)

                def add(choice: Choice, state: Tensor, weights: Mapping[str, Tensor], expected: Tensor) -> None:
                    predicted = self.runner.finish(state, weights).float().log_softmax(-1)
                    costs[choice] += float(mean_divergence(expected, predicted)) / count
                    advance()

                for choice, states in self._states.items():
                    add(choice, states[window], local, expected)
                for choice, rounded in self._heads.items():
                    changed = local | self.stream.local({choice[0]: rounded.param})
                    rounded.release()
                    add(choice, state, changed, expected)
        return costs


def has_gradient_costs(job: Job) -> bool:
    """Whether a recipe asks for costs by gradient and the model has them. Else they are measured."""
    allocate = job.recipe.weights.allocate
    return (
        allocate is not None
        and allocate.costs == "gradient"
        and not backward_problem(job.store, job.targets, job.recipe)
    )


class GradientTrials(Trials):
    """The costs of layers from one backward pass, in place of a run for each choice.

    Rounding a layer changes its outputs by D. The KL divergence that this makes is, to second order, half the expected
    square of ``sum(G * D)``, where G is the gradient of the loss at these outputs for labels that are drawn from the
    model's own predictions (the Fisher information). D is that of rounding to nearest. Tokens are taken as independent.

    The same pass adds its windows to `collected`, if that is given.
    """

    def __init__(self, job: Job, warn: Warn, collected: TokenWeights | None = None):
        super().__init__(job, warn)
        self._costs: dict[Choice, float] = {}
        self._collected = collected

    def _tokens(self, tokens: Tensor) -> Tensor:
        return tokens[: self.settings.nsamples]

    @property
    def _compared(self) -> int:
        return min(self.settings.nsamples, _HEAD_WINDOWS)

    def run(self, progress: Progress) -> None:
        """Runs the model forwards and backwards, block by block."""
        with progress.stage("allocate", 2 * len(self.job.graph.blocks)) as advance:
            gradients = BackwardPass(self.job, self.stream, self.outer).run(self._visit, advance)
        if self._collected is not None:
            self._collected.windows += len(self.stream.input_ids)
        self._embedding_costs(gradients)
        self._round_heads()

    def _visit(self, index: int, tensors: Mapping[str, Tensor]) -> See:
        changes = self._changes(index, tensors)
        collect = None if self._collected is None else self._collected.visit(index, tensors)

        def see(op: LinearOp, inputs: Tensor, gradient: Tensor | None) -> None:
            for bits, change in changes[op.weight].items():
                self._add((op.weight, bits), inputs.float() @ change.T, gradient)
            if collect is not None:
                collect(op, inputs, gradient)

        return see

    def _changes(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        """What rounding to nearest, without a low-rank branch, subtracts from the weights of a block's layers, shape
        (out, in), by the name of the weight and the bits.
        """
        group, found = self.job.graph.blocks[index], dict[str, dict[int, Tensor]]()
        layers = LayerGroup(group, self.job.targets, tensors, {}, [])
        grids = grids_by_bits(self.job.recipe.weights.grid, self.settings.bits)
        for op in group.linears:
            for bits, grid in grids.items() if op.weight in self.job.targets else ():
                matrix = layers.matrix(op)
                quick = grid.for_columns(op.in_features).quick.with_tensor_scale(matrix)
                rounded = RoundToNearest().solve(matrix, quick, None)
                self.sizes[op.weight, bits] = rounded.bits + self.job.recipe.weights.low_rank_bits(op)
                change = (matrix - rounded.dequantize()).to(self.stream.device)
                found.setdefault(op.weight, {})[bits] = change
        return found

    def _add(self, choice: Choice, change: Tensor, gradient: Tensor | None) -> None:
        """Adds what a change of outputs costs, in nats for each token of all windows.

        Both have the shape (tokens, features).
        """
        if gradient is None:  # the layer's output changes nothing
            return
        cost = (change * gradient.float()).sum(-1).square().sum() / 2
        self._costs[choice] = self._costs.get(choice, 0.0) + float(cost) / self.stream.input_ids.numel()

    def _embedding_costs(self, gradients: Sequence[Tensor]) -> None:
        """Adds the costs of the rows of tables that are looked up, and rounds the tables to nearest for that."""
        layers = LayerGroup(self.job.graph.outer, self.job.targets, self.outer, {}, [])
        for name, op in self.job.tables.items():
            for bits in self.settings.embeddings:
                grid = self.job.spec.grid(name).at_bits(bits)
                rounded = round_table(layers, op, None, grid, self.job.rounding(self.warn))
                self.sizes[name, bits] = rounded.weight.bits
                local = self.stream.local(self.outer)
                changed = local | self.stream.local({name: rounded.param})
                for window, gradient in zip(self.stream.input_ids.split(1), gradients, strict=True):
                    ids = window.to(self.stream.device)
                    change = self.runner.begin(ids, local)[0] - self.runner.begin(ids, changed)[0]
                    self._add((name, bits), change.flatten(0, -2).float(), gradient.flatten(0, -2))

    def divergences(self, progress: Progress) -> dict[Choice, float]:
        """The costs in nats per token. Those of heads are measured on some windows."""
        measured = super().divergences(progress)
        return {choice: cost + self._costs.get(choice, 0.0) for choice, cost in measured.items()}
