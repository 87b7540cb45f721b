"""The runs of a comparison. The key of a run is a digest of everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gyroquant.benchmark.external_tools import ExternalTool, Size
from gyroquant.benchmark.kinds import EXTERNAL_TOOL, RECIPE, Kind
from gyroquant.benchmark.sizes import LEAST_BUDGET, text
from gyroquant.errors import GyroquantError, InputError
from gyroquant.models.graph.model_graph import ModelGraph
from gyroquant.pipeline.planning import plan_all
from gyroquant.recipes.compat import previous
from gyroquant.recipes.presets import SIZED, has_effort, preset_names
from gyroquant.recipes.schema import Recipe, load_recipe
from gyroquant.recipes.size import parse_size

_DIGITS = 12
_BITS = (2, 3, 4)


@dataclass(frozen=True)
class Conditions:
    """The conditions that all runs of a comparison share.

    model: the fingerprint of the model's weights.
    calibration: the digest of the text's tokens, and seqlen.
    tests: window and number of windows, by the digest of the tokens. The name of a text does not count, nor does the
        number of windows that was requested of a shorter text.
    dtype: the dtype of evaluation.
    versions: versions of gyroquant, PyTorch and transformers.
    tasks: the number of questions of each task of lm-evaluation-harness (0: all), and the digest of the items of each
        offline task.

    Threads and processor are not among them, although they change the last digits of results, so that folders of
    several machines can be merged. Every result stores its own, and a comparison has a note if they differ.
    """

    model: str
    calibration: Mapping[str, Any]
    tests: Mapping[str, Mapping[str, Any]]
    dtype: str
    versions: Mapping[str, str]
    tasks: Mapping[str, int | str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The digest of the conditions."""
        return digest(vars(self))


@dataclass(frozen=True)
class Run:
    """One run, of one of our recipes or of an external tool.

    kind: RECIPE or EXTERNAL_TOOL.
    name: of the recipe, or "tool: variant".
    size: bits, group size and symmetry.
    seed: the seed of random numbers and of the calibration windows. All runs of a seed share these windows.
    settings: the whole recipe as data, or the variant of an external tool with its settings.
    command: the shell command that repeats the run. With the same number of threads it gives the same bytes. For an
        external tool it is set when the whole comparison is known.
    refusal: the reason if the run is not possible, else None.
    rotated: whether the run changes the basis in which weights are rounded.
    home: the repository of an external tool, else None.
    max_bytes: the budget of bytes that a recipe gets, else None. Its bits are then those that its choice starts from.
    candidate: whether the run is one of an external tool's settings, of which budgets of bytes take the largest that
        fits. It is no row of its own.
    key: the digest that names the result.
    """

    kind: Kind
    name: str
    size: Size
    seed: int
    settings: Mapping[str, Any]
    command: str = ""
    refusal: str | None = None
    rotated: bool = False
    home: str | None = None
    max_bytes: int | None = None
    candidate: bool = False
    key: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        """The readable name, without the seed."""
        group = "a row" if self.size.group_size == -1 else f"g{self.size.group_size}"
        budget = f"W{self.size.bits}" if self.max_bytes is None else text(self.max_bytes)
        return f"{self.name} {budget} {group}"

    @property
    def nsamples(self) -> int | None:
        """The number of calibration windows. None for a recipe that does not exist at this size."""
        return self.settings.get("calibration", self.settings).get("nsamples")

    def to_dict(self) -> dict[str, Any]:
        """The facts that a comparison stores of every run, with or without a result."""
        budget = {} if self.max_bytes is None else {"max_bytes": self.max_bytes}
        return budget | {
            "key": self.key,
            "kind": self.kind,
            "name": self.name,
            "label": self.label,
            "bits": self.size.bits,
            "group_size": self.size.group_size,
            "symmetric": self.size.symmetric,
            "seed": self.seed,
            "nsamples": self.nsamples,
            "command": self.command,
            "rotated": self.rotated,
            "home": self.home,
        }


