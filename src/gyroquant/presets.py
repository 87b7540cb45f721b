"""Where recipes come from: presets of the package, by name, YAML files, and changes made to either."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gyroquant.errors import RecipeError
from gyroquant.grids import Grid


def preset_names() -> tuple[str, ...]:
    """The names of the recipes that come with the package."""
    return tuple(sorted(p.name.removesuffix(".yaml") for p in _presets().iterdir() if p.name.endswith(".yaml")))


def _presets() -> Any:
    return resources.files("gyroquant") / "recipes"


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    if len(text) > 1 << 20:
        raise RecipeError(f"{where} is larger than any recipe")
    try:
        if any(isinstance(token, (yaml.AnchorToken, yaml.AliasToken)) for token in yaml.scan(text)):
            raise RecipeError(f"{where} uses YAML anchors or aliases, which recipes have no use for")
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{where} does not hold a mapping")
    return data


SIZED = re.compile(
    r"^(?P<name>.+?)-w(?P<bits>\d)(?:a(?P<activations>\d{1,2}))?(?:kv(?P<cache>\d{1,2}))?(?:g(?P<group>\d+))?$", re.I
)
"""A recipe's name with bits and group size behind it."""


def find_recipe(name: str) -> tuple[dict[str, Any], list[str]]:
    """The data of a recipe, and the changes that bits and group size behind its name stand for.

    Raises RecipeError for a name that there is not and a file that cannot be read.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        try:
            return {"name": path.stem} | _read_yaml(path.read_text(encoding="utf-8"), str(path)), []
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    known = preset_names()
    if name in known:
        return {"name": name} | _read_yaml((_presets() / f"{name}.yaml").read_text(encoding="utf-8"), name), []
    short = SIZED.match(name)
    if short and short["name"] in known:
        places = {"bits": "weights.bits", "group": "weights.group_size"}
        places |= {"activations": "activations.bits", "cache": "kv_cache.bits"}
        numbers = {place: short[key] for key, place in places.items() if short[key]}
        changes = []
        for place, number in numbers.items():
            section = place.partition(".")[0]
            exact = number == "16" and section != "weights"  # as in W4A16: not rounded
            changes.append(f"{section}=null" if exact else f"{place}={number}")
        return find_recipe(short["name"])[0] | {"name": name}, changes
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    raise RecipeError(
        f"no recipe is called {name!r}; did you mean {close[0]!r}? There are {', '.join(known)}, each also with bits "
        "and group size behind it (gsr-w2g64, quarot-w4a4kv4), and files that end in .yaml"
    )


def with_effort(data: Mapping[str, Any], effort: str | None) -> tuple[dict[str, Any], list[str]]:
    """A recipe's data without its `efforts`, and the changes that one of them stands for; `default` changes nothing.

    Raises RecipeError for an effort that the recipe has not.
    """
    data = dict(data)
    efforts = data.pop("efforts", None) or {}
    if not isinstance(efforts, dict) or not all(_is_changes(changes) for changes in efforts.values()):
        raise RecipeError("efforts holds lists of changes by name, such as {light: [calibration.nsamples=16]}")
    if effort is None or effort == "default":
        return data, []
    name = data.get("name", "this recipe")
    if effort not in efforts:
        there = ", ".join(["default", *efforts])
        raise RecipeError(f"{name} has no effort {effort!r}; what it has: {there}")
    return data | {"name": f"{name} ({effort})"}, efforts[effort]


def has_effort(name: str, effort: str | None) -> bool:
    """Whether a recipe has an effort of that name."""
    return effort is not None and effort in (find_recipe(name)[0].get("efforts") or {})


def _is_changes(changes: Any) -> bool:
    return isinstance(changes, list) and all(isinstance(one, str) for one in changes)


def grid_kind(weights: Mapping[str, Any]) -> type[Grid] | None:
    """The kind of grid that a section of weights asks for, if there is one of that name."""
    name = weights.get("grid", "integer")
    return Grid.kinds.get(name) if isinstance(name, str) else None


def set_values(data: Mapping[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Plain recipe data with ``path.to.key=value`` changes made; values are YAML, ``null`` takes a key out.

    A change of ``weights.grid`` takes those settings of the old grid out that the new one cannot have, unless they are
    among the changes themselves.
    """
    out: dict[str, Any] = yaml.safe_load(yaml.safe_dump(dict(data)))
    changes, before = list(changes), out.get("weights")
    old = grid_kind(before) if isinstance(before, dict) else None
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path:
            raise RecipeError(f"--set takes KEY=VALUE, for example weights.bits=2, not {change!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"the value of --set {change!r} is not valid YAML") from error
        *parents, last = path.split(".")
        place = out
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
    if old is not None and out["weights"] is before:
        _forget_grid(before, old, {change.partition("=")[0].removeprefix("weights.") for change in changes})
    return out


def _forget_grid(weights: dict[str, Any], old: type[Grid], changed: set[str]) -> None:
    """Takes out of `weights` what its old grid had and its new one cannot have, except keys that were `changed`."""
    new = grid_kind(weights)
    if new in (old, None):
        return
    for key in [key for key in old.model_fields if key in weights and key != "grid" and key not in changed]:
        if key not in new.model_fields or not _takes(new, key, weights[key]):
            del weights[key]


def _takes(kind: type[Grid], key: str, value: Any) -> bool:
    """Whether a grid of this kind can have this value of this setting, whatever its others are."""
    try:
        kind(**{key: value})
    except ValidationError as error:
        return all(one["loc"] != (key,) for one in error.errors())
    return True
