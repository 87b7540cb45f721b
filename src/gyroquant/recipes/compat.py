"""Old names in recipes and manifests. They are read for one release after they were renamed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gyroquant.errors import RecipeError, RenamedWarning

GOES = "0.3"
"""The release that no longer reads the old names."""


@dataclass(frozen=True)
class Renamed:
    """A renamed key or value.

    - `old`, `new`: the old and the new key, as dotted paths.
    - `value`, `new_value`: the old and the new value, if only this value of the key was renamed. Default None.
    - `manifest`: whether the key is one of `gyroquant.json` instead of a recipe. Default false.
    """

    old: str
    new: str
    value: str | None = None
    new_value: str | None = None
    manifest: bool = False

    def __str__(self) -> str:
        old, new = (
            (f"{self.old}: {self.value}", f"{self.new}: {self.new_value}") if self.value else (self.old, self.new)
        )
        return f"'{old}' is now '{new}'"


RENAMED = (
    Renamed("finish", "finetune"),
    Renamed("learn.gradient", "learn.gradient", "spans", "scaled_ste"),
    Renamed("finished", "finetuned", manifest=True),
)
"""All renames. A new rename needs only a new row here."""


def current(data: Any, warn: bool = True) -> Any:
    """A recipe's data under today's names; data without old names is returned as it is.

    Each old name gives a RenamedWarning, unless `warn` is false. Raises RecipeError if both names of a key
    are given.
    """
    for renamed in RENAMED:
        if not renamed.manifest:
            moved = _moved(data, renamed.old.split("."), renamed)
            if warn and moved is not data:
                _warn(renamed)
            data = moved
    return data


def current_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a `gyroquant.json`, of this release or the last one, under today's names.

    It does not warn, because users need not change the manifests of existing folders.
    """
    data = dict(manifest)
    for renamed in RENAMED:
        if renamed.manifest:
            data = _moved(data, renamed.old.split("."), renamed)
    if "recipe" in data:
        data["recipe"] = current(data["recipe"], warn=False)
    return data


def previous(data: Any) -> Any:
    """A recipe's data under the names of the last release, which computed the names of stored results from them."""
    for renamed in RENAMED:
        if not renamed.manifest:
            back = Renamed(renamed.new, renamed.old, renamed.new_value, renamed.value)
            data = _moved(data, back.old.split("."), back)
    return data


def current_change(change: str) -> str:
    """A ``KEY=VALUE`` under today's names, with a RenamedWarning for an old one."""
    path, equals, text = change.partition("=")
    for renamed in RENAMED:
        if renamed.manifest or not equals:
            continue
        if renamed.value is not None:
            if path == renamed.old and text.strip() == renamed.value:
                _warn(renamed)
                path, text = renamed.new, str(renamed.new_value)
        elif path == renamed.old or path.startswith(f"{renamed.old}."):
            _warn(renamed)
            path = renamed.new + path.removeprefix(renamed.old)
    return f"{path}{equals}{text}"


def _moved(data: Any, path: list[str], renamed: Renamed) -> Any:
    """A copy of the data with the rename made at this path, or the data itself if the old name is absent."""
    key, *inner = path
    if not isinstance(data, Mapping) or key not in data:
        return data
    if inner:
        moved = _moved(data[key], inner, renamed)
        return data if moved is data[key] else {**data, key: moved}
    if renamed.value is not None:
        return {**data, key: renamed.new_value} if data[key] == renamed.value else data
    new = renamed.new.rpartition(".")[2]  # a renamed key stays in its section
    if new in data:
        raise RecipeError(f"{renamed}, and both are given: leave {renamed.old!r} out")
    return {new if name == key else name: value for name, value in data.items()}


def _warn(renamed: Renamed) -> None:
    message = f"{renamed}. The old name works in this release; gyroquant {GOES} refuses it. Change the recipe"
    warnings.warn(message, RenamedWarning, stacklevel=3)
