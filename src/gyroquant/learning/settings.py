"""The section of a recipe that says how rotations are learned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Site = Literal["R1", "R2", "attn_in", "mlp_in", "R4"]
Objective = Literal["cross_entropy", "kl", "blocks", "kurtosis", "weights"]


class Learn(BaseModel):
    """Learns the last fused map of each of `sites`, starting from the one that the recipe puts there.

    A rotation that starts block-diagonal stays so, with blocks that part ways; any other becomes a full matrix.
    Butterflies stay butterflies, with their angles learned (ButterflyQuant, arXiv 2509.09679). A diagonal start is a
    set of scales (OSTQuant, arXiv 2501.13987), in front of layers (`attn_in`, `mlp_in`, `R4`) or on R2. Objectives:
    `cross_entropy` of the rounded model on the text (SpinQuant, arXiv 2405.16406), `kl` of it from the original (with
    `top`, among that many of the original's likeliest tokens), `blocks`, the error of each rounded block's output on
    the original's inputs, `kurtosis` of what enters the layers, towards a uniform distribution's (KurTail, arXiv
    2503.01483), `weights`, the fourth powers of the rotated weights (OptRot, arXiv 2512.24124; needs no text). The
    first two hold the whole model in memory, the others a block. `lr` is the length of a rotation's step where the
    gradient's own scale does not limit it further, `adam_lr` that of angles and of the logarithms of scales.
    `gradient` says what rounding is to gradients: `straight`, nothing (as SpinQuant has it), or noise that grows with
    the `spans` of what is rounded. `round_weights` is whether the model that is looked at has rounded weights; by
    default only when the recipe rounds to nearest, since a solver that comes later repairs much of what would be
    learned to be avoided.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    sites: tuple[Site, ...] = ("R1", "R2")
    objective: Objective = "cross_entropy"
    steps: Annotated[int, Field(gt=0, le=1_000_000)] = 100
    lr: Annotated[float, Field(gt=0)] = 1.5
    adam_lr: Annotated[float, Field(gt=0)] = 0.01
    top: Annotated[int, Field(gt=1)] | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_size: Annotated[int, Field(gt=0)] = 8
    gradient: Literal["straight", "spans"] = "straight"
    round_weights: bool | None = None
    checkpoint_every: Annotated[int, Field(gt=0)] = 5

    @property
    def rounds(self) -> bool:
        """Whether the objective looks at what rounding does."""
        return self.objective in ("cross_entropy", "kl", "blocks")

    @model_validator(mode="after")
    def _measurable(self) -> Learn:
        others = [site for site in self.sites if site not in ("R1", "R2")]
        if self.objective == "kurtosis" and others:
            raise ValueError(
                f"kurtosis is measured at R1 and R2, not at {', '.join(others)}: choose kl or cross_entropy"
            )
        if self.top is not None and self.objective != "kl":
            raise ValueError("top is an option of the objective kl")
        if self.gradient == "spans" and not self.rounds:
            raise ValueError(f"gradient is about rounding, which the objective {self.objective} does not look at")
        return self
