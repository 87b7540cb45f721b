"""Recipes: what to do, as data. Unknown keys are refused with the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from gyroquant.errors import RecipeError
from gyroquant.grids import Grid
from gyroquant.learning import Finish, Learn
from gyroquant.methods import Method
from gyroquant.models.sites import SITE_NAMES
from gyroquant.presets import find_recipe, grid_kind, plain, set_values, with_effort
from gyroquant.rounding import (
    Activations,
    Allocate,
    Ignore,
    KvCache,
    Refine,
    SignRound,
    Solver,
    Target,
    WeightBasis,
)
from gyroquant.rounding.base import ModelSolver
from gyroquant.rounding.stage import is_ignored

_STRICT = ConfigDict(extra="forbid", frozen=True)
_Seed = Annotated[int, Field(ge=0, lt=1 << 32)]


class Step(BaseModel):
    """One map at one site: the method that chooses it, and whether it must (or must not) run online."""

    model_config = _STRICT
    method: SerializeAsAny[Method]
    online: bool | None = None


class Override(BaseModel):
    """Another grid for some layers, named as in `ignore`."""

    model_config = _STRICT
    layers: Ignore
    grid: SerializeAsAny[Grid]


class Weights(BaseModel):
    """How weights are rounded: grid, solver and basis, what is refined and tuned after that, the layers to leave alone.

    `ignore` holds module names, whole or from a dot on, and regular expressions behind ``re:``. `overrides` give some
    layers other grids, the last that names a layer counts; `allocate` chooses every layer's bits. `true_sequential` is
    GPTQ's: layers of a block are observed when those in front of them in the block are rounded; where it is not given,
    it is so when drift is corrected, which would otherwise be corrected in every layer of a block anew. `correct_bias`
    takes the mean of what rounding changed in a block's output out of its last bias. With `measure` layers are observed
    for their output errors and limits, even where nothing else needs that.
    """

    model_config = _STRICT
    grid: SerializeAsAny[Grid]
    solver: SerializeAsAny[Solver]
    ignore: Ignore = ("lm_head",)
    basis: WeightBasis | None = None
    refine: Refine | None = None
    tune: SignRound | None = None
    target: Target | None = None
    overrides: tuple[Override, ...] = ()
    allocate: Allocate | None = None
    true_sequential: bool | None = None
    correct_bias: bool = False
    measure: bool = False

    @model_validator(mode="after")
    def _alone(self) -> Weights:
        if isinstance(self.solver, ModelSolver):
            others = [name for name in ("basis", "refine", "tune", "target", "allocate") if getattr(self, name)]
            if others:
                raise ValueError(f"{self.solver.name} rounds the whole model by itself: leave {', '.join(others)} out")
            if any(grid.grid != "integer" for grid in (self.grid, *(one.grid for one in self.overrides))):
                raise ValueError(f"{self.solver.name} rounds to integer grids alone")
        return self

    @model_validator(mode="after")
    def _one_aim(self) -> Weights:
        if self.target is not None and self.solver.needs_original:
            raise ValueError(f"the solver {self.solver.name} corrects drift by itself: leave target out, or take gptq")
        if self.allocate is not None and self.overrides:
            raise ValueError("allocate chooses the bits of every layer: leave overrides out, or allocate")
        if self.allocate is not None and self.grid.grid != "integer":
            raise ValueError(f"allocate chooses bits, of which the grid {self.grid.grid} has no choice")
        return self

    def grid_of(self, name: str) -> Grid:
        """The grid of a layer of this name."""
        return next((one.grid for one in reversed(self.overrides) if is_ignored(name, one.layers)), self.grid)

    @property
    def needs_statistics(self) -> bool:
        """Whether the model must be run on calibration text to round it so."""
        if self.solver.needs_statistics or self.needs_original or self.measure:
            return True
        if self.refine is not None or self.allocate is not None:
            return True
        return self.basis is not None and self.basis.needs_statistics

    @property
    def needs_original(self) -> bool:
        """Whether the unrounded model runs beside the rounded one."""
        return self.needs_drift or self.tune is not None or self.correct_bias

    @property
    def observes_in_turn(self) -> bool:
        """Whether the layers of a block are observed one after another, as they are rounded."""
        return self.needs_drift if self.true_sequential is None else self.true_sequential

    @property
    def needs_drift(self) -> bool:
        """Whether the inputs of the two are compared."""
        return self.solver.needs_original or self.target is not None


class Calibration(BaseModel):
    """The text that a model is observed on. `dtype` auto is bfloat16 where the processor multiplies it natively. With
    `add_bos` every window begins as the tokenizer begins a text, otherwise only the first one does.

    `inputs` are what a block is calibrated on: what the rounded blocks before it give, as GPTQ does, or what the
    original ones would, as in the parallel form of AdaQuant (arXiv 2006.10518): then blocks do not know of
    each other's errors, and can be rounded side by side.
    """

    model_config = _STRICT
    text: str | None = None
    nsamples: Annotated[int, Field(gt=0)] = 128
    seqlen: Annotated[int, Field(gt=1)] = 512
    seed: _Seed = 0
    add_bos: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    inputs: Literal["rounded", "original"] = "rounded"


class ProofSettings(BaseModel):
    """How the proof is made: on up to `nsamples` windows and `seqlen` tokens of each, refused above `threshold`."""

    model_config = _STRICT
    threshold: Annotated[float, Field(gt=0)] = 1e-4
    nsamples: Annotated[int, Field(gt=0)] = 2
    seqlen: Annotated[int, Field(gt=1)] = 256


class Recipe(BaseModel):
    """A whole run as data: transform, rounding of weights, activations and KV cache, last touch, calibration, proof."""

    model_config = _STRICT
    name: str = "custom"
    description: str = ""
    seed: _Seed = 0
    transform: dict[str, tuple[Step, ...]] = Field(default_factory=dict)
    learn: Learn | None = None
    weights: Weights
    activations: Activations | None = None
    kv_cache: KvCache | None = None
    finish: Finish | None = None
    calibration: Calibration = Field(default_factory=Calibration)
    proof: ProofSettings = Field(default_factory=ProofSettings)

    @model_validator(mode="after")
    def _learned_as_rounded(self) -> Recipe:
        if self.learn is not None and self.learn.round_weights and self.weights.basis is not None:
            raise ValueError("learn.round_weights rounds weights as they are, not in weights.basis: set it to false")
        return self

    @model_validator(mode="after")
    def _inputs_to_answer(self) -> Recipe:
        if self.calibration.inputs == "original" and self.weights.needs_drift:
            raise ValueError(
                f"calibration.inputs=original leaves weights.{'target' if self.weights.target else 'solver'} nothing "
                "to answer: inputs are what the unrounded model gives. Take inputs: rounded, or gptq without a target"
            )
        return self

    @field_validator("transform")
    @classmethod
    def _known_sites(cls, value: dict[str, tuple[Step, ...]]) -> dict[str, tuple[Step, ...]]:
        for name in value:
            _require_known(name, SITE_NAMES, "transform")
        return value

    @field_serializer("transform")
    def _flat(self, value: dict[str, tuple[Step, ...]]) -> dict[str, Any]:
        flat = {}
        for name, steps in value.items():
            dumped = [
                step.method.model_dump() | ({} if step.online is None else {"online": step.online}) for step in steps
            ]
            flat[name] = dumped[0] if len(dumped) == 1 else dumped
        return flat

    @property
    def rotates(self) -> bool:
        """Whether weights are rounded in another basis than their own; scales alone change none."""
        turned = any(step.method.structure != "diagonal" for steps in self.transform.values() for step in steps)
        return turned or self.weights.basis is not None

    @property
    def measures(self) -> bool:
        """Whether any method needs statistics of the model, or its weights."""
        return any(step.method.looks for steps in self.transform.values() for step in steps)

    @property
    def centers_keys(self) -> bool:
        """Whether the mean of the keys has to be measured."""
        return self.kv_cache is not None and self.kv_cache.center_keys

    @property
    def varies(self) -> bool:
        """Whether what is rounded depends on seeds: that of the recipe, or that which draws calibration windows."""
        calibrates = self.weights.needs_statistics or self.measures or self.centers_keys
        draws = any(step.method.random for steps in self.transform.values() for step in steps)
        return bool(calibrates or draws or self.learn or self.finish or isinstance(self.weights.solver, ModelSolver))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as it would be written in YAML; `parse` reads it back."""
        data = self.model_dump(mode="json")
        for section in ("weights", "activations", "kv_cache"):
            if data[section] is not None:
                data[section] = data[section].pop("grid") | data[section]
        if overrides := data["weights"].pop("overrides"):
            data["weights"]["overrides"] = [one.pop("grid") | one for one in overrides]
        return data


