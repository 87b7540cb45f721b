"""The runs of a comparison at equal bytes: every recipe, and every external tool, within each budget of bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gyroquant.benchmark.external_tools import ExternalTool, Size
from gyroquant.benchmark.kinds import RECIPE
from gyroquant.benchmark.runs import (
    ComparisonSpec,
    Run,
    Source,
    check_names,
    own_changes,
    preset_of,
    seeded_runs,
    tool_runs,
)
from gyroquant.benchmark.sizes import enough, text
from gyroquant.errors import GyroquantError, InputError
from gyroquant.models.stores.base import WeightStore
from gyroquant.pipeline.job import planned
from gyroquant.pipeline.sizes import PRESET_BITS, preset_bits, smallest_bytes
from gyroquant.recipes.presets import SIZED, has_effort, preset_names
from gyroquant.recipes.schema import Recipe, load_recipe
from gyroquant.recipes.size import with_size

_TABLE_BITS = range(8, 1, -1)
_TOOL_BITS = range(2, 9)
_MORE = 2  # bits that a table starts with above those of the layers, as in our own recipes
_GROUP = 64  # weights of a table's group, if the layers have whole rows
_WINDOWS = 16  # of the backward pass that finds out what bits are worth, as in our own recipes


@dataclass(frozen=True)
class SizedTool:
    """An external tool within budgets of bytes.

    name: as the user wrote it, with or without a variant.
    runs: its settings that may fit: those of which the largest within a budget is taken.
    least: a lower bound of the bytes of every setting that it supports, by label. Computed from the bits of its codes,
        and from those that it leaves embedding and head with.
    problem: why it supports nothing, if so. Else empty.
    """

    name: str
    runs: tuple[Run, ...]
    least: dict[str, int]
    problem: str = ""


def plan_sized_runs(spec: ComparisonSpec, model: str, store: WeightStore, calibration: str) -> list[Run]:
    """The runs of all recipes within every budget of bytes. Those that cannot be so small have a refusal that names the
    smallest size.

    Each recipe gets bits for layers, embeddings and heads from `weights.allocate.bytes`. One that leaves embeddings in
    16 bits gets sections for them, and `keep_ties` if its maps untie the head. One whose grid has no bits to choose
    gets the most bits for embeddings and heads that fit.

    `calibration`: the text that the commands name. Raises RecipeError or InputError for unknown names, for two
    different recipes with the same name, and for a budget that no recipe can keep.
    """
    if spec.effort not in (None, "default") and not any(
        has_effort(preset, spec.effort) for name in spec.recipes for preset, _, _ in _starts(name, max(PRESET_BITS))
    ):
        raise InputError(
            f"none of the recipes has the effort {spec.effort}: leave --effort out, or add the recipe gyro"
        )
    sources: list[tuple[str, Run]] = []
    for budget in spec.budgets:
        sizes, fits = [], False
        for name in spec.recipes:
            for group_size in spec.group_sizes:
                fit = _fit(spec, name, group_size, budget, store)
                sources += [(name, run) for run in _runs(spec, fit, budget, model, store, calibration)]
                fits |= not fit.problem
                sizes += [(fit.smallest, name)] if fit.smallest else []
        if not fits and sizes:
            smallest, name = min(sizes)
            raise InputError(
                f"--sizes: no recipe takes as little as {text(budget)}. The smallest size that is possible is "
                f"{enough(smallest)}, of {name}: give at least that"
            )
    check_names(sources)
    return [run for _, run in sources]


@dataclass(frozen=True)
class _Fit:
    """A recipe within a budget.

    recipe: as it fits, or None. preset, effort, changes: what makes it of a preset. size: what its choice starts from.
    smallest: the fewest bytes that it can take, if it does not fit.
    problem: why it does not fit. Empty if it does.
    """

    name: str
    preset: str
    effort: str | None
    changes: Sequence[str]
    size: Size
    recipe: Recipe | None = None
    smallest: int = 0
    problem: str = ""


def _runs(
    spec: ComparisonSpec, fit: _Fit, budget: int, model: str, store: WeightStore, calibration: str
) -> Iterator[Run]:
    """The runs of a recipe within a budget, one per seed, or one with a refusal."""
    if fit.recipe is None:
        settings = {"recipe": fit.preset, "changes": list(fit.changes), "max_bytes": budget}
        yield Run(RECIPE, fit.name, fit.size, spec.seeds[0], settings, refusal=fit.problem, max_bytes=budget)
        return
    source = Source(fit.preset, fit.effort, fit.changes, model, calibration)
    yield from seeded_runs(spec, fit.recipe, source, fit.size, store.graph, budget)


def _fit(spec: ComparisonSpec, name: str, group_size: int, budget: int, store: WeightStore) -> _Fit:
    """A recipe within a budget, from the most bits that its weights have on average there, downwards."""
    refused: list[_Fit] = []
    for preset, bits, fixed in _starts(name, preset_bits(store, budget)):
        size = Size(bits or PRESET_BITS[-1], group_size, spec.symmetric)
        changes = own_changes(spec, preset, size, fixed)
        if bits is None:  # the bits and groups of the recipe itself
            changes = [change for change in changes if not change.startswith("weights.")]
        effort = spec.effort if has_effort(preset, spec.effort) else None
        changes += spec.changes
        try:
            recipe = load_recipe(preset, changes, effort)
        except GyroquantError as error:
            load_recipe(preset)  # raises for an unknown name
            refused.append(_Fit(name, preset, effort, changes, size, problem=str(error)))
            continue
        grid = recipe.weights.grid
        size = Size(int(grid.bits), grid.group_size, bool(getattr(grid, "symmetric", True)))
        own = _Fit(recipe.name or name, preset, effort, changes, size)
        for tables in _tables(recipe, size, store):
            fit = _sized(own, recipe, tables, budget, store)
            if not fit.problem:
                return fit
            refused.append(fit)
    sized = [fit for fit in refused if fit.smallest]
    return min(sized, key=lambda fit: fit.smallest) if sized else refused[0]


def _starts(name: str, most: int) -> Iterator[tuple[str, int | None, bool]]:
    """What a name stands for: a preset or file, its bits, and whether it keeps its size. None: the recipe's own bits.

    A family (gyro) stands for its members, and a recipe without a size for itself at 2, 3 and 4 bits, from `most` bits
    downwards, and with its own bits and groups at last. A name with a size in it has that size.
    """
    sized = SIZED.match(name)
    if sized and not name.endswith((".yaml", ".yml")):
        yield name, int(sized["bits"]), True
        return
    family = False
    for bits in sorted((bits for bits in PRESET_BITS if bits <= most), reverse=True):
        preset, fixed = preset_of(name, bits)
        family |= fixed
        if preset is not None and (not fixed or preset in preset_names()):
            yield preset, bits, fixed
    if not family:
        yield name, None, False


def _tables(recipe: Recipe, size: Size, store: WeightStore) -> Iterator[dict[str, Any]]:
    """Settings for embeddings and heads that a recipe may have, the best first: its own, if it rounds them."""
    if recipe.embeddings is not None:
        yield {}
        return
    bits = min(size.bits + _MORE, max(_TABLE_BITS))
    turned = any(step.online is not True for step in recipe.transform.get("R1", ()))
    group = size.group_size if size.group_size > 0 else _GROUP
    if turned or store.graph.hidden % group:  # a scale a row suffices for rotated rows
        grid = {"bits": bits, "group_size": -1, "symmetric": True, "midrise": True, "scale": "mse"}
    else:
        grid = {"bits": bits, "group_size": group, "symmetric": False, "scale": "mse"}
    rounded = {"embeddings": grid, "head": grid}
    if turned and store.graph.tied and not recipe.keep_ties:
        yield rounded | {"keep_ties": True}
    yield rounded
    yield {}


def _sized(own: _Fit, recipe: Recipe, tables: dict[str, Any], budget: int, store: WeightStore) -> _Fit:
    """The recipe with these settings for embeddings and heads within a budget, if it fits."""
    changes = [f"{key}={json.dumps(value)}" for key, value in tables.items()]
    try:
        rounded = load_recipe(recipe, changes)
        allocated = _allocated(rounded, budget)
        smallest, _ = smallest_bytes(planned(store, load_recipe(rounded, [allocated])))
        if smallest <= budget:
            changes = [*changes, allocated]
            return replace(own, recipe=load_recipe(recipe, changes), changes=[*own.changes, *changes])
    except GyroquantError as error:
        return _fixed(own, recipe, changes, budget, store, str(error))
    return _too_large(own, smallest, budget)


def _too_large(own: _Fit, smallest: int, budget: int) -> _Fit:
    problem = f"it cannot take as little as {text(budget)}: its smallest size is {enough(smallest)}"
    return replace(own, smallest=smallest, problem=problem)


def _allocated(recipe: Recipe, budget: int) -> str:
    """The change that gives a recipe bits for a budget, as `gyroquant quantize --size` gives them.

    A recipe that chooses no bits by itself finds out what they are worth from one backward pass. Raises RecipeError if
    its grid has no bits to choose.
    """
    settings = with_size(recipe, budget).to_dict()["weights"]["allocate"]
    if recipe.weights.allocate is None:
        settings |= {"costs": "gradient", "nsamples": min(_WINDOWS, recipe.calibration.nsamples)}
    given = {key: value for key, value in settings.items() if value is not None}
    return f"weights.allocate={json.dumps(given)}"


def _fixed(own: _Fit, recipe: Recipe, changes: Sequence[str], budget: int, store: WeightStore, problem: str) -> _Fit:
    """The recipe with the bits that its layers have, and the most bits for embeddings and heads that fit.

    problem: why it cannot choose bits. It stands if the recipe does not fit the model either.
    """
    smallest = 0
    for bits in _TABLE_BITS if changes else (None,):
        more = [*changes, *([] if bits is None else [f"embeddings.bits={bits}", f"head.bits={bits}"])]
        try:
            fitting = load_recipe(recipe, more)
            smallest, _ = smallest_bytes(planned(store, fitting))
        except GyroquantError:
            continue
        if smallest <= budget:
            return replace(own, recipe=fitting, changes=[*own.changes, *more])
    return _too_large(own, smallest, budget) if smallest else replace(own, problem=problem)


def plan_sized_tools(spec: ComparisonSpec, store: WeightStore) -> list[SizedTool]:
    """The external tools within the budgets of bytes: their settings of 2 to 8 bits that are not too large for certain.

    They run with the first seed only. Raises InputError for unknown names.
    """
    found, first = [], replace(spec, seeds=spec.seeds[:1])
    for name in spec.external_tools if spec.budgets else ():
        tool = ExternalTool.registry.find(name.partition(":")[0])
        sizes = [Size(bits, group, spec.symmetric) for bits in _TOOL_BITS for group in spec.group_sizes]
        settings = {(run.name, run.size): run for size in sizes for run in tool_runs(first, name, size)}
        able = [replace(run, candidate=True) for run in settings.values() if not run.refusal]
        least = {run.label: _least_bytes(store, run.size.bits, tool.outside_bits) for run in able}
        runs = tuple(run for run in able if least[run.label] <= max(spec.budgets))
        refusals = [run.refusal or "" for run in settings.values()]
        found.append(SizedTool(name, runs, least, "" if able else next(iter(refusals), "it has no settings")))
    return found


def _least_bytes(store: WeightStore, bits: int, outside_bits: float) -> int:
    """A lower bound of the bytes of a tool's files: codes of the layers, and everything else at its fewest bits."""
    layers = sum(op.numel for op in store.graph.block_linears)
    return int((layers * bits + (store.weights - layers) * outside_bits) / 8)


__all__ = ["SizedTool", "plan_sized_runs", "plan_sized_tools"]
