"""The sizes of what is alive at once in each stage of a quantization."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import torch

from gyroquant.calibration.observers import Gram
from gyroquant.environment import available_memory, resident_memory_bytes
from gyroquant.errors import RecipeError
from gyroquant.job import Job, rounds_while_learning
from gyroquant.learning.objectives import Sample
from gyroquant.models.fold import ApplyMap
from gyroquant.models.store import ModuleStore
from gyroquant.planning import observed_sites
from gyroquant.pool import SLACK
from gyroquant.rounding.base import ModelSolver
from gyroquant.rounding.stage import together

_BATCH = 4096  # tokens that run through a block at once, as in `Stream`
_CHUNK = 1 << 24  # entries of a parameter that are folded at once, as in `fold`
_PIECE = 1 << 23  # weights that are rounded to nearest at once
_AXES = 28  # bytes per entry of second moments while their principal axes are found, in fp64
_FOLD = 3  # copies in fp64 of what is being folded: before, after, and in between


def hidden_bytes(job: Job) -> int:
    """Bytes of the hidden states that go through a model while it is rounded, the original's included."""
    if not job.needs_stream or job.tokens is None:
        return 0
    copies = 2 if job.recipe.weights.needs_original else 1
    return copies * job.tokens.numel() * job.graph.hidden * job.compute_dtype.itemsize


