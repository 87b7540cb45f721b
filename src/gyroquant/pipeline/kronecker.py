"""The factors of `weights.guided.kronecker`: collected in the backward pass, kept in the journal block by block."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gyroquant.calibration.observers import SecondMoments
from gyroquant.calibration.offload import Spilled
from gyroquant.models.graph.model_graph import LinearOp, ModelGraph
from gyroquant.rounding.guided import Guided, KroneckerFactors
from gyroquant.system.journal import Journal

KRONECKER = "token-weights-kronecker"
"""The start of their names in a run's journal."""


class KroneckerSums:
    """The sums of `KroneckerFactors` of all layers.

    The sums of each layer are in a file in `folder`, so that memory holds what is in use. Without a folder they are in
    memory.
    """

    def __init__(self, settings: Guided, folder: Path | None = None):
        self.settings, self.folder = settings, folder
        self._sums: dict[str, list[list[SecondMoments]]] = {}
        self._files: list[Spilled] = []

    def add(self, op: LinearOp, inputs: Tensor, gradient: Tensor) -> None:
        """Adds a window: the inputs of a layer and the gradient at its outputs, shape (tokens, features)."""
        inputs, parts = inputs.float(), gradient.float().tensor_split(self._groups(op), 1)
        for part, sums in zip(parts, self._of(op), strict=True):
            if self.settings.kronecker == "tokens":
                sums[0]((part * inputs.norm(dim=1, keepdim=True) ** self.settings.power).cpu())
            else:
                product = (part.T @ inputs).cpu()
                sums[0](product.T)
                sums[1](product)

    def _groups(self, op: LinearOp) -> int:
        return min(self.settings.groups, op.numel // op.in_features)

    def _of(self, op: LinearOp) -> list[list[SecondMoments]]:
        """The sums for every group of outputs: of the outputs, then of the inputs if they are collected."""
        if op.weight not in self._sums:
            inputs = [op.in_features] if self.settings.kronecker == "sequences" else []
            outputs = torch.arange(op.numel // op.in_features).tensor_split(self._groups(op))
            found = [[SecondMoments(n) for n in (len(part), *inputs)] for part in outputs]
            if self.folder is not None:
                self._spill([sums for group in found for sums in group], self.folder)
            self._sums[op.weight] = found
        return self._sums[op.weight]

    def _spill(self, sums: list[SecondMoments], folder: Path) -> None:
        sizes = [moments.lower.numel() for moments in sums]
        self._files.append(Spilled(folder, (sum(sizes),), torch.float32))
        for moments, space in zip(sums, self._files[-1].tensor.split(sizes), strict=True):
            moments.lower = space.view(moments.lower.shape)

    def release(self) -> None:
        """Lets the system write to the files what memory holds of them."""
        for file in self._files:
            file.behind(0, len(file.tensor))

    def factors(self, op: LinearOp) -> list[KroneckerFactors]:
        """The factors of every group of a layer's outputs."""
        found = []
        for sums in self._of(op):
            outputs, *inputs = (_with_unit_mean(moments.second_moments) for moments in sums)
            outputs.diagonal().add_(self.settings.damp_percent)
            found.append(KroneckerFactors(outputs, *inputs))
        return found

    def keep(self, graph: ModelGraph, journal: Journal) -> None:
        """Writes the factors to the journal, and forgets the sums."""
        for index, group in enumerate(graph.blocks):
            tensors = dict[str, Tensor]()
            for op in group.linears:
                for number, pair in enumerate(self.factors(op) if op.weight in self._sums else ()):
                    tensors[f"{op.weight}/outputs.{number}"] = pair.outputs
                    if pair.inputs is not None:
                        tensors[f"{op.weight}/inputs.{number}"] = pair.inputs
            journal.put(f"{KRONECKER}-{index:05d}", tensors, {})
        self._sums, self._files = {}, []


def _with_unit_mean(sums: Tensor) -> Tensor:
    """Second moments divided by the mean of their diagonal; the identity if they are all 0."""
    mean = float(sums.diagonal().mean())
    return sums / mean if mean > 0 else torch.eye(len(sums))


class KeptFactors:
    """The factors in a journal."""

    def __init__(self, journal: Journal):
        self._journal = journal

    def of(self, index: int) -> Mapping[str, list[KroneckerFactors]]:
        """The factors of a block's layers, for every group of their outputs, by the name of the weight.

        Raises InputError if the journal is damaged.
        """
        name = f"{KRONECKER}-{index:05d}"
        self._journal.get(name)
        tensors, found = self._journal.tensors(name), dict[str, list[KroneckerFactors]]()
        for key in sorted(tensors, key=lambda key: int(key.rpartition(".")[2])):
            weight, _, part = key.rpartition("/")
            if part.startswith("outputs."):
                inputs = tensors.get(f"{weight}/{part.replace('outputs', 'inputs')}")
                found.setdefault(weight, []).append(KroneckerFactors(tensors[key], inputs))
        return found


__all__ = ["KRONECKER", "KeptFactors", "KroneckerSums"]