def _require_known(key: str, known: Iterable[str], where: str) -> None:
    known = list(known)
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        raise RecipeError(f"{where} has no key {key!r}; did you mean {close[0]!r}? Keys are {', '.join(known)}")


def _build(kinds: Mapping[str, type[Any]], tag: str, spec: Any, where: str) -> Any:
    """An object of a registered kind from its options; ``{tag: name, option: value}`` or the name alone."""
    options = {tag: spec} if isinstance(spec, str) else spec
    if not isinstance(options, dict) or not isinstance(options.get(tag), str):
        raise RecipeError(f"{where} needs {tag}: one of {', '.join(sorted(kinds))}")
    if options[tag] not in kinds:
        close = difflib.get_close_matches(options[tag], list(kinds), n=1, cutoff=0.0)
        raise RecipeError(
            f"{where}.{tag} is {options[tag]!r}; did you mean {close[0]!r}? There are {', '.join(sorted(kinds))}"
        )
    kind = kinds[options[tag]]
    for key in options:
        _require_known(key, kind.model_fields, where)
    return _validated(lambda: kind(**options), where, f" for {tag} {options[tag]}")


def _validated(make: Any, where: str, what: str = "") -> Any:
    try:
        return make()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join([where, *(str(part) for part in first["loc"])]).strip(".")
        given = f"{what} (given: {first['input']!r})" if first["loc"] else ""
        raise RecipeError(f"{place}: {first['msg'].removeprefix('Value error, ')}{given}") from error


