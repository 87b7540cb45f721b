"""The cells of a comparison: one run each, named by everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gyroquant.errors import GyroquantError, InputError
from gyroquant.job import plan_all
from gyroquant.models.graph import ModelGraph
from gyroquant.opponents import Opponent, Size
from gyroquant.presets import SIZED, has_effort, preset_names
from gyroquant.recipe import Recipe, load_recipe

_DIGITS = 12


@dataclass(frozen=True)
class Conditions:
    """What is the same for all cells of a comparison: fingerprints of model and tokens, evaluation, versions.

    `calibration` has the digest of the text's tokens, and seqlen; `tests`, by the digest of the tokens that are
    measured on, the window and the number of windows: what texts are called does not count, nor how many windows a
    shorter text was asked for. `tasks` are those of lm-evaluation-harness, with the number of questions of each
    (0: all).

    Threads and processor do not count, though results differ by them in their last digits: folders that several
    machines have filled are to be merged. Every result keeps its own, and a comparison says where they differ.
    """

    model: str
    calibration: Mapping[str, Any]
    tests: Mapping[str, Mapping[str, Any]]
    dtype: str
    versions: Mapping[str, str]
    tasks: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What they are called."""
        return digest(vars(self))


@dataclass(frozen=True)
class Cell:
    """One run: of one of our recipes, or of another program.

    `settings` is the whole recipe as data, or a variant of an opponent with its settings. `command` makes it again,
    with as many threads the same bytes; an opponent's is told once the whole comparison is known. `seed` is that of
    what a recipe or a program draws, and of the calibration windows, which are everybody's of that seed. A cell with a
    `refusal` can not be run, and says why. `rotated` is whether it changes the basis that weights are rounded in,
    `home` where another program is to be had.
    """

    kind: Literal["recipe", "opponent"]
    name: str
    size: Size
    seed: int
    settings: Mapping[str, Any]
    command: str = ""
    refusal: str | None = None
    rotated: bool = False
    home: str | None = None
    key: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        """What people call it, whatever its seed."""
        group = "a row" if self.size.group_size == -1 else f"g{self.size.group_size}"
        return f"{self.name} W{self.size.bits} {group}"

    @property
    def nsamples(self) -> int | None:
        """How many windows it calibrates on; None for a recipe that cannot be had at this size."""
        return self.settings.get("calibration", self.settings).get("nsamples")

    def to_dict(self) -> dict[str, Any]:
        """What a comparison says of the cell, whatever came of it."""
        return {
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
    """The name that plain data gives to a result."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def named(cell: Cell, conditions: Conditions) -> Cell:
    """The cell with its key. Names and descriptions do not count, only what is done."""
    done = {key: value for key, value in cell.settings.items() if key not in ("name", "description")}
    if cell.kind == "recipe" and isinstance(own := done.get("calibration"), Mapping):
        # the tokens among the conditions tell it, and results from before there was a choice are found again
        done["calibration"] = {key: value for key, value in own.items() if key != "add_bos"}
    what: dict[str, Any] = {"kind": cell.kind, "settings": done, "seed": cell.seed}
    if cell.kind == "opponent":
        what |= {"name": cell.name, "size": vars(cell.size)}
    return replace(cell, key=digest(what | {"conditions": vars(conditions)}))


def all_named(cells: Iterable[Cell], conditions: Conditions) -> list[Cell]:
    """Cells with their keys. What does the same under two names is there once, under the first."""
    once: dict[str, Cell] = {}
    for cell in cells:
        cell = named(cell, conditions)
        once.setdefault(cell.key, cell)
    return list(once.values())


@dataclass(frozen=True)
class Wanted:
    """The grid of a comparison: what is crossed with what.

    `changes` are made to every recipe, though not of its bits or seeds; `keep_activations` leaves recipes the rounding
    of activations and KV cache that they have, which is otherwise taken out: a comparison is about weights. What
    neither draws nor calibrates has the first of the `seeds` only. With `add_bos` every window, to calibrate or to
    measure on, begins with the special tokens that the tokenizer puts in front of a text.
    """

    recipes: Sequence[str]
    opponents: Sequence[str] = ()
    bits: Sequence[int] = (2, 3, 4)
    group_sizes: Sequence[int] = (64,)
    symmetric: bool = False
    seeds: Sequence[int] = (0,)
    nsamples: int = 64
    seqlen: int = 512
    tasks: Sequence[str] = ()
    task_limit: int | None = None
    effort: str | None = None
    changes: Sequence[str] = ()
    keep_activations: bool = False
    add_bos: bool = True

    def __post_init__(self) -> None:
        for option, values in (("bits", self.bits), ("group-size", self.group_sizes), ("seeds", self.seeds)):
            if not values:
                raise InputError(f"--{option} names none: give at least one")
        for option, value, least in (
            ("nsamples", self.nsamples, 1),
            ("seqlen", self.seqlen, 2),
            ("task-limit", self.task_limit, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"--{option} is {value}, and has to be at least {least}")
        drawn = [change for change in self.changes if change.partition("=")[0].strip() in ("seed", "calibration.seed")]
        if drawn:
            raise InputError(f"--set {drawn[0]}: seeds are everybody's, and --seeds says how many")
        begun = [change for change in self.changes if change.partition("=")[0].strip() == "calibration.add_bos"]
        if begun:
            raise InputError(f"--set {begun[0]}: windows are everybody's, and --no-bos says how they begin")

    def sizes(self) -> Iterator[Size]:
        """All sizes, the fewest bits first: there methods differ most."""
        for bits in sorted(set(self.bits)):
            for group_size in self.group_sizes:
                yield Size(bits, group_size, self.symmetric)


def grid(wanted: Wanted, model: str, graph: ModelGraph, calibration: str) -> list[Cell]:
    """All cells, those that cannot be run with their refusal; `calibration` is the text that commands name.

    Raises RecipeError or InputError for names that there are not, for what is none of the sizes that are asked for, for
    changes that make another size of a recipe, and for two recipes of one name.
    """
    if wanted.effort not in (None, "default") and not any(
        has_effort(preset, wanted.effort)
        for name in wanted.recipes
        for size in wanted.sizes()
        if (preset := _preset(name, size.bits)[0]) is not None
    ):
        raise InputError(f"none of the recipes has the effort {wanted.effort}: leave it out, or add gyro")
    bits = ", ".join(map(str, wanted.bits))
    sources: list[tuple[str, Cell]] = []
    for name in wanted.recipes:
        own = [one for size in wanted.sizes() for one in _recipe_cells(wanted, name, size, model, graph, calibration)]
        if not own:
            raise InputError(f"the recipe {name} has a size of its own, and is none of {bits} bits: leave it out")
        sources += [(name, one) for one in own]
    _check_names(sources)
    cells = [cell for _, cell in sources]
    for name in wanted.opponents:
        own = [one for size in wanted.sizes() for one in _opponent_cells(wanted, name, size)]
        if not own:
            raise InputError(f"the opponent {name} has sizes of its own, and none of {bits} bits: leave it out")
        cells += own
    return cells


def _check_names(sources: Iterable[tuple[str, Cell]]) -> None:
    """Refuses recipes of one name that do not do the same: they would be taken for seeds of each other, and all but
    one of them never be judged.
    """
    first: dict[tuple[str, Size], tuple[str, dict[str, Any]]] = {}
    for source, cell in sources:
        if cell.refusal:
            continue
        done = {key: value for key, value in cell.settings.items() if key not in ("seed", "name", "description")}
        done["calibration"] = {**done["calibration"], "seed": None}
        other, theirs = first.setdefault((cell.name, cell.size), (source, done))
        if done != theirs:
            raise InputError(
                f"the recipes {other} and {source} are both called {cell.name!r}, and their settings differ: give one "
                "of them another `name:`"
            )


def _recipe_cells(
    wanted: Wanted, name: str, size: Size, model: str, graph: ModelGraph, calibration: str
) -> Iterator[Cell]:
    """The cells of one recipe at one size, one a seed; none where its own size is another."""
    preset, fixed = _preset(name, size.bits)
    if preset is None:
        return
    changes = [*_changes(wanted, preset, size, fixed), *wanted.changes]
    effort = wanted.effort if has_effort(preset, wanted.effort) else None
    try:
        recipe = load_recipe(preset, changes, effort)
    except GyroquantError as error:
        load_recipe(preset)  # a name that there is not is an error; one that cannot be changed so is an answer
        yield Cell("recipe", name, size, wanted.seeds[0], {"recipe": preset, "changes": changes}, refusal=str(error))
        return
    if recipe.weights.grid.bits != size.bits:
        raise InputError(f"--set gives the recipe {name} {recipe.weights.grid.bits:g} bits: ask for that by --bits")
    size = Size(size.bits, recipe.weights.grid.group_size, bool(getattr(recipe.weights.grid, "symmetric", True)))
    for seed in wanted.seeds if recipe.varies else wanted.seeds[:1]:
        own = [f"seed={seed}", f"calibration.seed={seed}"]  # everybody has the same windows, whatever a recipe says
        if recipe.calibration.add_bos != wanted.add_bos:
            own.append(f"calibration.add_bos={str(wanted.add_bos).lower()}")
        seeded = load_recipe(recipe, own)
        command = shlex.join(_command(model, preset, effort, calibration, [*changes, *own]))
        refusal = _refusal(graph, seeded)
        yield Cell("recipe", seeded.name, size, seed, seeded.to_dict(), command, refusal, seeded.rotates)
        if refusal:
            return  # the same for all seeds


def _preset(name: str, bits: int) -> tuple[str | None, bool]:
    """The recipe that a name stands for at a number of bits, None for none, and whether its size is its own.

    A name with a size in it (gyro-w2, gsr-w3g64) has that one; a family's name (gyro) stands for its member of the
    size.
    """
    known = preset_names()
    if name not in known and any(one.startswith(f"{name}-w") for one in known):
        name = f"{name}-w{bits}"
        return (name, True) if name in known else (None, True)
    own = SIZED.match(name)
    if own and not name.endswith((".yaml", ".yml")):
        return (name if int(own["bits"]) == bits else None), True
    return name, False


def _changes(wanted: Wanted, preset: str, size: Size, fixed: bool) -> list[str]:
    """What is changed of a recipe for a size; one with a size of its own keeps that, and its amount of text."""
    if fixed:
        changes = []
    else:
        changes = [f"weights.bits={size.bits}", f"weights.group_size={size.group_size}"]
        changes += [f"weights.symmetric={str(size.symmetric).lower()}", f"calibration.nsamples={wanted.nsamples}"]
        changes.append(f"calibration.seqlen={wanted.seqlen}")
    return changes if wanted.keep_activations else [*changes, *_weights_only(load_recipe(preset))]


def _weights_only(recipe: Recipe) -> list[str]:
    """What takes the rounding of activations and cache out of a recipe; rotations are then learned for weights."""
    changes = [f"{name}=null" for name in ("activations", "kv_cache") if getattr(recipe, name) is not None]
    if changes and recipe.learn is not None and recipe.learn.rounds:
        changes.append("learn.round_weights=true")
    return changes


def _refusal(graph: ModelGraph, recipe: Recipe) -> str | None:
    """Why a recipe does not fit a model, if it does not."""
    try:
        plan_all(graph, recipe)
    except GyroquantError as error:
        return str(error)
    return None


def _command(model: str, preset: str, effort: str | None, text: str, changes: Sequence[str]) -> list[str]:
    words = ["gyroquant", "quantize", model, "OUT", "--recipe", preset, "--text", text]
    words += ["--effort", effort] if effort else []
    return words + [word for change in changes for word in ("--set", change)]


def _without_symmetric(variant: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a variant that is always symmetric is otherwise; None for one that is not."""
    return {key: value for key, value in variant.items() if key != "symmetric"} if "symmetric" in variant else None


def _opponent_cells(wanted: Wanted, name: str, size: Size) -> Iterator[Cell]:
    """The cells of another program at one size, of every variant; ``name:variant`` asks for one of them.

    A variant with groups of its own, or with grids that are symmetric whatever is asked for, is of that size; where
    that is what another variant does, it is there once.
    """
    name, _, only = name.partition(":")
    if name not in Opponent.kinds:
        raise InputError(f"there is no opponent {name!r}; there are {', '.join(sorted(Opponent.kinds))}")
    opponent = Opponent.kinds[name]()
    if only and only not in opponent.variants:
        raise InputError(f"{name} has no variant {only!r}; there are {', '.join(opponent.variants)}")
    for variant in [only] if only else opponent.variants:
        own = opponent.variants[variant]
        if not only and size.symmetric and _without_symmetric(own) in opponent.variants.values():
            continue  # the other one is symmetric as well
        if own.get("bits", size.bits) != size.bits:
            continue  # a type of another size
        real = Size(size.bits, own.get("block", size.group_size), own.get("symmetric", size.symmetric))
        settings = {"variant": variant, **own, "nsamples": wanted.nsamples, "requirements": list(opponent.requirements)}
        cell = Cell("opponent", f"{name}: {variant}", real, wanted.seeds[0], settings, home=opponent.home)
        cell = replace(cell, refusal=opponent.problem(variant, real) or None, rotated=opponent.rotates(variant))
        for seed in wanted.seeds if opponent.varies(variant) and not cell.refusal else wanted.seeds[:1]:
            yield replace(cell, seed=seed)
