"""Finds recipes: presets of the package, by name, and YAML files, with their efforts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from gyroquant.errors import RecipeError
from gyroquant.recipes.yaml_reader import load_mapping, read_mapping
from gyroquant.registry import nearest


def preset_names() -> tuple[str, ...]:
    """The names of the recipes that come with the package."""
    return tuple(sorted(p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml")))


def _presets() -> Any:
    return resources.files("gyroquant.recipes") / "presets"


SIZED = re.compile(
    r"^(?P<name>.+?)-w(?P<bits>\d)(?:a(?P<activations>\d{1,2}))?(?:kv(?P<cache>\d{1,2}))?(?:g(?P<group>\d+))?$", re.I
)
"""A recipe's name that ends in bits and group size, such as gsr-w2g64 or quarot-w4a4kv4."""

_SIZES = {
    "bits": "weights.bits",
    "group": "weights.group_size",
    "activations": "activations.bits",
    "cache": "kv_cache.bits",
}
"""The option that each number of such a name sets."""


def find_recipe(name: str) -> tuple[dict[str, Any], list[str]]:
    """The data of a recipe, and the changes for bits and group size at the end of its name.

    Raises RecipeError if the name does not exist or the file cannot be read.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return {"name": path.stem} | read_mapping(path), []
    known = preset_names()
    if name in known:
        return {"name": name} | load_mapping((_presets() / f"{name}.yaml").read_text(encoding="utf-8"), name), []
    sized = SIZED.match(name)
    if sized and sized["name"] in known:
        changes = [_size(option, sized[number]) for number, option in _SIZES.items() if sized[number]]
        return find_recipe(sized["name"])[0] | {"name": name}, changes
    raise RecipeError(
        f"no recipe is called {name!r}; did you mean {nearest(name, known)!r}? Presets are {', '.join(known)}. Each "
        "name may end in bits and group size (gsr-w2g64, quarot-w4a4kv4). A file's name ends in .yaml"
    )


def _size(option: str, number: str) -> str:
    """The change for a number in a recipe's name. 16 means not rounded, as in W4A16."""
    section = option.partition(".")[0]
    return f"{section}=null" if number == "16" and section != "weights" else f"{option}={number}"


def with_effort(data: Mapping[str, Any], effort: str | None) -> tuple[dict[str, Any], list[str]]:
    """A recipe's data without its `efforts`, and the changes of one of them. `default` has no changes.

    Raises RecipeError for an effort that the recipe does not have.
    """
    data = dict(data)
    efforts = data.pop("efforts", None) or {}
    if not isinstance(efforts, dict) or not all(_is_changes(changes) for changes in efforts.values()):
        raise RecipeError("efforts holds lists of changes by name, such as {light: [calibration.nsamples=16]}")
    if effort is None or effort == "default":
        return data, []
    name = data.get("name", "this recipe")
    if effort not in efforts:
        raise RecipeError(f"{name} has no effort {effort!r}. It has {', '.join(['default', *efforts])}")
    return data | {"name": f"{name} ({effort})"}, efforts[effort]


def has_effort(name: str, effort: str | None) -> bool:
    """Whether a recipe has an effort of that name."""
    return effort is not None and effort in (find_recipe(name)[0].get("efforts") or {})


def _is_changes(changes: Any) -> bool:
    return isinstance(changes, list) and all(isinstance(change, str) for change in changes)
