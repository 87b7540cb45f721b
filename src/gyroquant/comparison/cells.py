"""The cells of a comparison: one run each, named by everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
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
    """What is the same for all cells of a comparison: fingerprints of model and texts, evaluation, versions.

    `calibration` has the text's sha256, nsamples, seqlen and seed; `tests` by name the text's sha256, window and number
    of windows. `tasks` are those of lm-evaluation-harness, with the number of questions of each (0: all).
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

    `settings` is the whole recipe as data, or a variant of an opponent with its settings. A cell with a `refusal` can
    not be run, and says why. `rotated` is whether a recipe changes the basis that weights are rounded in.
    """

    kind: Literal["recipe", "opponent"]
    name: str
    size: Size
    seed: int
    settings: Mapping[str, Any]
    command: str = ""
    refusal: str | None = None
    rotated: bool = False
    key: str = field(default="", compare=False)

    @property
    def label(self) -> str:
        """What people call it, whatever its seed."""
        group = "a row" if self.size.group_size == -1 else f"g{self.size.group_size}"
        return f"{self.name} W{self.size.bits} {group}"

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
            "command": self.command,
            "rotated": self.rotated,
        }


def digest(data: Any) -> str:
    """The name that plain data gives to a result."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:_DIGITS]


def named(cell: Cell, conditions: Conditions) -> Cell:
    """The cell with its key. Names and descriptions do not count, only what is done."""
    done = {key: value for key, value in cell.settings.items() if key not in ("name", "description")}
    what: dict[str, Any] = {"kind": cell.kind, "settings": done, "seed": cell.seed}
    if cell.kind == "opponent":
        what |= {"name": cell.name, "size": vars(cell.size)}
    return replace(cell, key=digest(what | {"conditions": vars(conditions)}))


@dataclass(frozen=True)
class Wanted:
    """The grid of a comparison: what is crossed with what.

    `changes` are made to every recipe; `keep_activations` leaves recipes the rounding of activations and KV cache that
    they have, which is otherwise taken out: a comparison is about weights.
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

    def sizes(self) -> Iterator[Size]:
        """All sizes, the fewest bits first: there methods differ most."""
        for bits in sorted(set(self.bits)):
            for group_size in self.group_sizes:
                yield Size(bits, group_size, self.symmetric)


def grid(wanted: Wanted, model: str, graph: ModelGraph) -> list[Cell]:
    """All cells, each once, those that cannot be run with their refusal.

    Raises RecipeError or InputError for names that there are not.
    """
    cells: list[Cell] = []
    if wanted.effort not in (None, "default") and not any(
        has_effort(preset, wanted.effort)
        for name in wanted.recipes
        for size in wanted.sizes()
        if (preset := _preset(name, size.bits)[0]) is not None
    ):
        raise InputError(f"none of the recipes has the effort {wanted.effort}: leave it out, or add gyro")
    for name in wanted.recipes:
        own = [one for size in wanted.sizes() for one in _recipe_cells(wanted, name, size, model, graph)]
        if not own:
            bits = ", ".join(map(str, wanted.bits))
            raise InputError(f"the recipe {name} has a size of its own, and is none of {bits} bits: leave it out")
        cells += own
    for name in wanted.opponents:
        for size in wanted.sizes():
            cells += _opponent_cells(name, size, wanted.nsamples)
    once: dict[str, Cell] = {}
    for cell in cells:
        once.setdefault(digest([cell.kind, cell.name, vars(cell.size), cell.seed, dict(cell.settings)]), cell)
    return list(once.values())


def _recipe_cells(wanted: Wanted, name: str, size: Size, model: str, graph: ModelGraph) -> Iterator[Cell]:
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
        yield Cell("recipe", name, size, 0, {"recipe": preset, "changes": changes}, refusal=str(error))
        return
    size = Size(size.bits, recipe.weights.grid.group_size, bool(getattr(recipe.weights.grid, "symmetric", True)))
    for seed in wanted.seeds if recipe.random else wanted.seeds[:1]:
        seeded = load_recipe(recipe, [f"seed={seed}"])
        command = shlex.join(_command(model, preset, effort, [*changes, f"seed={seed}"]))
        yield Cell(
            "recipe", seeded.name, size, seed, seeded.to_dict(), command, _refusal(graph, seeded), seeded.rotates
        )


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


def _command(model: str, preset: str, effort: str | None, changes: Sequence[str]) -> list[str]:
    words = ["gyroquant", "quantize", model, "OUT", "--recipe", preset, "--text", "TEXT"]
    words += ["--effort", effort] if effort else []
    return words + [word for change in changes for word in ("--set", change)]


def _opponent_cells(name: str, size: Size, nsamples: int) -> Iterator[Cell]:
    """The cells of another program at one size, one a variant; ``name:variant`` asks for one of them."""
    name, _, only = name.partition(":")
    if name not in Opponent.kinds:
        raise InputError(f"there is no opponent {name!r}; there are {', '.join(sorted(Opponent.kinds))}")
    opponent = Opponent.kinds[name]()
    if only and only not in opponent.variants:
        raise InputError(f"{name} has no variant {only!r}; there are {', '.join(opponent.variants)}")
    for variant in [only] if only else opponent.variants:
        if opponent.variants[variant].get("bits", size.bits) != size.bits:
            continue  # a type of another size
        settings = {"variant": variant, **opponent.variants[variant], "nsamples": nsamples}
        settings["requirements"] = list(opponent.requirements)
        refusal = opponent.problem(variant, size) or None
        yield Cell("opponent", f"{name}: {variant}", size, 0, settings, opponent.home, refusal)
