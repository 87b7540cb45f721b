"""Base classes of the steps around a solver: on one layer, or on a block whose layers are rounded."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, SerializeAsAny, model_validator
from torch import Tensor

from gyroquant.calibration.stream import Stream
from gyroquant.errors import RecipeError
from gyroquant.grids import Grid
from gyroquant.models.execution.low_rank import LowRankBranch, branches
from gyroquant.models.graph.model_graph import Group
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.registry import Registry
from gyroquant.rounding.base import RoundingStep, Solver, When
from gyroquant.system.progress import Advance


class LayerStep(RoundingStep):
    """A step that a recipe may add to its solver. Subclasses register themselves under their `key`.

    A recipe adds it under that key of `weights`, with its options, or with `true` if it has none.
    """

    registry: ClassVar[Registry[type[LayerStep]]] = Registry("step", "gyroquant.rounding.steps", error=RecipeError)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        if not inspect.isabstract(cls):
            LayerStep.registry.add(cls.key, cls)

    @classmethod
    def of(cls, setting: Any) -> LayerStep | None:
        """The step for a setting of a recipe. The setting is the step, its options, or true; null and false give None.

        Raises ValueError for any other setting.
        """
        if setting is None or setting is False:
            return None
        if not cls.model_fields and setting not in (True, {}) and not isinstance(setting, cls):
            raise ValueError(f"{cls.key} has no options: it is true or false, not {setting!r}")
        return cls() if setting is True else cls.model_validate(setting)

    def conflicts(self, solver: Solver) -> str:
        """The reason why it cannot be combined with a solver; empty if it can."""
        return ""

    def grid_conflicts(self, grid: Grid) -> str:
        """The reason why it cannot change codes of a grid; empty if it can. `needs_single_codes` is checked besides."""
        return ""


@dataclass(frozen=True)
class RoundedBlock:
    """A block whose layers are rounded: the input of a step on blocks.

    - `index`: the number of the block.
    - `group`: its operations.
    - `tensors`: its folded parameters before rounding.
    - `layers`: its rounded layers, by the name of their weight.
    - `plain`: its other parameters, in the dtype of the output.
    - `stream`: the calibration text at its input. None if the recipe needs no text.
    - `seed`: the seed of this block.
    - `residual_multiplier`: the factor on a sublayer's output before it is added to the residual stream.
    - `progress`: called for every step of work.
    - `checkpoint`: a file for the state of long work, from which the work continues after an interruption.
    """

    index: int
    group: Group
    tensors: Mapping[str, Tensor]
    layers: Mapping[str, RoundedLayer]
    plain: Mapping[str, Tensor]
    stream: Stream | None
    seed: int = 0
    residual_multiplier: float = 1.0
    progress: Advance = lambda: None
    checkpoint: Path | None = None

    @property
    def deployed(self) -> dict[str, Tensor]:
        """All its parameters as they will be deployed; rounded ones are decoded, fp32. `branches` run beside them."""
        return {**self.plain, **{name: layer.param for name, layer in self.layers.items()}}

    @property
    def branches(self) -> list[LowRankBranch]:
        """The low-rank branches of its rounded layers, which run with it."""
        return branches(self.layers.values())

    @property
    def text(self) -> Stream:
        """The calibration text at its input."""
        assert self.stream is not None, "a recipe with a step on blocks needs calibration text"
        return self.stream

    def run(self, weights: Mapping[str, Tensor], hidden: Tensor, sequences: Sequence[int]) -> Tensor:
        """The block's output, differentiable. Input and output are hidden states, shape (sequences, length, hidden).

        `sequences` are the numbers of the sequences. There must be a power of two of them and at most `text.batch`.
        """
        return self.text.few(self.index, weights, hidden, sequences)

    def mean_error(self) -> Tensor:
        """The mean over tokens of the unrounded output minus that of the deployed block, shape (hidden,), fp64."""
        return self.text.mean_error(self.index, self.deployed, self.progress)


class BlockStep(LayerStep):
    """A step on a block whose layers are all rounded."""

    needs_block = True

    @abstractmethod
    def apply_block(self, block: RoundedBlock) -> RoundedBlock:
        """The block after this step. It is called without gradients, with the online operations attached."""

    @property
    def iterations(self) -> int:
        """The number of equal iterations for one block. Each reports progress once."""
        return 0

    @property
    def passes(self) -> int:
        """How many times it runs the whole calibration text through a block."""
        return 0

    def held_bytes(self, weights: int) -> int:
        """The bytes that it holds for a block with so many rounded weights, if it holds more than copies of them."""
        return 0

    def with_iterations(self, count: int) -> BlockStep:
        """The same step with another number of iterations. The dry run measures time with few iterations."""
        return self


class StepOptions(BaseModel):
    """The part of a recipe's `weights` that lists the steps: the solver, and one key for each other step.

    Steps of other packages do not need a field here: every key of `LayerStep.registry` is accepted.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, SerializeAsAny[LayerStep] | None]

    solver: SerializeAsAny[Solver]

    @model_validator(mode="before")
    @classmethod
    def _registered(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        extra = {key: value for key, value in data.items() if key not in cls.model_fields}
        steps = {key: LayerStep.registry.find(key, "weights").of(value) for key, value in extra.items()}
        return {**data, **steps}

    @property
    def steps(self) -> tuple[RoundingStep, ...]:
        """The solver and the other steps of the recipe, in the order in which they run."""
        chosen = (kind.of(getattr(self, key, None)) for key, kind in LayerStep.registry.items())
        return tuple(sorted((self.solver, *(step for step in chosen if step)), key=lambda step: step.when))

    @property
    def layer_steps(self) -> tuple[RoundingStep, ...]:
        """The steps on one layer."""
        return tuple(step.for_layers() for step in self.steps if step.when < When.TUNE_BLOCK)

    @property
    def block_steps(self) -> tuple[BlockStep, ...]:
        """The steps on a block whose layers are rounded."""
        return tuple(step for step in self.steps if isinstance(step, BlockStep))

    @property
    def needs_input_error(self) -> bool:
        """Whether a step needs the difference between a layer's inputs in the rounded and the unrounded model."""
        return any(step.needs_original for step in self.steps)

    @property
    def needs_input_error_second_moments(self) -> bool:
        """Whether a step also needs the second moments of that difference."""
        return any(step.needs_input_error_second_moments for step in self.steps)

    @property
    def needs_rounding_errors(self) -> bool:
        """Whether a step needs what rounding changes in a layer's input (activation rounding)."""
        return any(step.needs_rounding_errors for step in self.steps)

    @property
    def needs_original(self) -> bool:
        """Whether the unrounded model runs beside the rounded one."""
        return self.needs_input_error or any(step.needs_block for step in self.steps)
