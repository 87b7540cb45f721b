"""The section of a recipe that says how rotations are learned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Objective = Literal["cross_entropy", "kl", "kurtosis", "weights"]


class Learn(BaseModel):
    """Learns the last map of each of `sites`, starting from the one that the recipe puts there.

    A block-diagonal start stays block-diagonal, with blocks that part ways; any other becomes a full matrix.
    Objectives: `cross_entropy` of the rounded model on the text (SpinQuant, arXiv 2405.16406), `kl` of it from the
    original, `kurtosis` of what enters the layers, towards a uniform distribution's (KurTail, arXiv 2503.01483),
    `weights`, the fourth powers of the rotated weights (OptRot, arXiv 2512.24124; needs no text). The first two hold
    the whole model in memory, the others a block. `lr` is the length of a step where the gradient's own scale does not
    limit it further. `round_weights` is whether the model that is looked at has rounded weights; by default only when
    the recipe rounds to nearest, since a solver that comes later repairs much of what would be learned to be avoided.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    sites: tuple[Literal["R1", "R2"], ...] = ("R1", "R2")
    objective: Objective = "cross_entropy"
    steps: Annotated[int, Field(gt=0)] = 100
    lr: Annotated[float, Field(gt=0)] = 1.5
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_size: Annotated[int, Field(gt=0)] = 8
    round_weights: bool | None = None
    checkpoint_every: Annotated[int, Field(gt=0)] = 5