def _steps(spec: Any, where: str) -> tuple[Step, ...]:
    steps = []
    for one in spec if isinstance(spec, list) else [spec]:
        options = {"method": one} if isinstance(one, str) else dict(one) if isinstance(one, dict) else {}
        online = options.pop("online", None)
        if online is not None and not isinstance(online, bool):
            raise RecipeError(f"{where}.online is true, false or left out, not {online!r}")
        steps.append(Step(method=_build(Method.kinds, "method", options, where), online=online))
    return tuple(steps)


_SECTIONS: dict[str, type[BaseModel]] = {
    "basis": WeightBasis,
    "refine": Refine,
    "tune": SignRound,
    "target": Target,
    "allocate": Allocate,
}
_PLAIN = ("ignore", "true_sequential", "correct_bias", "measure")


def _weights(spec: Any) -> Weights:
    if not isinstance(spec, dict):
        raise RecipeError("weights holds bits, group_size, symmetric, solver and so on")
    spec = dict(spec)
    solver = _build(Solver.kinds, "name", spec.pop("solver", "rtn"), "weights.solver")
    rest = {key: spec.pop(key) for key in _PLAIN if key in spec}
    for key, kind in _SECTIONS.items():
        if spec.get(key) is not None:
            rest[key] = _section(kind, spec[key], f"weights.{key}")
        spec.pop(key, None)
    overrides = spec.pop("overrides", None) or []
    grid = _grid(spec, {}, "weights", ["solver", "overrides", *_PLAIN, *_SECTIONS])
    if not isinstance(overrides, list):
        raise RecipeError("weights.overrides is a list such as [{layers: [down_proj], bits: 4}]")
    rest["overrides"] = tuple(_override(one, spec, f"weights.overrides.{i}") for i, one in enumerate(overrides))
    return _validated(lambda: Weights(grid=grid, solver=solver, **rest), "weights")


