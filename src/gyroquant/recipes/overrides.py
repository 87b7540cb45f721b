"""Changes to a recipe's data: ``--set KEY=VALUE``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from gyroquant.errors import RecipeError
from gyroquant.grids import Grid
from gyroquant.recipes.compat import current, current_change
from gyroquant.recipes.yaml_reader import load_yaml, plain

DEFAULT_GRID = "integer"
"""The grid of a section that does not name one."""


def set_values(data: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """A copy of plain recipe data with ``path.to.key=value`` changes. Values are YAML; ``null`` switches a section off.

    A change of ``weights.grid`` drops the settings of the old grid that the new one cannot have, unless the changes
    themselves set them. Old names of keys are accepted, with a warning. Raises RecipeError for a change without a key
    or a value, and for a path through something that is not a mapping.
    """
    out: dict[str, Any] = current(plain(data))
    changes, before = [current_change(change) for change in changes], out.get("weights")
    old = grid_kind(before) if isinstance(before, dict) else None
    for change in changes:
        _set(out, change)
    if old is not None and out["weights"] is before:
        _forget_grid(before, old, {change.partition("=")[0].removeprefix("weights.") for change in changes})
    return out


def _set(data: dict[str, Any], change: str) -> None:
    """Makes one change in place."""
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set takes KEY=VALUE, for example weights.bits=2, not {change!r}")
    value = load_yaml(text, f"the value of --set {change[:80]!r}")
    *parents, last = path.split(".")
    place = data
    for parent in parents:
        inner = place.get(parent)
        if inner is None:
            inner = {}
        elif isinstance(inner, str):  # the short form of a solver or a method
            inner = {"name" if parent == "solver" else "method": inner}
        elif not isinstance(inner, dict):
            raise RecipeError(f"--set {change!r}: {parent} is not a mapping; write the recipe to a file instead")
        place[parent] = inner
        place = inner
    place[last] = value


def grid_kind(section: Mapping[str, Any]) -> type[Grid] | None:
    """The class of a section's grid; None if no grid has that name."""
    name = section.get("grid", DEFAULT_GRID)
    return Grid.registry.get(name) if isinstance(name, str) else None


def _forget_grid(weights: dict[str, Any], old: type[Grid], changed: set[str]) -> None:
    """Drops the options of the old grid from `weights` that the new one cannot have, except `changed` keys."""
    new = grid_kind(weights)
    if new in (old, None):
        return
    for key in [key for key in old.model_fields if key in weights and key != "grid" and key not in changed]:
        if key not in new.model_fields or not _accepts(new, key, weights[key]):
            del weights[key]


def _accepts(kind: type[Grid], key: str, value: Any) -> bool:
    """Whether a grid of this kind accepts this value of an option, regardless of its other options."""
    try:
        kind(**{key: value})
    except ValidationError as error:
        return all(detail["loc"] != (key,) for detail in error.errors())
    return True
