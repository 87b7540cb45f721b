"""The section `learn` of a recipe: the options for learning rotations and scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gyroquant.errors import RecipeError
from gyroquant.models.graph.sites import SITES
from gyroquant.registry import Registry, unknown

LEARNABLE = tuple(kind.name for kind in SITES.values() if kind.learnable)
ROTATIONS = tuple(kind.name for kind in SITES.values() if kind.stored_rotation)
if TYPE_CHECKING:
    Site = str
else:
    Site = Literal[LEARNABLE]
OBJECTIVES: Registry[Any] = Registry("objective", "gyroquant.finetuning", error=RecipeError)
"""The objectives by name: subclasses of `Loss` in the module `objectives`."""


class Learn(BaseModel):
    """Learns the last fused map of each of `sites`, starting from the map that the recipe puts there.

    The kind of the map determines what is learned:

    - A block-diagonal rotation stays block-diagonal. Its blocks may become different from each other.
    - A butterfly stays a butterfly. Its angles are learned (ButterflyQuant, arXiv 2509.09679).
    - Any other rotation becomes a full matrix.
    - A diagonal map stays a set of scales (OSTQuant, arXiv 2501.13987), before layers (`attn_in`, `mlp_in`, `R4`) or on
      R2.

    Options:
        sites: where to learn; default R1 and R2.
        objective: the loss to minimize; default `cross_entropy`.
            `cross_entropy`: of the rounded model on the text (SpinQuant, arXiv 2405.16406). Memory holds the model.
            `kl`: the divergence of the rounded model from the original. Memory holds the model.
            `blocks`: the output error of each rounded block on the original's inputs. Memory holds one block.
            `kurtosis`: the distance of the kurtosis of layer inputs from that of a uniform distribution (KurTail,
                arXiv 2503.01483).
            `weights`: the fourth powers of the rotated weights (OptRot, arXiv 2512.24124). Needs no text.
        steps: the number of steps; default 100.
        lr: the longest step of a rotation; default 1.5. Steps are shorter where the gradient is large.
        adam_lr: the step of angles and of the logarithms of scales; default 0.01.
        top: with `kl`, the number of the original's most likely tokens to compare; default all.
        schedule: how the length of steps decreases; default `cosine`.
        momentum: the momentum of the steps of rotations; default 0.
        batch_size: sequences in each step; default 8.
        gradient: how gradients pass rounding; default `straight`.
            `straight`: as if nothing were rounded (SpinQuant).
            `scaled_ste`: as if noise were added that grows with the range of the rounded group.
        round_weights: whether weights are rounded while maps are learned; default: only if the recipe rounds to
            nearest. A later solver corrects much of the error that maps would learn to avoid.
        checkpoint_every: steps between saved states; default 5.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    sites: tuple[Site, ...] = ROTATIONS
    objective: str = "cross_entropy"
    steps: Annotated[int, Field(gt=0, le=1_000_000)] = 100
    lr: Annotated[float, Field(gt=0)] = 1.5
    adam_lr: Annotated[float, Field(gt=0)] = 0.01
    top: Annotated[int, Field(gt=1)] | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    batch_size: Annotated[int, Field(gt=0)] = 8
    gradient: Literal["straight", "scaled_ste"] = "straight"
    round_weights: bool | None = None
    checkpoint_every: Annotated[int, Field(gt=0)] = 5

    @property
    def rounds(self) -> bool:
        """Whether the objective depends on rounding."""
        return bool(OBJECTIVES[self.objective].rounds)

    @model_validator(mode="after")
    def _measurable(self) -> Learn:
        if self.objective not in OBJECTIVES:
            raise ValueError(unknown("objective", self.objective, OBJECTIVES))
        kind = OBJECTIVES[self.objective]
        others = [site for site in self.sites if kind.sites and site not in kind.sites]
        if others:
            raise ValueError(
                f"{self.objective} is measured at {' and '.join(kind.sites)}, not at {', '.join(others)}: choose kl or "
                "cross_entropy"
            )
        if self.top is not None and not kind.takes_top:
            raise ValueError("top is an option of the objective kl; leave top out, or set objective: kl")
        if self.gradient == "scaled_ste" and not self.rounds:
            raise ValueError(
                f"gradient: scaled_ste applies to rounding, and the objective {self.objective} does not round; leave "
                "gradient out"
            )
        return self