def _override(spec: Any, base: dict[str, Any], where: str) -> Override:
    """Another grid for some layers; what is not said is as for all others, if the grid is of the same kind."""
    if not isinstance(spec, dict) or "layers" not in spec:
        raise RecipeError(f"{where} needs layers and settings of a grid, such as {{layers: [down_proj], bits: 4}}")
    own = {key: value for key, value in spec.items() if key != "layers"}
    same = own.get("grid", base.get("grid", "integer")) == base.get("grid", "integer")
    grid = _grid((base if same else {}) | own, {}, where, ["layers"])
    return _validated(lambda: Override(layers=spec["layers"], grid=grid), where)


def _grid(spec: dict[str, Any], defaults: dict[str, Any], section: str, others: Iterable[str]) -> Grid:
    """A grid from the options of a section of the recipe; `others` are keys that the section has besides."""
    kind = grid_kind(spec) or Grid.kinds["integer"]
    where = f"{section} of grid {spec['grid']}" if "grid" in spec else section
    for key in spec:
        _require_known(key, [*kind.model_fields, *others], where)
    if kind is Grid.kinds["integer"]:
        spec = {"grid": "integer"} | defaults | spec
    return _build(Grid.kinds, "grid", spec, section)


_DYNAMIC = {"group_size": -1, "scale": "minmax"}  # one scale a token (and head), from the range of its numbers


def _dynamic(spec: Any, kind: type[Activations] | type[KvCache], where: str) -> Any:
    """The section of what is rounded while the model runs: the options of a grid and of `kind` side by side."""
    if not isinstance(spec, dict):
        raise RecipeError(f"{where} holds bits, group_size, symmetric and so on")
    own = [key for key in kind.model_fields if key != "grid"]
    rest = {key: value for key, value in spec.items() if key in own}
    grid = _grid({key: value for key, value in spec.items() if key not in own}, _DYNAMIC, where, own)
    return _validated(lambda: kind(grid=grid, **rest), where)


def _section(kind: type[BaseModel], spec: Any, where: str) -> Any:
    if not isinstance(spec, dict):
        raise RecipeError(f"{where} holds settings such as {', '.join(list(kind.model_fields)[:3])}, not {spec!r}")
    for key in spec:
        _require_known(str(key), kind.model_fields, where)
    return _validated(lambda: kind(**spec), where)


def parse(data: Any) -> Recipe:
    """A recipe from plain data, as YAML gives it. Raises RecipeError naming the key and the nearest valid one."""
    data = plain(data)
    if not isinstance(data, dict):
        raise RecipeError("a recipe is a mapping with keys such as transform and weights")
    for key in data:
        _require_known(str(key), Recipe.model_fields, "the recipe")
    if not isinstance(transform := data.get("transform") or {}, dict):
        raise RecipeError("transform maps sites to methods, for example {R1: {method: hadamard}}")
    for site in transform:
        _require_known(str(site), SITE_NAMES, "transform")
    built = dict(data) | {
        "transform": {site: _steps(spec, f"transform.{site}") for site, spec in transform.items() if spec is not None},
        "weights": _weights(data.get("weights") or {}),
    }
    for section, dynamic in (("activations", Activations), ("kv_cache", KvCache)):
        if data.get(section) is not None:
            built[section] = _dynamic(data[section], dynamic, section)
    for section, kind in (("calibration", Calibration), ("proof", ProofSettings), ("learn", Learn), ("finish", Finish)):
        if data.get(section) is not None:
            built[section] = _section(kind, data[section], section)
    return _validated(lambda: Recipe(**built), "")


def load_recipe(
    recipe: str | Path | Mapping[str, Any] | Recipe, changes: Iterable[str] = (), effort: str | None = None
) -> Recipe:
    """A recipe from a preset's name, a YAML file, plain data or a recipe, with ``KEY=VALUE`` changes made to it.

    `effort` is one of those that the recipe has under `efforts`: a name and the changes that it stands for, made before
    the others. Raises RecipeError for anything unknown, impossible or contradictory, naming the key and the nearest
    valid one.
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
