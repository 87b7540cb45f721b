"""Where recipes come from: presets of the package, by name, YAML files, and changes made to either."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from math import isfinite
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


_LONGEST = 1 << 17  # characters of a recipe
_DEEPEST = 32  # lists and mappings in each other
_MOST = 100_000  # values, in recipes that are given as Python objects
_OPENING = (
    *(yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken),
    *(yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken),
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class _Loader(yaml.SafeLoader):
    """Plain values alone, and no key twice, of which the last would count without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"line {key.start_mark.line + 1} has the key {key.value!r} for the second time")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _load_yaml(text: str, where: str) -> Any:
    """What a YAML text holds. Anchors, tags of Python and deep nesting are refused before anything is built."""
    if len(text) > _LONGEST:
        raise RecipeError(f"{where} is larger than any recipe")
    try:
        depth = 0
        for token in yaml.scan(text):
            if isinstance(token, (yaml.AnchorToken, yaml.AliasToken)):
                raise RecipeError(f"{where} uses YAML anchors or aliases, which recipes have no use for")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > _DEEPEST:
                raise RecipeError(f"{where} is nested more than {_DEEPEST} deep")
        return yaml.load(text, _Loader)
    except RecipeError as error:
        raise RecipeError(str(error) if where in str(error) else f"{where}: {error}") from error
    except Exception as error:  # PyYAML lets through what Python makes of a scalar such as 2024-99-99
        raise RecipeError(f"{where} is not valid YAML: {error}") from error


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    data = _load_yaml(text, where)
    if not isinstance(data, dict):
        raise RecipeError(f"{where} does not hold a mapping")
    return data


def plain(data: Any) -> Any:
    """A copy of a recipe's data. Raises RecipeError for what no recipe has: deep nesting, cycles, keys that are not
    words, numbers that are not finite or have more than 63 bits.
    """
    left = iter(range(_MOST))

    def copied(value: Any, place: str, depth: int) -> Any:
        if depth > _DEEPEST or next(left, None) is None:
            raise RecipeError(f"the recipe is nested too deeply or holds too much, at {place[:80]}")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise RecipeError(f"{place or 'the recipe'} has the key {str(key)[:40]}: keys are words")
            return {key: copied(one, f"{place}.{key}".strip("."), depth + 1) for key, one in value.items()}
        if isinstance(value, (list, tuple)):
            return [copied(one, f"{place}.{i}".strip("."), depth + 1) for i, one in enumerate(value)]
        if isinstance(value, float) and not isfinite(value):
            raise RecipeError(f"{place} is {value}: it takes a finite number")
        if isinstance(value, int) and value.bit_length() > 63:
            raise RecipeError(f"{place} is a number of {value.bit_length()} bits, larger than any setting")
        return value

    return copied(data, "", 0)


def _text_of(path: Path) -> str:
    if path.stat().st_size > 4 * _LONGEST:
        raise RecipeError(f"{path} is larger than any recipe")
    return path.read_text(encoding="utf-8")


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
            return {"name": path.stem} | _read_yaml(_text_of(path), str(path)), []
        except (OSError, ValueError) as error:
            if isinstance(error, RecipeError):
                raise
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
    out: dict[str, Any] = plain(data)
    changes, before = list(changes), out.get("weights")
    old = grid_kind(before) if isinstance(before, dict) else None
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path:
            raise RecipeError(f"--set takes KEY=VALUE, for example weights.bits=2, not {change!r}")
        value = _load_yaml(text, f"the value of --set {change[:80]!r}")
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
