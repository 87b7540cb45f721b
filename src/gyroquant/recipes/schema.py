"""The models of recipes. They are read from YAML or made in Python.

Classes of methods, solvers and grids are looked up in their registries when a recipe is read (`fields`). All error
messages for recipes are made in `errors`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_serializer,
    model_validator,
)

from gyroquant.finetuning import Finetune, Learn
from gyroquant.grids import Grid, IntegerGrid
from gyroquant.methods import Method
from gyroquant.methods.leading import Leading
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.graph.sites import SITE_NAMES
from gyroquant.recipes.calibration import Calibration, ProofSettings, Seed
from gyroquant.recipes.compat import current
from gyroquant.recipes.errors import check_keys, refusal, refusal_at, translated
from gyroquant.recipes.fields import AnyGrid, AnyMethod, AnySolver, BesideGrid, Section, build
from gyroquant.recipes.overrides import set_values
from gyroquant.recipes.presets import find_recipe, with_effort
from gyroquant.recipes.yaml_reader import plain
from gyroquant.rounding import (
    Activations,
    Allocate,
    Guided,
    GumbelSoftmax,
    Ignore,
    KvCache,
    LowRank,
    Refine,
    SignRound,
    Target,
    WeightBasis,
)
from gyroquant.rounding.base import When
from gyroquant.rounding.layers import is_ignored
from gyroquant.rounding.solvers.rtn import RoundToNearest
from gyroquant.rounding.steps.base import LayerStep, StepOptions

_STRICT = ConfigDict(extra="forbid", frozen=True)


class Step(BaseModel):
    """One map at one site.

    - `method`: chooses the map.
    - `online` (None): true: the map must run with the model. false: it must be folded into weights. None: whichever
      the site allows. fallback: it runs with models into whose weights it cannot be folded.
    - `optional` (false): true: the map is left out, with a note, of a model that does not allow it.
    """

    model_config = _STRICT
    method: AnyMethod
    online: bool | Literal["fallback"] | None = None
    optional: bool = False


class Override(BaseModel):
    """Another grid for some layers.

    - `layers`: names as in `Weights.ignore`.
    - `grid`: their grid.
    """

    model_config = _STRICT
    layers: Ignore
    grid: AnyGrid


_OVERRIDE = BesideGrid("needs layers and settings of a grid, such as {layers: [down_proj], bits: 4}")


def _list_of_overrides(value: Any) -> Any:
    if not isinstance(value, (list, tuple)):
        raise refusal("is a list such as [{layers: [down_proj], bits: 4}]")
    return value


class Weights(StepOptions):
    """How weights are rounded. Steps run in this order: target, solver, refine, low_rank, tune, correct_bias.

    - `grid` (integer): the numbers to round to.
    - `solver` (rtn): rounds a layer, or the whole model.
    - `ignore` (lm_head): layers that are not rounded: module names, whole or the part after a dot, and regular
      expressions that begin with ``re:``.
    - `basis` (None): a basis in which weights are rounded. None: their own.
    - `refine` (None): improves codes and scales after the solver.
    - `tune` (None): tunes the rounded layers of a block together.
    - `gumbel` (None): learns their codes with Gumbel noise, before `tune`.
    - `target` (None): changes the weights that the solver rounds, to correct the input error.
    - `low_rank` (None): adds a low-rank branch to every rounded layer.
    - `guided` (None): weights the calibration tokens by the gradient of the loss.
    - `overrides` (none): other grids for some layers. If several name a layer, the last one counts.
    - `allocate` (None): chooses the bits of every layer.
    - `true_sequential` (None): true: the layers of a block are observed one after another, each after the layers before
      it are rounded (the term is GPTQ's). None: true if the input error is corrected, because layers that are observed
      at once would all correct the same error.
    - `correct_bias` (false): subtracts the mean output error of a block from its last bias.
    - `measure` (false): measures output errors and rate-distortion bounds even if nothing else needs statistics.
    - `bound` (true): reports how far each layer is from the rate-distortion bound. That takes the eigenvalues of second
      moments, which are most of the work for layers of tens of thousands of inputs.
    """

    grid: AnyGrid = Field(default_factory=IntegerGrid)
    solver: AnySolver = Field(default_factory=RoundToNearest)
    ignore: Ignore = ("lm_head",)
    basis: Section[WeightBasis] | None = None
    refine: Section[Refine] | None = None
    tune: Section[SignRound] | None = None
    gumbel: Section[GumbelSoftmax] | None = None
    target: Section[Target] | None = None
    low_rank: Section[LowRank] | None = None
    guided: Section[Guided] | None = None
    overrides: Annotated[tuple[Annotated[Override, _OVERRIDE], ...], BeforeValidator(_list_of_overrides)] = ()
    allocate: Section[Allocate] | None = None
    true_sequential: bool | None = None
    correct_bias: bool = False
    measure: bool = False
    bound: bool = True

    @model_validator(mode="after")
    def _steps_do_not_contradict(self) -> Weights:
        codes = [step.key for step in self.steps if step.when < When.CORRECT_BLOCK and step.key != self.solver.key]
        sections = [*codes, *(name for name in ("basis", "allocate", "guided") if getattr(self, name))]
        conflicts = [self.solver.conflicts(sections, (self.grid, *(override.grid for override in self.overrides)))]
        conflicts += [step.conflicts(self.solver) for step in self.steps if isinstance(step, LayerStep)]
        if self.refine is not None and self.tune is not None and self.tune.search_scales:
            conflicts.append("tune.search_scales rounds to nearest anew, which undoes refine: leave one of them out")
        for grid in (self.grid, *(override.grid for override in self.overrides)):
            if grid.real_zeros:
                conflicts.append(f"the grid {grid.grid} is for activations and the KV cache: take float_zero")
            conflicts += [step.grid_conflicts(grid) for step in self.steps if isinstance(step, LayerStep)]
            if not grid.coded_singly:
                single = [step.key for step in self.steps if step.needs_single_codes]
                single += ["guided"] if self.guided is not None and grid.tile_rows > 1 else []
                conflicts += [f"the grid {grid.grid} codes several weights together: leave {key} out" for key in single]
        for conflict in filter(None, conflicts):
            raise ValueError(conflict)
        return self

    @model_validator(mode="after")
    def _options_do_not_contradict(self) -> Weights:
        if self.allocate is not None and self.overrides:
            raise ValueError("allocate chooses the bits of every layer: leave overrides out, or allocate")
        if self.guided is not None and (problem := self.guided.problem(self.solver, self.layer_steps)):
            raise ValueError(problem)
        if self.allocate is not None and not self.grid.has_bit_widths:
            raise ValueError(
                f"allocate chooses bits, and the grid {self.grid.grid} has only one number of bits: leave allocate out"
            )
        return self

    @model_validator(mode="after")
    def _rows_do_not_contradict(self) -> Weights:
        if self.allocate is None or not self.allocate.by_rows:
            return self
        rows = "allocate with granularity: rows"
        if not isinstance(self.grid, IntegerGrid):
            raise ValueError(f"{rows} needs the grid integer, not {self.grid.grid}: take it, or granularity: layers")
        for key in ("low_rank", "gumbel"):
            if getattr(self, key) is not None:
                raise ValueError(f"{rows} cannot be combined with {key}: leave {key} out")
        if self.guided is not None and self.guided.kronecker is not None:
            raise ValueError(
                f"{rows} solves rows of different bits one after the other, and guided.kronecker needs them together: "
                "leave guided.kronecker out, or take granularity: layers"
            )
        return self

    def low_rank_bits(self, op: LinearOp) -> int:
        """The bits stored for the low-rank branch of a layer; 0 if it has none."""
        return 0 if self.low_rank is None else self.low_rank.bits(op)

    def grid_of(self, name: str) -> Grid:
        """The grid of a layer of this name."""
        return next((other.grid for other in reversed(self.overrides) if is_ignored(name, other.layers)), self.grid)

    @property
    def needs_statistics(self) -> bool:
        """Whether rounding needs the model to run on calibration text."""
        return self.observes_layers or self.needs_original

    @property
    def observes_layers(self) -> bool:
        """Whether the inputs of layers are observed: for a step that reads their second moments, or for `measure`."""
        if any(step.needs_statistics for step in self.steps) or self.needs_input_error or self.measure:
            return True
        return self.allocate is not None or (self.basis is not None and self.basis.needs_statistics)

    @property
    def observes_in_turn(self) -> bool:
        """Whether the layers of a block are observed one after another, as they are rounded."""
        return self.needs_input_error if self.true_sequential is None else self.true_sequential


class Embeddings(BaseModel):
    """How the table of embeddings is rounded, and with it a head that is tied to it.

    A tied table is rounded for its head, by the solver of the layers: nearly all of the error comes from there.

    - `grid`: the numbers to round to.
    """

    model_config = _STRICT
    grid: SerializeAsAny[Grid]


class Head(BaseModel):
    """How a head that is not tied to the embedding is rounded, whatever `weights.ignore` says of it.

    - `grid`: the numbers to round to.
    """

    model_config = _STRICT
    grid: SerializeAsAny[Grid]


def _read_step(value: Any) -> Any:
    """A step from a method's name, from its options with `online` and `optional` beside them, or from a method."""
    if isinstance(value, Step):
        return value
    if isinstance(value, Method):
        return Step(method=value)
    options = {"method": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    online = options.pop("online", None)
    if online not in (None, "fallback") and not isinstance(online, bool):
        raise refusal_at("online", f"is true, false, fallback or left out, not {online!r}", online)
    optional = options.pop("optional", False)
    if not isinstance(optional, bool):
        raise refusal_at("optional", f"is true or false, not {optional!r}", optional)
    method = options.get("method")
    if isinstance(method, Method) and len(options) == 1:
        return Step(method=method, online=online, optional=optional)
    return Step(method=build(Method.registry, "method", options), online=online, optional=optional)


def _read_steps(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else (_read_step(value),)


_Steps = Annotated[tuple[Annotated[Step, BeforeValidator(_read_step)], ...], BeforeValidator(_read_steps)]


def _read_transform(value: Any) -> Any:
    """The sites that have a method; a site set to null has none."""
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise refusal("maps sites to methods, for example {R1: {method: hadamard}}")
    check_keys(value, SITE_NAMES)
    return {site: steps for site, steps in value.items() if steps is not None}


class _FlatWeights(BesideGrid):
    """Marks the section of weights. An override only needs options that differ from the grid of the other layers."""

    def read(self, kind: type[BaseModel], value: Any) -> Any:
        """The section's own options, its grid, and overrides with all their options."""
        data = dict(super().read(kind, value or {}))
        overrides, base = data.get("overrides") or (), data["grid"] if "grid" in data else IntegerGrid()
        if isinstance(overrides, (list, tuple)) and isinstance(base, Grid):
            overrides = [_completed(override, base) for override in overrides]
        return data | {"overrides": overrides}


def _completed(override: Any, base: Grid) -> Any:
    """An override whose missing options are those of the grid for all layers, if it has the same kind of grid."""
    if not isinstance(override, Mapping) or override.get("grid", base.grid) != base.grid:
        return override
    return base.model_dump() | dict(override)


_DYNAMIC = BesideGrid(group_size=-1, scale="minmax")  # one scale a token (and head), from the range of its numbers


class Recipe(BaseModel):
    """A whole run as data.

    - `name` (custom) and `description` (empty): for people; they do not change the result.
    - `seed` (0): the seed of all random choices except that of calibration windows.
    - `transform` (none): the maps at each site, first to last.
    - `learn` (None): learns rotations and scales before anything is rounded.
    - `weights`: how weights are rounded.
    - `embeddings` (None): how the table of embeddings is rounded. None: it is not.
    - `head` (None): how a head that is not tied to the embedding is rounded. None: as `weights` says.
    - `keep_ties` (false): a head tied to the embedding stays so under a fused R1, at the cost of two online maps
      for each token. false: the head becomes a matrix of its own.
    - `activations` (None): how inputs of layers are rounded while the model runs.
    - `kv_cache` (None): how keys and values are rounded while the model runs.
    - `finetune` (None): tunes the rounded model end to end.
    - `calibration`: the calibration text.
    - `proof`: settings of the proof.
    """

    model_config = _STRICT
    name: str = "custom"
    description: str = ""
    seed: Seed = 0
    transform: Annotated[dict[str, _Steps], BeforeValidator(_read_transform)] = Field(default_factory=dict)
    learn: Section[Learn] | None = None
    weights: Annotated[Weights, _FlatWeights("holds bits, group_size, symmetric, solver and so on")] = Field(
        default_factory=Weights
    )
    embeddings: Annotated[Embeddings, BesideGrid()] | None = None
    head: Annotated[Head, BesideGrid()] | None = None
    keep_ties: bool = False
    activations: Annotated[Activations, _DYNAMIC] | None = None
    kv_cache: Annotated[KvCache, _DYNAMIC] | None = None
    finetune: Section[Finetune] | None = None
    calibration: Section[Calibration] = Field(default_factory=Calibration)
    proof: Section[ProofSettings] = Field(default_factory=ProofSettings)

    if TYPE_CHECKING:  # `transform` accepts more types than it holds, which its annotation cannot express

        def __init__(
            self,
            *,
            name: str = ...,
            description: str = ...,
            seed: int = ...,
            transform: Mapping[str, Method | Step | Sequence[Method | Step]] = ...,
            learn: Learn | None = ...,
            weights: Weights = ...,
            embeddings: Embeddings | None = ...,
            head: Head | None = ...,
            keep_ties: bool = ...,
            activations: Activations | None = ...,
            kv_cache: KvCache | None = ...,
            finetune: Finetune | None = ...,
            calibration: Calibration = ...,
            proof: ProofSettings = ...,
        ) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, Recipe):
            return data
        data = current(data)
        if not isinstance(data, Mapping):
            raise refusal("is a mapping with keys such as transform and weights")
        check_keys(data, tuple(cls.model_fields))
        return data

    @model_validator(mode="after")
    def _learned_as_rounded(self) -> Recipe:
        if self.learn is not None and self.learn.round_weights and self.weights.basis is not None:
            raise ValueError("learn.round_weights rounds weights as they are, not in weights.basis: set it to false")
        return self

    @model_validator(mode="after")
    def _input_error_exists(self) -> Recipe:
        if self.calibration.inputs == "original" and self.weights.needs_input_error:
            step = next(step for step in self.weights.steps if step.needs_original)
            raise ValueError(
                f"with calibration.inputs=original there is no input error for "
                f"weights.{step.key} to correct. Set calibration.inputs=rounded, "
                "or take the solver gptq without a target"
            )
        return self

    @model_validator(mode="after")
    def _something_leads(self) -> Recipe:
        sections = {"weights": self.weights, "activations": self.activations, "head": self.head}
        named = [name for name, section in sections.items() if section is not None and section.grid.leads]
        if any(other.grid.leads for other in self.weights.overrides):
            named.append("weights.overrides")
        if self.embeddings is not None and self.embeddings.grid.leads:
            raise ValueError("embeddings cannot have the grid leading: take integer")
        if named and not any(isinstance(steps[-1].method, Leading) for steps in self.transform.values() if steps):
            raise ValueError(
                f"{named[0]}.grid=leading gives more bits to directions that the method leading puts first: set "
                "transform.R1.method=leading, as the last map there"
            )
        return self

    @model_validator(mode="after")
    def _low_rank_fits(self) -> Recipe:
        branch, inputs = self.weights.low_rank, self.activations
        if branch is not None:
            others = {"embeddings": self.embeddings, "head": self.head, "weights.guided": self.weights.guided}
            sections = [name for name, section in others.items() if section is not None]
            rounded = inputs is not None and inputs.calibrate
            if problem := branch.problem(sections, rounded, self.weights.solver):
                raise ValueError(problem)
        return self

    @field_serializer("transform")
    def _flat(self, value: dict[str, tuple[Step, ...]]) -> dict[str, Any]:
        flat = {}
        for name, steps in value.items():
            dumped = [
                step.method.model_dump()
                | ({} if step.online is None else {"online": step.online})
                | ({"optional": True} if step.optional else {})
                for step in steps
            ]
            flat[name] = dumped[0] if len(dumped) == 1 else dumped
        return flat

    @property
    def rotates(self) -> bool:
        """Whether weights are rounded in another basis than their own. Scales alone do not change the basis."""
        turned = any(step.method.structure != "diagonal" for steps in self.transform.values() for step in steps)
        return turned or self.weights.basis is not None

    @property
    def measures(self) -> bool:
        """Whether a method needs statistics of the model, or its weights."""
        return any(step.method.looks for steps in self.transform.values() for step in steps)

    @property
    def centers_keys(self) -> bool:
        """Whether the mean of the keys is measured."""
        return self.kv_cache is not None and self.kv_cache.center_keys

    @property
    def varies(self) -> bool:
        """Whether the result depends on a seed: that of the recipe, or that of the choice of calibration windows."""
        calibrates = self.weights.needs_statistics or self.measures or self.centers_keys
        draws = any(step.method.random for steps in self.transform.values() for step in steps)
        rounds_randomly = any(step.random for step in self.weights.steps)
        return bool(calibrates or draws or self.learn or self.finetune or rounds_randomly)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as it would be written in YAML; `parse` reads it back.

        Settings that the last release did not have are left out where they have their defaults, so that its journals
        and the keys of its results stay valid.
        """
        weights = (data := self.model_dump(mode="json"))["weights"]
        new = [(data, key) for key in ("embeddings", "head", "keep_ties")]
        new += [(data["calibration"], "all_experts"), *((weights, key) for key in ("guided", "gumbel", "low_rank"))]
        if (guided := weights["guided"]) is not None and guided["kronecker"] is None:
            del guided["kronecker"], guided["damp_percent"]
        if weights["allocate"] is not None:
            for key, usual in (("costs", "measured"), ("granularity", "layers")):
                if weights["allocate"][key] == usual:
                    del weights["allocate"][key]
        later = {"tune": ("outliers", "search_scales"), "refine": ("tolerance",), "allocate": ("bytes", "embeddings")}
        new += [(weights[section], key) for section, keys in later.items() if weights[section] for key in keys]
        if data["kv_cache"] is not None:
            new += [(data["kv_cache"], key) for key in ("key_clip", "value_clip", "first_tokens", "last_tokens")]
        if weights["bound"]:
            del weights["bound"]
        for key in ("source", "choose", "candidates"):
            if data["calibration"][key] == Calibration.model_fields[key].default:
                del data["calibration"][key]
        for owner, key in new:
            if not owner[key]:
                del owner[key]
        for section in ("weights", "embeddings", "head", "activations", "kv_cache"):
            if data.get(section) is not None:
                data[section] = data[section].pop("grid") | data[section]
        if overrides := data["weights"].pop("overrides"):
            data["weights"]["overrides"] = [override.pop("grid") | override for override in overrides]
        return data


def parse(data: Any) -> Recipe:
    """A recipe from plain data, as YAML gives it. Raises RecipeError naming the key and the nearest valid one."""
    try:
        return Recipe.model_validate(plain(data))
    except ValidationError as error:
        raise translated(error) from error


def load_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe, changes: Iterable[str] = (), effort: str | None = None
) -> Recipe:
    """A recipe from a preset's name, a YAML file, plain data or a recipe, with ``KEY=VALUE`` changes.

    `effort` is the name of an effort in the recipe's `efforts`; its changes are made before `changes`. Raises
    RecipeError for unknown, impossible or contradictory options, naming the key and the nearest valid one.
    """
    implied: list[str] = []
    if isinstance(recipe, Recipe):
        data: Mapping[str, Any] = recipe.to_dict()
    elif isinstance(recipe, Mapping):
        data = recipe
    else:
        data, implied = find_recipe(str(recipe))
    data, more = with_effort(data, effort)
    return parse(set_values(data, [*more, *implied, *changes]))
