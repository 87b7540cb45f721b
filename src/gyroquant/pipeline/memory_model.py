"""The sizes that make up the memory of a quantization. Each stage computes from them what it holds at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from math import prod
from typing import Any

from gyroquant.calibration.observers import SecondMoments
from gyroquant.errors import RecipeError
from gyroquant.models.graph.sites import Site
from gyroquant.models.stores.base import ModuleStore
from gyroquant.pipeline.folds import observed_sites
from gyroquant.pipeline.job import Job
from gyroquant.rounding.base import When
from gyroquant.rounding.layers import by_shared_input
from gyroquant.system.environment import resident_memory_bytes

_BATCH = 4096  # tokens that run through a block at once, as in `Stream`
_CHUNK = 1 << 24  # entries of a parameter that are folded at once, as in `fold`
_PIECE = 1 << 23  # weights that are rounded to nearest at once
_FOLD = 3  # fp64 copies of the rows being folded: before, after, and one intermediate


def hidden_bytes(job: Job) -> int:
    """Bytes of the hidden states that are carried through the model during rounding, those of the original included."""
    if not job.needs_stream or job.tokens is None:
        return 0
    copies = 2 if job.recipe.weights.needs_original else 1
    return copies * job.tokens.numel() * job.graph.hidden * job.compute_dtype.itemsize


def most_workers(job: Job) -> int:
    """The largest number of workers of a job that run at once. For a remote cluster, the number that was requested."""
    workers = job.output.workers
    if workers is None:
        return 0
    if workers.ray == "local" and workers.count is None:
        return max(1, (os.cpu_count() or 1) // workers.each)
    return workers.count or 1


class MemoryModel:
    """The sizes of one job, in bytes unless stated otherwise. Names with `numel` are numbers of entries.

    - ``base``: the memory that the process holds already.
    - ``stored``: bytes of an entry as it is read; 0 for a model in memory, which is not read.
    - ``compute``: bytes of an entry in the dtype of the computation.
    - ``width``: entries of a hidden state.
    - ``length``: tokens of a window.
    - ``tokens``: tokens of the whole text.
    - ``batch``: tokens that run through a block at once.
    - ``outer``: names of the parameters around the blocks.
    - ``block``: names of the parameters of the largest block.
    - ``group``: the largest block. Its number is ``largest``.
    - ``hidden``: the hidden states of the text.
    - ``in_memory``: the part of ``hidden`` that is not offloaded.
    """

    def __init__(self, job: Job):
        self.job, self.graph, self.recipe = job, job.graph, job.recipe
        self.base = resident_memory_bytes()
        self.stored = 0 if isinstance(job.store, ModuleStore) else job.store.read_dtype.itemsize
        self.compute, self.width = job.compute_dtype.itemsize, job.graph.hidden
        self.outer = self.graph.outer_params()
        self.largest = max(range(len(self.graph.blocks)), key=lambda i: self.numel(self.graph.block_params(i)))
        self.group, self.block = self.graph.blocks[self.largest], self.graph.block_params(self.largest)
        self.tokens = 0 if job.tokens is None else job.tokens.numel()
        self.length = 1 if job.tokens is None else job.tokens.shape[1]
        self.batch = min(self.tokens, max(1, _BATCH // self.length) * self.length)
        self.hidden = hidden_bytes(job)
        self.in_memory = 0 if job.output.offload is not None else self.hidden

    def numel(self, names: Iterable[str]) -> int:
        """Entries of some parameters."""
        return sum(self.numel_of(name) for name in names)

    def numel_of(self, name: str) -> int:
        """Entries of one parameter, which may be tied."""
        return prod(self._shape(name))

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.job.store.shapes[self.graph.tied.get(name, name)])

    def folded(self, names: Iterable[str]) -> int:
        """Bytes of parameters after folding: changed ones are fp32, others as they were read."""
        return sum(self.numel_of(name) * (4 if self.job.plan.edits.get(name) else self.stored) for name in names)

    def folding(self, names: Iterable[str]) -> int:
        """Additional bytes to fold the largest of some parameters: fp64 copies of rows folded together."""
        most = 0
        for name in names:
            edits, shape = self.job.plan.edits.get(name, ()), self._shape(name)
            if edits:
                whole = len(shape) == 1 or any(edit.port.axis % len(shape) == 0 for edit in edits)
                most = max(most, self.numel_of(name) if whole else min(self.numel_of(name), _CHUNK))
        return _FOLD * 8 * most

    def reading(self, names: Iterable[str]) -> int:
        """Additional bytes to read the largest of some parameters: the mapped file, and the check for NaN."""
        return max(map(self.numel_of, names)) * (2 * self.stored + 3) if self.stored else 0

    def making_block(self) -> int:
        """Bytes to read and fold a block."""
        held = self.numel(self.block) * self.stored
        return held + max(self.folded(self.block) + self.folding(self.block), self.reading(self.block))

    @cached_property
    def outer_numel(self) -> int:
        """Entries around the blocks after folding. A tied head gets its own matrix if a map is folded into it."""
        untied = [name for name in self.graph.tied if self.job.plan.edits.get(name)]
        return self.numel(self.outer) + self.numel(untied)

    @property
    def outer_folded(self) -> int:
        """Bytes of the folded parameters around the blocks, fp32."""
        return 4 * self.outer_numel

    @property
    def making_outer(self) -> int:
        """Bytes to read and fold the parameters around the blocks."""
        read = self.stored * self.numel(self.outer)
        return read + max(self.outer_folded + self.folding(self.outer), self.reading(self.outer))

    def activations(self, tokens: int, itemsize: int) -> int:
        """Bytes of activations while a block runs on tokens.

        These are the residual stream and the larger of two: queries, keys and values before and after RoPE, or the
        intermediate activations of the feed-forward network.
        """
        wide = max((op.in_features for op in self.group.linears), default=self.width)
        return itemsize * tokens * (4 * self.width + max(3 * wide, 6 * self.graph.heads * self.graph.head_dim))

    @cached_property
    def observed(self) -> list[tuple[Site, tuple[Callable[[int], Any], ...]]]:
        """The measured sites, and the kinds of their observers."""
        return observed_sites(self.graph, self.recipe) if self.job.measures else []

    @property
    def measured_maps(self) -> int:
        """Bytes of the maps that are chosen from second moments: dense, fp64. All stages after measuring hold them."""
        return sum(8 * site.n**2 for site, kinds in self.observed if SecondMoments in kinds)

    def layer_groups(self) -> Iterator[tuple[int, int]]:
        """For each group of layers that are rounded together: the order of their input, and their number of rows."""
        online = self.job.plan.online_in(0)
        basis = self.recipe.weights.basis
        for ops in by_shared_input(self.group, self.job.targets, online).values():
            experts = ops[0].shape[0] if ops[0].entry.stacked else 1
            order = ops[0].in_features if basis is None else basis.order(ops[0].in_features)
            rows = sum(op.numel // op.in_features for op in ops)
            for _ in range(experts):
                yield order, rows // experts

    @property
    def _products(self) -> int:
        """The number of sums of products per input."""
        weights = self.recipe.weights
        rounding = 2 * int(weights.needs_rounding_errors and self.recipe.activations is not None)
        return 1 + int(weights.needs_input_error) + int(weights.needs_input_error_second_moments) + rounding

    def second_moments(self) -> int:
        """Bytes of the second moments of all inputs of a block, which are kept until its layers are reported."""
        if not self.job.observes_layers:
            return 0
        guided, inputs = self.recipe.weights.guided, [n for n, _ in self.layer_groups()]
        if guided is None or guided.kronecker == "sequences":
            return sum(4 * self._products * n**2 for n in inputs) + self.kronecker()
        read = [op.in_features for op in self.group.linears if op.weight in self.job.targets]  # by each layer's groups
        weighted = sum(4 * self._products * guided.groups * n**2 for n in read)
        return sum(4 * n**2 for n in inputs) + weighted + self.kronecker()

    def kronecker(self) -> int:
        """Bytes of the factors of `guided.kronecker` of a block; 0 without that setting."""
        return sum(4 * groups * (rows**2 + columns**2) for groups, rows, columns in self._factors())

    def _factors(self) -> Iterator[tuple[int, int, int]]:
        """For each layer to round with `guided.kronecker`: its groups of outputs, the rows of one, and the order of the
        input factor, 0 if there is none.
        """
        guided = self.recipe.weights.guided
        if guided is None or guided.kronecker is None:
            return
        for op in self.group.linears:
            if op.weight in self.job.targets:
                rows = op.numel // op.in_features
                groups = min(guided.groups, rows)
                yield groups, -(-rows // groups), op.in_features if guided.kronecker == "sequences" else 0

    @property
    def _factor(self) -> int:
        """Bytes per entry of second moments while a solver uses them: second moments in another basis, second moments
        in the order of the sweep, the factor, and products with the input error.
        """
        weights = self.recipe.weights
        based = 8 * self._products if weights.basis is not None else 0
        ordered = 4 * self._products if getattr(weights.solver, "act_order", False) else 0
        return based + ordered + 8 + (24 if self._products > 1 else 0)

    def solving(self) -> int:
        """Bytes to round and report the largest group of layers."""
        weights, most = self.recipe.weights, 0
        for n, rows in self.layer_groups():
            matrix, square = 4 * n * rows, n * n
            need = 2 * matrix + 2 * 4 * min(n * rows, _PIECE) + n * rows
            if self.job.observes_layers and weights.bound:  # the report takes eigenvalues of second moments
                need = max(need, 5 * square + 4 * matrix)
            if any(step.needs_statistics for step in weights.steps if step.when <= When.SOLVER):
                outputs = 12 * max((size**2 for _, size, _ in self._factors()), default=0)  # in fp64, parts in fp32
                need = max(need, self._factor * square + 3 * matrix + 2 * n * rows + outputs)
            most = max(most, need, *(step.memory_bytes(rows, n) for step in weights.steps))
        return most


def observer_bytes(kind: Any, n: int) -> int:
    """Bytes of an observer of vectors with n entries. Raises RecipeError if the observer does not declare them."""
    size = getattr(kind, "size_in_bytes", None)
    if size is None:
        raise RecipeError(
            f"the observer {getattr(kind, '__name__', kind)} does not declare how much memory it takes: give it "
            "a static method size_in_bytes(n)"
        )
    return int(size(n))