def digest(data: Any) -> str:
    """The digest of plain data, in 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def with_key(run: Run, conditions: Conditions) -> Run:
    """The run with its key. The name and description of a recipe are not part of the key."""
    settings = {key: value for key, value in run.settings.items() if key not in ("name", "description")}
    if run.kind == RECIPE:
        settings = previous(settings)  # so that results of the last release are found again
    if run.kind == RECIPE and isinstance(own := settings.get("calibration"), Mapping):
        # The digests of tokens in the conditions depend on add_bos. Without it, results of releases that did not have
        # this option are found again.
        settings["calibration"] = {key: value for key, value in own.items() if key != "add_bos"}
    parts: dict[str, Any] = {"kind": run.kind, "settings": settings, "seed": run.seed}
    if run.kind == EXTERNAL_TOOL:
        parts |= {"name": run.name, "size": vars(run.size)}
    return replace(run, key=digest(parts | {"conditions": vars(conditions)}))


def with_keys(runs: Iterable[Run], conditions: Conditions) -> list[Run]:
    """The runs with their keys. Of several runs with the same key, only the first is kept."""
    by_key: dict[str, Run] = {}
    for run in runs:
        run = with_key(run, conditions)
        by_key.setdefault(run.key, run)
    return list(by_key.values())


@dataclass(frozen=True)
class ComparisonSpec:
    """The grid of a comparison: every recipe and external tool at every size and seed.

    recipes: names or files.
    external_tools: names, or name:variant. Default: none.
    bits: numbers of bits. Default 2, 3 and 4; none if there are sizes.
    sizes: budgets of bytes, as numbers or as text such as "50MB": every recipe and external tool gets at most so many
        for all of its weights. Default: none. With bits too, both are compared, each budget for itself.
    group_sizes: weights that share a scale; -1 is a whole row. Default 64.
    symmetric: grids without zero points. Default False.
    seeds: seeds of random numbers and calibration windows. A run that uses neither has the first seed only. Default 0.
    nsamples: calibration windows. Default 64.
    seqlen: tokens in a calibration window. Default 512.
    tasks: zero-shot tasks: "offline", some of its tasks, or tasks of lm-evaluation-harness. Default: none.
    task_limit: at most this many questions of each task. Default None: all, and 200 of each offline task.
    task_seed: the seed of the items of offline tasks. Default 0.
    task_text: the text to make items from. Default: Python's language reference.
    effort: "light" or "best", for recipes that have it. Default None.
    changes: changes to every recipe, KEY=VALUE, except to bits and seeds. Default: none.
    keep_activations: keep the rounding of activations and KV cache that recipes have. By default it is removed, because
        a comparison is about weights.
    add_bos: begin every window, for calibration and evaluation, with the tokenizer's BOS tokens. Default True.

    Raises InputError for values out of range.
    """

    recipes: Sequence[str]
    external_tools: Sequence[str] = ()
    bits: Sequence[int] | None = None
    sizes: Sequence[int | str] = ()
    group_sizes: Sequence[int] = (64,)
    symmetric: bool = False
    seeds: Sequence[int] = (0,)
    nsamples: int = 64
    seqlen: int = 512
    tasks: Sequence[str] = ()
    task_limit: int | None = None
    task_seed: int = 0
    task_text: str | None = None
    effort: str | None = None
    changes: Sequence[str] = ()
    keep_activations: bool = False
    add_bos: bool = True

    def __post_init__(self) -> None:
        if self.bits is None:
            object.__setattr__(self, "bits", () if self.sizes else _BITS)
        bits = self.bits or self.sizes
        for option, values in (("bits", bits), ("group-size", self.group_sizes), ("seeds", self.seeds)):
            if not values:
                raise InputError(f"--{option} is empty: give at least one value")
        object.__setattr__(self, "sizes", tuple(sorted({_bytes(size) for size in self.sizes})))
        if self.sizes:
            _check_free(self.changes)
        for option, value, least in (
            ("nsamples", self.nsamples, 1),
            ("seqlen", self.seqlen, 2),
            ("task-limit", self.task_limit, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"--{option} is {value}, and has to be at least {least}")
        seeds = [change for change in self.changes if change.partition("=")[0].strip() in ("seed", "calibration.seed")]
        if seeds:
            raise InputError(f"--set {seeds[0]}: all runs have the same seeds, use --seeds for their number")
        bos = [change for change in self.changes if change.partition("=")[0].strip() == "calibration.add_bos"]
        if bos:
            raise InputError(f"--set {bos[0]}: all runs have the same windows, use --no-bos for windows without BOS")

    @property
    def widths(self) -> list[int]:
        """The numbers of bits, the fewest first, because methods differ most there."""
        return sorted(set(self.bits or ()))

    @property
    def budgets(self) -> list[int]:
        """The budgets of bytes, the smallest first."""
        return [_bytes(size) for size in self.sizes]

    def grid(self) -> Iterator[Size]:
        """Every number of bits with every group size."""
        for bits in self.widths:
            for group_size in self.group_sizes:
                yield Size(bits, group_size, self.symmetric)


def _bytes(size: int | str) -> int:
    """The bytes of a budget. Raises InputError for what is no size, and for less than a thousand bytes."""
    try:
        found = parse_size(str(size))
    except InputError as error:
        raise InputError(f"--sizes: {error}") from error
    if found < LEAST_BUDGET:
        raise InputError(f"--sizes: {size!r} is {found} bytes, which no model has: give a unit, such as 60MB")
    return found


def _check_free(changes: Iterable[str]) -> None:
    """Raises InputError for a change of what budgets of bytes choose."""
    for change in changes:
        key = change.partition("=")[0].strip()
        if key in ("weights.bits", "weights.allocate", "weights.overrides") or key.startswith("weights.allocate."):
            raise InputError(f"--set {change}: --sizes chooses the bits of every layer, leave one of the two out")


def plan_runs(spec: ComparisonSpec, model: str, graph: ModelGraph, calibration: str) -> list[Run]:
    """All runs at numbers of bits. Those that are not possible have a refusal.

    `calibration`: the text that the commands name.

    Raises RecipeError or InputError for unknown names, for recipes and tools that have none of the requested sizes, for
    changes that give a recipe another size, and for two different recipes with the same name.
    """
    if spec.effort not in (None, "default") and not any(
        has_effort(preset, spec.effort)
        for name in spec.recipes
        for size in spec.grid()
        if (preset := preset_of(name, size.bits)[0]) is not None
    ):
        raise InputError(
            f"none of the recipes has the effort {spec.effort}: leave --effort out, or add the recipe gyro"
        )
    bits = ", ".join(map(str, spec.widths))
    sources: list[tuple[str, Run]] = []
    for name in spec.recipes:
        own = [run for size in spec.grid() for run in _recipe_runs(spec, name, size, model, graph, calibration)]
        if not own:
            raise InputError(f"the recipe {name} has a fixed size, which is not {bits} bits: leave the recipe out")
        sources += [(name, run) for run in own]
    check_names(sources)
    runs = [run for _, run in sources]
    for name in spec.external_tools:
        own = [run for size in spec.grid() for run in tool_runs(spec, name, size)]
        if not own:
            raise InputError(f"the external tool {name} has no type of {bits} bits: leave the tool out")
        runs += own
    return runs


def check_names(sources: Iterable[tuple[str, Run]]) -> None:
    """Raises InputError for recipes with the same name and different settings.

    The verdict would take them for seeds of one recipe, and test only one of them.
    """
    first: dict[tuple[str, Size, int | None], tuple[str, dict[str, Any]]] = {}
    for source, run in sources:
        if run.refusal:
            continue
        settings = {key: value for key, value in run.settings.items() if key not in ("seed", "name", "description")}
        settings["calibration"] = {**settings["calibration"], "seed": None}
        other, other_settings = first.setdefault((run.name, run.size, run.max_bytes), (source, settings))
        if settings != other_settings:
            raise InputError(
                f"the recipes {other} and {source} are both called {run.name!r}, and their settings differ: give one "
                "of them another `name:`"
            )


def _recipe_runs(
    spec: ComparisonSpec, name: str, size: Size, model: str, graph: ModelGraph, calibration: str
) -> Iterator[Run]:
    """The runs of one recipe at one size, one per seed. None if the recipe has another fixed size."""
    preset, fixed = preset_of(name, size.bits)
    if preset is None:
        return
    changes = [*own_changes(spec, preset, size, fixed), *spec.changes]
    effort = spec.effort if has_effort(preset, spec.effort) else None
    try:
        recipe = load_recipe(preset, changes, effort)
    except GyroquantError as error:
        load_recipe(preset)  # raises for an unknown name; a recipe that does not support the changes is a refused run
        yield Run(RECIPE, name, size, spec.seeds[0], {"recipe": preset, "changes": changes}, refusal=str(error))
        return
    if recipe.weights.grid.bits != size.bits:
        raise InputError(f"--set gives the recipe {name} {recipe.weights.grid.bits:g} bits: use --bits for that")
    size = Size(size.bits, recipe.weights.grid.group_size, bool(getattr(recipe.weights.grid, "symmetric", True)))
    source = Source(preset, effort, changes, model, calibration)
    yield from seeded_runs(spec, recipe, source, size, graph)


@dataclass(frozen=True)
class Source:
    """Where a recipe comes from, for the command that repeats a run.

    preset: its name or file.
    effort: its effort, or None.
    changes: the changes to it, KEY=VALUE.
    model, calibration: the model and the calibration text as the user named them.
    """

    preset: str
    effort: str | None
    changes: Sequence[str]
    model: str
    calibration: str

    def command(self, changes: Sequence[str]) -> str:
        """The shell command with these further changes."""
        words = ["gyroquant", "quantize", self.model, "OUT", "--recipe", self.preset, "--text", self.calibration]
        words += ["--effort", self.effort] if self.effort else []
        return shlex.join(words + [word for change in [*self.changes, *changes] for word in ("--set", change)])


def seeded_runs(
    spec: ComparisonSpec, recipe: Recipe, source: Source, size: Size, graph: ModelGraph, max_bytes: int | None = None
) -> Iterator[Run]:
    """The runs of a recipe at one size, one per seed; one only if it does not fit the model."""
    for seed in spec.seeds if recipe.varies else spec.seeds[:1]:
        own = [f"seed={seed}", f"calibration.seed={seed}"]  # all recipes have the same windows, not those of their YAML
        if recipe.calibration.add_bos != spec.add_bos:
            own.append(f"calibration.add_bos={str(spec.add_bos).lower()}")
        seeded = load_recipe(recipe, own)
        refusal = _refusal(graph, seeded)
        yield Run(
            RECIPE,
            seeded.name,
            size,
            seed,
            seeded.to_dict(),
            source.command(own),
            refusal,
            seeded.rotates,
            max_bytes=max_bytes,
        )
        if refusal:
            return  # the refusal is the same for all seeds


def preset_of(name: str, bits: int) -> tuple[str | None, bool]:
    """The recipe that a name stands for at a number of bits (or None), and whether it has a fixed size.

    A name with a size in it (gyro-w2, gsr-w3g64) has that size. The name of a family (gyro) stands for its member of
    these bits.
    """
    known = preset_names()
    if name not in known and any(preset.startswith(f"{name}-w") for preset in known):
        name = f"{name}-w{bits}"
        return (name, True) if name in known else (None, True)
    own = SIZED.match(name)
    if own and not name.endswith((".yaml", ".yml")):
        return (name if int(own["bits"]) == bits else None), True
    return name, False


def own_changes(spec: ComparisonSpec, preset: str, size: Size, fixed: bool) -> list[str]:
    """The changes of a recipe for a size. A recipe with a fixed size keeps its size and its amount of text."""
    if fixed:
        changes = []
    else:
        changes = [f"weights.bits={size.bits}", f"weights.group_size={size.group_size}"]
        if "symmetric" in type(load_recipe(preset).weights.grid).model_fields:
            changes.append(f"weights.symmetric={str(size.symmetric).lower()}")
        changes += [f"calibration.nsamples={spec.nsamples}", f"calibration.seqlen={spec.seqlen}"]
    return changes if spec.keep_activations else [*changes, *_weights_only(load_recipe(preset))]


def _weights_only(recipe: Recipe) -> list[str]:
    """The changes that remove the rounding of activations and cache from a recipe. Rotations are then learned for
    rounded weights.
    """
    changes = [f"{name}=null" for name in ("activations", "kv_cache") if getattr(recipe, name) is not None]
    if changes and recipe.learn is not None and recipe.learn.rounds:
        changes.append("learn.round_weights=true")
    return changes


def _refusal(graph: ModelGraph, recipe: Recipe) -> str | None:
    """The reason why a recipe does not fit a model. None if it fits."""
    try:
        plan_all(graph, recipe)
    except GyroquantError as error:
        return str(error)
    return None


def _without_symmetric(variant: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of a variant with a fixed symmetry, without that entry. None for other variants."""
    return {key: value for key, value in variant.items() if key != "symmetric"} if "symmetric" in variant else None


