"""Where recipes come from: presets of the package, by name, and YAML files."""

from __future__ import annotations

import difflib
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from gyroquant.errors import RecipeError


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


_SUFFIX = re.compile(
    r"^(?P<name>.+?)-w(?P<bits>\d)(?:a(?P<activations>\d{1,2}))?(?:kv(?P<cache>\d{1,2}))?(?:g(?P<group>\d+))?$", re.I
)


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
    short = _SUFFIX.match(name)
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