def most_workers(job: Job) -> int:
    """How many workers of a job may run at once; of a cluster that is not started here, as many as are asked for."""
    workers = job.output.workers
    if workers is None:
        return 0
    if workers.ray == "local" and workers.count is None:
        return max(1, (os.cpu_count() or 1) // workers.each)
    return workers.count or 1


class Reckoning:
    """The sizes of one job, in bytes. `base` is what the process has already."""

    def __init__(self, job: Job):
        self.job, self.graph, self.recipe = job, job.graph, job.recipe
        self.base = resident_memory_bytes()
        self.stored = 0 if isinstance(job.store, ModuleStore) else job.store.read_dtype.itemsize
        self.wide = max(4, job.store.dtype.itemsize)
        self.compute, self.width = job.compute_dtype.itemsize, job.graph.hidden
        self.outer = self.graph.outer_params()
        block = max(range(len(self.graph.blocks)), key=lambda i: self._count(self.graph.block_params(i)))
        self.group, self.block = self.graph.blocks[block], self.graph.block_params(block)
        self.tokens = 0 if job.tokens is None else job.tokens.numel()
        self.length = 1 if job.tokens is None else job.tokens.shape[1]
        self.batch = min(self.tokens, max(1, _BATCH // self.length) * self.length)
        self.hidden = hidden_bytes(job)
        self.in_memory = 0 if job.output.offload is not None else self.hidden

    def totals(self) -> Iterator[tuple[str, int]]:
        """The stages, and the resident memory that each needs in all."""
        return ((name, self.base + int(size)) for name, size in self.stages())

    def stages(self) -> Iterator[tuple[str, float]]:
        """The stages that the recipe has, and what each needs on top of `base`."""
        if self.job.measures:
            yield "measure", self._measure()
        kept = self._measured_maps
        if self.recipe.learn is not None:
            yield "learn", kept + self._learn()
        if self.job.plan.edits or self.job.plan.online:
            yield "prove", kept + self._prove()
        if self.recipe.weights.allocate is not None:
            yield "allocate", kept + self._allocate()
        if isinstance(self.recipe.weights.solver, ModelSolver):
            yield "solve", kept + 2 * 4 * self._count(self.job.store.shapes)
        yield "round", kept + (self._round() if self.job.output.workers is None else self._side_by_side(kept))
        yield "save", kept + self._save()
        if self.recipe.finish is not None:
            yield "finish", kept + self._finish()

    def _count(self, names: Iterable[str]) -> int:
        return sum(self._size(name) for name in names)

    def _size(self, name: str) -> int:
        return int(torch.Size(self.job.store.shapes[self.graph.tied.get(name, name)]).numel())

    def _folded(self, names: Iterable[str]) -> int:
        """Parameters after their edits: edited ones are fp32, others as they were read."""
        return sum(self._size(name) * (4 if self.job.plan.edits.get(name) else self.stored) for name in names)

    def _folding(self, names: Iterable[str]) -> int:
        """What folding the largest of some parameters takes besides: copies in fp64 of the rows that go together."""
        most = 0
        for name in names:
            edits, shape = self.job.plan.edits.get(name, ()), self.job.store.shapes[self.graph.tied.get(name, name)]
            if edits:
                whole = len(shape) == 1 or any(edit.port.axis % len(shape) == 0 for edit in edits)
                most = max(most, self._size(name) if whole else min(self._size(name), _CHUNK))
        return _FOLD * 8 * most

    def _reading(self, names: Iterable[str]) -> int:
        """What reading the largest of some parameters takes besides: the mapped file, and the look for NaN."""
        return max(map(self._size, names)) * (2 * self.stored + 3) if self.stored else 0

    @cached_property
    def _outer_folded(self) -> int:
        """Entries around the blocks, with those that are no longer tied, which are unless nothing is folded there."""
        untied = [name for name in self.graph.tied if self.job.plan.edits.get(name)]
        return self._count(self.outer) + self._count(untied)

    def _activations(self, tokens: int, size: int) -> int:
        """What a block holds while it runs on tokens: queries, keys and values with what RoPE makes of them, or the
        feed-forward network between its layers, beside the residual stream.
        """
        wide = max((op.in_features for op in self.group.linears), default=self.width)
        return size * tokens * (4 * self.width + max(3 * wide, 6 * self.graph.heads * self.graph.head_dim))

    def _prove(self) -> int:
        """As `prove`: two whole sets of parameters around the blocks, two sets of logits and their difference."""
        settings = self.recipe.proof
        tokens = min(settings.nsamples * settings.seqlen, self.tokens)
        outer, block = self.stored * self._count(self.outer), self._count(self.block)
        states, words = 3 * 4 * tokens * self.width, 4 * tokens * self.graph.config.vocab_size
        copied = 4 * self._count(self.outer) if self.stored not in (0, 4) else 0
        folded = 4 * self._outer_folded
        kept = block * (self.stored + 4)
        running = kept + max(self._folding(self.block), 4 * block + self._activations(tokens, 4)) + states
        ending = kept + states + max(copied + words, words + folded + max(self._folding(self.outer), words), 3 * words)
        return outer + max(copied, folded + self._folding(self.outer), running, ending, self._reading(self.outer))

    @property
    def _around(self) -> int:
        """The parameters around the blocks as `folded_outer` gives them."""
        return 4 * self._outer_folded

    @property
    def _making_outer(self) -> int:
        """The same while they are made."""
        read = self.stored * self._count(self.outer)
        return read + max(self._around + self._folding(self.outer), self._reading(self.outer))

    def _save(self) -> int:
        """The parameters around the blocks, folded, and again in the dtype of the output, in front of the blocks."""
        size = self.job.output.dtype.itemsize
        largest, saved = max(map(self._size, self.outer)), size * self._outer_folded
        return self.in_memory + max(self._making_outer, self._around + saved + largest * (size + 3))

    def _measure(self) -> int:
        outer, block = self._count(self.outer), self._count(self.block)
        copy = self.compute if self.compute != self.stored else 0
        observers = sum(observer_bytes(kind, site.n) for site, kinds in self._observed for kind in kinds)
        choosing = max((_AXES * site.n**2 for site, kinds in self._observed if Gram in kinds), default=0)
        hidden = 0 if self.job.output.offload is not None else self.tokens * self.width * self.compute
        running = block * (self.stored + copy) + self._activations(self.batch, max(4, self.compute))
        return outer * (self.stored + copy) + hidden + observers + max(running, choosing, self._reading(self.outer))

    @cached_property
    def _observed(self) -> list[Any]:
        return list(observed_sites(self.graph, self.recipe)) if self.job.measures else []

    @property
    def _measured_maps(self) -> int:
        """Of maps that are chosen by second moments: dense, in fp64."""
        return sum(8 * site.n**2 for site, kinds in self._observed if Gram in kinds)

    def _learn(self) -> int:
        """End to end, the whole model with gradients; else a block."""
        learn = self.recipe.learn
        assert learn is not None
        names = list(self.job.store.shapes)
        block = self._count(self.block)
        if learn.objective in ("weights", "blocks", "kurtosis"):
            hidden = learn.batch_size * self.length * self.width * self.compute
            sample = sum(4 * Sample.rows * site.n for site, _, _ in self.job.plan.folded if site.name in learn.sites)
            extra = {"weights": 0, "kurtosis": sample + self.hidden, "blocks": 2 * hidden}[learn.objective]
            activations = 0 if learn.objective == "weights" else 3 * self._activations(self.length, self.compute)
            outer = 0 if learn.objective == "weights" else self.compute * self._count(self.outer)
            return block * (self.stored + 5 * 4) + self._folding(self.block) + activations + extra + outer
        everything = self._count(names) + self._count(n for n in self.graph.tied if self.job.plan.edits.get(n))
        maps = {n: sum(isinstance(edit, ApplyMap) for edit in edits) for n, edits in self.job.plan.edits.items()}
        edited = sum(self._size(n) * (1 + count) for n, count in maps.items())  # what each map had in front of it
        original = self.compute * self._count(names) if learn.objective == "kl" and self.compute != self.stored else 0
        rounded = 3 * 4 * self._count(self.job.targets) if rounds_while_learning(self.recipe) else 0
        typed = 2 * self.compute if self.compute != 4 else 4  # leaves of another dtype, and their gradients
        held = self.stored * self._count(names) + everything * (4 + typed) + 4 * edited + rounded + original
        blocks = len(self.graph.blocks)
        words = 4 * 4 * self.length * self.graph.config.vocab_size
        return held + blocks * 2 * self._activations(self.length, self.compute) + words

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """Of the layers of a block that are rounded together: the order of their inputs, and their rows."""
        online = self.job.plan.online_in(0)
        basis = self.recipe.weights.basis
        for ops in together(self.group, self.job.targets, online).values():
            experts = ops[0].shape[0] if ops[0].entry.stacked else 1
            order = ops[0].in_features if basis is None else basis.order(ops[0].in_features)
            rows = sum(int(torch.Size(op.shape).numel()) // op.in_features for op in ops)
            for _ in range(experts):
                yield order, rows // experts

    @property
    def _sums(self) -> int:
        """How many sums of products are taken of every input."""
        weights = self.recipe.weights
        return 1 + int(weights.needs_drift) + int(weights.target is not None)

    def _grams(self) -> int:
        """Second moments of all inputs of a block, which are kept until it is judged."""
        return sum(4 * self._sums * n**2 for n, _ in self._pieces()) if self.job.needs_stream else 0

    @property
    def _factor_bytes(self) -> int:
        """Bytes per entry of second moments while a layer is rounded by them: those of a basis, those in the order of
        the sweep, the factor, and what a drift is multiplied by.
        """
        weights = self.recipe.weights
        based = 8 * self._sums if weights.basis is not None else 0
        ordered = 4 * self._sums if getattr(weights.solver, "act_order", False) else 0
        return based + ordered + 8 + (24 if self._sums > 1 else 0)

    def _solving(self) -> int:
        """What the largest group of layers takes while it is rounded, and then judged."""
        weights, most = self.recipe.weights, 0
        for n, rows in self._pieces():
            matrix, square = 4 * n * rows, n * n
            need = 2 * matrix + 2 * 4 * min(n * rows, _PIECE) + n * rows
            if self.job.needs_stream:  # judged: eigenvalues of second moments
                need = max(need, 5 * square + 4 * matrix)
            if weights.solver.needs_statistics or weights.target is not None:
                need = max(need, self._factor_bytes * square + 3 * matrix + 2 * n * rows)
            if weights.refine is not None:
                need = max(need, 4 * 5 * square + 5 * matrix)
            most = max(most, need)
        return most

    def _round(self) -> int:
        """A block: folded, as it is observed, as it is rounded; what is decoded goes along until it is deployed."""
        block, weights = self._count(self.block), self.recipe.weights
        rounded = sum(self._size(name) for name in self.block if name in self.job.targets)
        folded = self._folded(self.block)
        making = block * self.stored + max(folded + self._folding(self.block), self._reading(self.block))
        codes, decoded = rounded, 4 * rounded
        if not self.job.needs_stream:
            return max(making, folded + codes + max(decoded, self._solving()))
        local = block * self.compute if folded != block * self.compute else 0
        models = 2 if weights.needs_original else 1
        turns = decoded if weights.observes_in_turn else 0
        inputs = (max if weights.observes_in_turn else sum)(n for n, _ in self._pieces())
        waiting = self.compute * self.batch * inputs if weights.needs_drift else 0
        running = models * local + self._activations(self.batch, max(4, self.compute)) + waiting
        deployed = 2 * decoded + local
        held = folded + codes + turns + self._grams()
        return self.in_memory + max(
            making,
            held + running,
            held + self._solving(),
            folded + codes + deployed + self._activations(self.batch, self.compute),
        )

    def _carry(self) -> int:
        """The process that gives out blocks to workers: the text on its way through the unrounded ones."""
        block, folded = self._count(self.block), self._folded(self.block)
        making = block * self.stored + max(folded + self._folding(self.block), self._reading(self.block))
        running = folded + block * self.compute + self._activations(self.batch, max(4, self.compute))
        return self.in_memory + max(self._making_outer, making, running if self.job.needs_stream else 0)

    def _side_by_side(self, kept: int) -> int:
        """That process, and its workers, each of which holds what this one has by now, all of the hidden states, and
        what a block takes.
        """
        first, each = self._carry(), self.base + kept + max(self.in_memory + self._making_outer, self._round())
        return first + self.workers(first, each) * each

    def workers(self, first: float, each: float) -> int:
        """How many workers of `each` bytes run at once beside a first process of so many.

        Here those that are asked for, as long as there is room: as `LocalPool` does, at least one. Ray looks at no
        memory; what runs on a cluster elsewhere is not counted.
        """
        asked = self.job.output.workers
        if asked is None or asked.ray not in (None, "local"):
            return 0
        most = most_workers(self.job)
        room = available_memory() - first
        return most if asked.ray else max(1, min(most, int(room // (each * SLACK))))

    def _allocate(self) -> int:
        """The models with one layer rounded: their hidden states, beside the unrounded one's; and logits."""
        allocate = self.recipe.weights.allocate
        assert allocate is not None
        inside = sum(op.weight in self.job.targets for group in self.graph.blocks for op in group.linears)
        state = self.length * self.width * self.compute
        trials = inside * len(allocate.bits) * allocate.nsamples * state
        block, largest = self._count(self.block), max((n * rows for n, rows in self._pieces()), default=0)
        copy = 0 if self.compute == 4 else self.compute
        hidden = 0 if self.job.output.offload is not None else self.tokens * self.width * self.compute
        folded, local = self._folded(self.block), copy * block
        running = self._grams() + max(self._activations(self.batch, max(4, self.compute)), self._solving())
        rounding = folded + local + running + 2 * 4 * largest + block
        words = 5 * 4 * self.length * self.graph.config.vocab_size
        around = self._around + copy * self._outer_folded
        return around + trials + hidden + max(rounding, words, block * self.stored + folded + self._folding(self.block))

    def _finish(self) -> int:
        """The original's hidden states, those of a batch in front of every block, one block with gradients, logits."""
        finish = self.recipe.finish
        assert finish is not None
        outer, blocks, block = self._count(self.outer), len(self.graph.blocks), self._count(self.block)
        state = self.length * self.width * self.compute
        copy = self.compute if self.compute != self.stored else 0
        rounded = sum(self._size(name) for name in self.job.targets)
        groups = rounded // max(
            1, min(g.group_size if g.group_size > 0 else self.width for g in self.job.grids.values())
        )
        moving = 4 * 4 * groups
        held = outer * (self.stored + copy) + self.tokens * self.width * self.compute
        states = (blocks + 1) * finish.batch_size * state
        words = 6 * 4 * self.length * self.graph.config.vocab_size + 2 * 4 * self._outer_folded
        turning = 20 * block + 3 * self._activations(self.length, self.compute)
        return held + moving + states + max(words, turning)


def observer_bytes(kind: Any, n: int) -> int:
    """Bytes of an observer of vectors of n numbers. Raises RecipeError for one that does not say."""
    size = getattr(kind, "size_in_bytes", None)
    if size is None:
        raise RecipeError(
            f"the observer {getattr(kind, '__name__', kind)} does not say how much memory it takes: give it a static "
            "method size_in_bytes(n)"
        )
    return int(size(n))
