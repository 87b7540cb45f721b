"""A linear layer with its rounded weight, which is decoded once between the solver and the file."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gyroquant.grids import QuantizedWeight
from gyroquant.models.graph.model_graph import LinearOp


@dataclass
class RoundedLayer:
    """A layer and its rounded weight.

    The weight is decoded at the first use and kept until `release`: one copy, in the stored shape. A low-rank product
    is not part of it, because that runs with the model.
    """

    op: LinearOp
    weight: QuantizedWeight
    _param: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def param(self) -> Tensor:
        """The decoded weight as a parameter, in its stored shape, fp32."""
        if self._param is None:
            self._param = self.op.to_param(self.weight.dequantize())
        return self._param

    @property
    def matrix(self) -> Tensor:
        """The decoded weight as a matrix of shape (out, in), fp32."""
        return self.op.to_matrix(self.param).contiguous()

    @property
    def merged(self) -> Tensor:
        """The parameter with the low-rank product of its layer, if there is one, in its stored shape, fp32."""
        factors = self.weight.low_rank
        return self.param if factors is None else self.param + self.op.to_param(factors.product())

    def release(self) -> None:
        """Frees the decoded weight."""
        self._param = None
