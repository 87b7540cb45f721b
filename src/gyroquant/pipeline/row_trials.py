"""What fewer bits of every row of outputs cost, from one backward pass (MixLLM, arXiv 2412.14590)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gyroquant.grids import IntegerGrid, MixedRowsGrid
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.token_weights import TokenWeights
from gyroquant.pipeline.trials import GradientTrials
from gyroquant.rounding.base import Warn
from gyroquant.rounding.bit_allocation import Choice
from gyroquant.rounding.row_allocation import RowChoices, choose_rows


def mixed_grid(job: Job) -> MixedRowsGrid:
    """The grid of layers whose rows get their own bits."""
    settings, grid = job.recipe.weights.allocate, job.recipe.weights.grid
    assert settings is not None
    assert isinstance(grid, IntegerGrid)
    return MixedRowsGrid.of(grid, settings.bits)


class RowTrials(GradientTrials):
    """As `GradientTrials`, with a cost for every row of a layer: half the mean over the tokens of ``(g d)^2``.

    g is the gradient of the loss at this output, d what rounding to nearest changes in it. That is the cost of a layer
    in which no other row is rounded. MixLLM's score is ``|s + s^2 / 2|`` for s, the change of the loss on the text to
    first order, which labels from the model's own predictions make zero on average.
    """

    def __init__(self, job: Job, warn: Warn, collected: TokenWeights | None = None):
        super().__init__(job, warn, collected)
        self._rows: dict[Choice, Tensor] = {}

    def _changes(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
        found = super()._changes(index, tensors)
        for name, changes in found.items():
            for bits, change in changes.items():
                self._rows[name, bits] = torch.zeros(len(change), dtype=torch.float64)
        return found

    def _add(self, choice: Choice, change: Tensor, gradient: Tensor | None) -> None:
        super()._add(choice, change, gradient)
        if gradient is not None and choice in self._rows:
            squares = (change * gradient.float()).square().sum(0).double().cpu()
            self._rows[choice] += squares / 2 / self.stream.input_ids.numel()

    def choose(self, costs: Mapping[Choice, float], room: int) -> dict[str, Any]:
        """The allocation within `room` bits, as `allocate` returns it, for the costs of tables and heads in `costs`.

        - `bits`: the mean bits of the codes of a layer, and the bits of a table or head, by the name of the weight.
        - `rows`: for each layer, the number of rows of each width.
        - `row_places`: for each layer, the place of each row's width among those it may have, one digit a row.
        """
        grid, graph = mixed_grid(self.job), self.job.graph
        names = sorted({name for name, _ in self._rows})
        layers = [
            RowChoices(
                torch.stack([self._rows[name, width] for width in grid.widths], 1).numpy(),
                grid.row_sizes(graph.op(name).in_features),
            )
            for name in names
        ]
        tables = {choice: cost for choice, cost in costs.items() if choice[0] not in names}
        taken, chosen = choose_rows(layers, tables, self.sizes, room - len(names) * grid.most_padding)
        bits: dict[str, float] = dict(chosen)
        found: dict[str, Any] = {"bits": bits, "rows": {}, "row_places": {}}
        size = sum(self.sizes[choice] for choice in chosen.items())
        for name, layer, places in zip(names, layers, taken, strict=True):
            counts = {str(width): int((places == place).sum()) for place, width in enumerate(grid.widths)}
            bits[name] = sum(int(width) * count for width, count in counts.items()) / len(places)
            found["rows"][name] = counts
            found["row_places"][name] = "".join(map(str, places))
            size += sum(layer.sizes[place] * int((places == place).sum()) for place in range(len(grid.widths)))
        return found | {"taken": size}


def places_of(text: str) -> Tensor:
    """The places of the widths of rows, int64, from the digits in `row_places`."""
    return torch.tensor([int(digit) for digit in text])


__all__ = ["RowTrials", "mixed_grid", "places_of"]
