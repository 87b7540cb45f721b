"""Reads untrusted YAML: plain values only, with limits on size, depth and numbers."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from gyroquant.errors import RecipeError

MAX_CHARACTERS = 1 << 17  # of a recipe
MAX_DEPTH = 32  # of nested lists and mappings
MAX_VALUES = 100_000  # of recipes that are given as Python objects
_OPENING = (
    *(yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken),
    *(yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken),
)
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)


class _Loader(yaml.SafeLoader):
    """Builds plain values only. Refuses a repeated key, because YAML would keep the last one without an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise RecipeError(
                    f"line {key.start_mark.line + 1} has the key {key.value!r} for the second time: remove one"
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. Refuses anchors, Python tags and deep nesting before it builds anything.

    Raises RecipeError, which names `where`.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(f"{where} is larger than any recipe")
    try:
        depth = 0
        for token in yaml.scan(text):
            if isinstance(token, (yaml.AnchorToken, yaml.AliasToken)):
                raise RecipeError(f"{where} uses YAML anchors or aliases. Recipes do not allow them: repeat the value")
            depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            if depth > MAX_DEPTH:
                raise RecipeError(f"{where} is nested more than {MAX_DEPTH} deep")
        return yaml.load(text, _Loader)
    except RecipeError as error:
        raise RecipeError(str(error) if where in str(error) else f"{where}: {error}") from error
    except Exception as error:  # PyYAML passes on errors of Python for scalars such as 2024-99-99
        raise RecipeError(f"{where} is not valid YAML: {error}") from error


def load_mapping(text: str, where: str) -> dict[str, Any]:
    """The mapping of a YAML text. Raises RecipeError for anything else."""
    data = load_yaml(text, where)
    if not isinstance(data, dict):
        raise RecipeError(f"{where} does not hold a mapping")
    return data


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping of a YAML file. Raises RecipeError for a file that cannot be read or holds anything else."""
    try:
        if path.stat().st_size > 4 * MAX_CHARACTERS:
            raise RecipeError(f"{path} is larger than any recipe")
        return load_mapping(path.read_text(encoding="utf-8"), str(path))
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error


def plain(data: Any) -> Any:
    """A copy of a recipe's data. Raises RecipeError for deep nesting, cycles, too many values, keys that are not
    strings, and numbers that are not finite or have more than 63 bits.
    """
    budget = iter(range(MAX_VALUES))

    def copied(value: Any, place: str, depth: int) -> Any:
        if depth > MAX_DEPTH or next(budget, None) is None:
            raise RecipeError(f"the recipe is nested too deeply or holds too much, at {place[:80]}")
        if isinstance(value, Mapping):
            for key in value:
                if not isinstance(key, str):
                    raise RecipeError(f"{place or 'the recipe'} has the key {str(key)[:40]}: keys are words")
            return {key: copied(item, f"{place}.{key}".strip("."), depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [copied(item, f"{place}.{i}".strip("."), depth + 1) for i, item in enumerate(value)]
        if isinstance(value, float) and not isfinite(value):
            raise RecipeError(f"{place} is {value}: it takes a finite number")
        if isinstance(value, int) and value.bit_length() > 63:
            raise RecipeError(f"{place} is a number of {value.bit_length()} bits, larger than any setting")
        return value

    return copied(data, "", 0)