def tool_runs(spec: ComparisonSpec, name: str, size: Size) -> Iterator[Run]:
    """The runs of an external tool at one size, of every variant. ``name:variant`` selects one variant.

    A variant with a fixed group size or fixed symmetry has a run of that size. If another variant does the same, there
    is one run only.
    """
    name, _, only = name.partition(":")
    tool = ExternalTool.registry.find(name)()
    if only and only not in tool.variants:
        raise InputError(f"{name} has no variant {only!r}; use {', '.join(tool.variants)}")
    for variant in [only] if only else tool.variants:
        own = tool.variants[variant]
        if not only and size.symmetric and _without_symmetric(own) in tool.variants.values():
            continue  # the other variant is symmetric as well
        if own.get("bits", size.bits) != size.bits:
            continue  # a type of another size
        real = Size(size.bits, own.get("block", size.group_size), own.get("symmetric", size.symmetric))
        settings = {"variant": variant, **own, "nsamples": spec.nsamples, "requirements": list(tool.requirements)}
        run = Run(EXTERNAL_TOOL, f"{name}: {variant}", real, spec.seeds[0], settings, home=tool.home)
        run = replace(run, refusal=tool.problem(variant, real) or None, rotated=tool.rotates(variant))
        for seed in spec.seeds if tool.varies(variant) and not run.refusal else spec.seeds[:1]:
            yield replace(run, seed=seed)
