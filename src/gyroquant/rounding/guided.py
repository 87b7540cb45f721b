"""The section `weights.guided` of a recipe: second moments weighted by the gradient of the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from gyroquant.rounding.base import InputStatistics, RoundingStep, Solver, When


class Guided(BaseModel):
    """Weights each calibration token by how much the loss depends on a layer's outputs there.

    Solvers minimize the error of a layer's outputs over the tokens, ``|X (W - Q)^T|^2``. With this section, each token
    counts by the mean square of the loss's gradient at the outputs, over a group of outputs (GuidedQuant, Kim et al.,
    arXiv 2505.07004). Every step that reads second moments then uses these: solver, target and refinement. The loss is
    that of labels drawn from the model's own predictions, and one backward pass over the calibration text finds the
    gradients.

    Options:

    - `groups`: groups of consecutive outputs of a layer, each with its own weights of tokens. Default 4.
    - `power`: the exponent of the weights of tokens: 1 (default) follows the loss. 0 counts all tokens equally, which
      needs `kronecker`: the factors are then those of K-FAC (Martens and Grosse, arXiv 1503.05671).
    - `kronecker`: also weights the outputs of each group, by the second moments of the gradient (YAQA, Tseng et al.,
      arXiv 2505.22988). The solver then minimizes ``tr(H_O D H_I D^T)`` for the error ``D = W - Q``, and feeds errors
      back to later rows too. Default None: all outputs of a group count equally. `KroneckerFactors` has the formulas.
      `tokens` takes tokens as independent (sketch A of the paper); `sequences` takes the gradient of the weights for
      each window (sketch B), with second moments of the unrounded model's inputs.
    - `damp_percent`: with `kronecker`, the share of the mean of H_O's diagonal that is added to it. Default 0.01. The
      larger, the more outputs count equally.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    groups: Annotated[int, Field(gt=0, le=1024)] = 4
    power: Annotated[float, Field(ge=0, le=1)] = 1.0
    kronecker: Literal["tokens", "sequences"] | None = None
    damp_percent: Annotated[float, Field(ge=0, le=100)] = 0.01

    @model_validator(mode="after")
    def _consistent(self) -> Guided:
        if self.kronecker is None and self.damp_percent != type(self).model_fields["damp_percent"].default:
            raise ValueError("damp_percent is for the output factor: set kronecker to tokens or sequences, or leave it")
        if self.kronecker is None and self.power == 0:
            raise ValueError("power 0 counts all tokens equally, as without guided: leave guided out, or set kronecker")
        if self.kronecker == "sequences" and self.power != 1:
            raise ValueError("power is for the weights of tokens, and kronecker: sequences has none: leave power out")
        return self

    def problem(self, solver: Solver, steps: Sequence[RoundingStep]) -> str:
        """The reason why it cannot be combined with a solver and other steps of a recipe; empty if it can."""
        if not any(step.needs_statistics for step in steps):
            return "guided changes second moments, and no step of this recipe reads them: take a solver such as gptq"
        if self.kronecker is None:
            return ""
        if not solver.uses_gradient_moments:
            return f"the solver {solver.name} cannot weight outputs: take gptq, or leave guided.kronecker out"
        for step in steps:
            if step.when == When.AFTER_SOLVER and step.needs_statistics and not step.uses_gradient_moments:
                return (
                    f"{step.key} changes every row by itself, which undoes the feedback between rows: leave {step.key} "
                    "or guided.kronecker out"
                )
            if self.kronecker == "sequences" and step.needs_original:
                return (
                    f"{step.key} needs the input error, which kronecker: sequences does not know: take kronecker: "
                    f"tokens, or leave {step.key} out"
                )
        return ""


@dataclass(frozen=True)
class KroneckerFactors:
    """The two factors of a group of outputs of a layer, with inputs x and gradients g of the loss at these outputs.

    Up to a factor, the Hessian of the divergence of the model's predictions is the mean of ``(g kron x)(g kron
    x)^T``, which is taken as ``H_O kron H_I``. YAQA finds H_O and H_I by power iteration. We take one half step of each
    from the identity, because every further step needs the gradients once more: ``H_O = sum |x|^2 g g^T`` and ``H_I =
    sum |g|^2 x x^T`` (`tokens`; `power` is the exponent of both squares). With the gradient ``G = sum g x^T`` of each
    window in place of single tokens, this is ``H_O = sum G G^T`` and ``H_I = sum G^T G`` (`sequences`), which the paper
    takes too. If the mean is an exact Kronecker product, these are its factors.

    - `outputs`: H_O, shape (outputs, outputs), fp32; damped, and the mean of its diagonal is 1 before that.
    - `inputs`: H_I, shape (in, in), fp32, whose diagonal has the mean 1. None for `tokens`: the second moments in which
      tokens count by the squares of the gradient are H_I.
    """

    outputs: Tensor
    inputs: Tensor | None = None

    def statistics(self, count: int) -> InputStatistics:
        """The statistics of an input of `count` tokens, from factors with `inputs`."""
        assert self.inputs is not None
        return InputStatistics(self.inputs * count, count, gradient_moments=self.outputs)


__all__ = ["Guided", "KroneckerFactors"]
