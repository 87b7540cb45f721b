"""Whether a Hadamard matrix on the inputs of a linear layer lowers the error of rounding it, measured layer by layer.

AdaHOP (arXiv 2604.02525) decides in training, for each operand of a product, whether a Hadamard matrix helps, by the
pattern of its outliers. Here the errors themselves are measured, with and without the matrix, on the same tokens. That
the choice is made by measured errors, and all that is sampled, is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from gyroquant.calibration.observers import Key, input_key, modules_with_own_map
from gyroquant.errors import GyroquantError
from gyroquant.evaluation.outliers import Spread
from gyroquant.grids import Grid
from gyroquant.maps import Map, blocks, factors, hadamard, random_signs
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.graph.model_graph import Group, LinearOp, ModelGraph
from gyroquant.rounding.activations import Activations
from gyroquant.rounding.solvers.rtn import RoundToNearest

_TOKENS = 512  # tokens of which an input is kept
_ROWS = 256  # outputs of a layer that are measured


class SampledSpread(Spread):
    """As `Spread`, and at most 512 of the vectors, at even intervals."""

    def __init__(self, n: int, sizes: Sequence[int] = ()):
        super().__init__(n, sizes)
        self._kept, self._stride, self._seen = torch.zeros(0, n), 1, 0

    @classmethod
    def examples(cls, n: int = 256) -> list[Self]:
        return [cls(n)]

    def __call__(self, x: Tensor) -> None:
        super().__call__(x)
        self._kept = torch.cat([self._kept, x[-self._seen % self._stride :: self._stride].float().cpu()])
        self._seen += len(x)
        while len(self._kept) > _TOKENS:
            self._kept, self._stride = self._kept[::2].clone(), 2 * self._stride

    @staticmethod
    def size_in_bytes(n: int) -> int:
        return 4 * n * (1 + _TOKENS)

    @property
    def vectors(self) -> Tensor:
        """The sample, shape (tokens, n), fp32."""
        return self._kept


@dataclass(frozen=True)
class LayerAdvice:
    """The squared errors of a layer's output, relative to its squared output, on a sample of tokens and outputs.

    - `layer`, `block`: the layer's name, and the number of its block.
    - `order`: the order of the Hadamard matrix; the input consists of as many blocks of this size as fit.
    - `weights`, `weights_turned`: only the weights are rounded, without and with the matrix.
    - `both`, `both_turned`: weights and inputs are rounded. None if inputs are not.
    """

    layer: str
    block: int
    order: int
    weights: float
    weights_turned: float
    both: float | None = None
    both_turned: float | None = None

    @property
    def helps(self) -> bool:
        """Whether the matrix lowers the error of all that is rounded."""
        if self.both is None or self.both_turned is None:
            return self.weights_turned < self.weights
        return self.both_turned < self.both


@dataclass
class HadamardAdvice:
    """Measures the layers of a model block by block, while `measure_outliers` runs it with this as `advice`.

    - `grid`: that of the weights. They are rounded to nearest, whatever else a recipe does.
    - `activations`: how inputs are rounded. None: they are not.
    - `layers`: the result. Stacked experts are averaged over those that got tokens.
    - `left_out`: layers that could not be measured, with the reason.
    """

    observer: ClassVar[type[Spread]] = SampledSpread

    graph: ModelGraph
    grid: Grid
    activations: Activations | None = None
    layers: list[LayerAdvice] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        quantizers = [] if self.activations is None else self.activations.quantizers(self.graph)
        self._inputs = {quantizer.module: quantizer.grid for quantizer in quantizers}

    def look(
        self,
        block: int,
        group: Group,
        online: Sequence[OnlineOp],
        observed: Mapping[Key, Any],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Measures the layers of a block, from the observed inputs and the parameters, by name."""
        own = modules_with_own_map(online)
        for op in group.linears:
            if not op.entry.quantize:
                continue
            key, weight = input_key(op, own), tensors[op.weight].detach().float().cpu()
            experts = range(len(weight)) if op.entry.stacked else (None,)
            pairs = [
                (observed[key, expert].vectors, op.to_matrix(weight if expert is None else weight[expert]))
                for expert in experts
                if (key, expert) in observed and len(observed[key, expert].vectors)
            ]
            try:
                self.layers += self._measured(block, op, pairs)
            except GyroquantError as error:
                self.left_out[op.name] = str(error)

    def _measured(self, block: int, op: LinearOp, pairs: Sequence[tuple[Tensor, Tensor]]) -> list[LayerAdvice]:
        turn, order = turning_map(op.in_features)
        if turn is None:
            self.left_out[op.name] = f"there is no Hadamard matrix of an order that divides {op.in_features}"
            return []
        inputs = self._inputs.get(op.module)
        errors = [self._errors(x, matrix, turn, inputs) for x, matrix in pairs]
        if not errors:
            return []
        means = [sum(each) / len(errors) for each in zip(*errors, strict=True)]
        return [LayerAdvice(op.name, block, order, *means)]

    def _errors(self, x: Tensor, matrix: Tensor, turn: Map, inputs: Grid | None) -> list[float]:
        rows = _sampled_rows(matrix, self.grid.tile_rows)
        exact = x @ rows.T
        energy = float(exact.square().sum().clamp_min(1e-30))
        weights, both = [], []
        for vectors, numbers in ((x, rows), (turn.apply(x), turn.apply(rows))):
            rounded = _nearest(numbers, self.grid)
            weights.append(float((vectors @ rounded.T - exact).square().sum()) / energy)
            if inputs is not None:
                both.append(float((inputs.fake(vectors) @ rounded.T - exact).square().sum()) / energy)
        return weights + both

    def to_dict(self) -> dict[str, Any]:
        """Grids, errors and reasons as plain data."""
        activations = None if self.activations is None else self.activations.model_dump(mode="json")
        return {
            "grid": self.grid.model_dump(mode="json"),
            "activations": activations,
            "layers": [asdict(layer) | {"helps": layer.helps} for layer in self.layers],
            "left_out": dict(self.left_out),
        }


def turning_map(n: int) -> tuple[Map | None, int]:
    """Random signs and then Hadamard matrices of the largest order that divides n, and this order.

    None and 1 if only order 1 does. The signs are those of seed 0: without them, the matrix turns a mean of all inputs
    into one outlier.
    """
    order = next(size for size in range(n, 0, -1) if n % size == 0 and factors(size) is not None)
    if order == 1:
        return None, 1
    return random_signs(n, torch.Generator().manual_seed(0)) @ blocks(hadamard(order), n), order


def _sampled_rows(matrix: Tensor, tile: int) -> Tensor:
    """At most 256 rows of a matrix at even intervals, in whole tiles of rows."""
    tiles = matrix.unflatten(0, (-1, tile))
    count = min(len(tiles), max(1, _ROWS // tile))
    return tiles[torch.linspace(0, len(tiles) - 1, count).long()].flatten(0, 1)


def _nearest(numbers: Tensor, grid: Grid) -> Tensor:
    """A matrix rounded to nearest. Raises RecipeError if the grid does not fit it."""
    chosen = grid.quick.for_columns(numbers.shape[1]).with_tensor_scale(numbers)
    return RoundToNearest().solve(numbers, chosen).dequantize()
