"""The section `weights.guided` of a recipe: second moments weighted by the gradient of the loss."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Guided(BaseModel):
    """Weights each calibration token by how much the loss depends on a layer's outputs there.

    Solvers minimize the error of a layer's outputs over the tokens, ``|X (W - Q)^T|^2``. With this section, each token
    counts by the mean square of the loss's gradient at the outputs, over a group of outputs (GuidedQuant, Kim et al.,
    arXiv 2505.07004). Every step that reads second moments then uses these: solver, target and refinement. The loss is
    that of labels drawn from the model's own predictions, and one backward pass over the calibration text finds the
    gradients.

    Options:

    - `groups`: groups of consecutive outputs of a layer, each with its own weights of tokens. Default 4.
    - `power`: the exponent of the weights: 1 (default) follows the loss, 0 counts all tokens equally.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    groups: Annotated[int, Field(gt=0, le=1024)] = 4
    power: Annotated[float, Field(gt=0, le=1)] = 1.0
