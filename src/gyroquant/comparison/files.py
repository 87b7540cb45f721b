"""The folder of a comparison: every cell a file, written whole or not at all, so that folders can be merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError
from gyroquant.files import put_json


class Results:
    """The results of cells in a folder, by key."""

    def __init__(self, folder: Path):
        self.folder = folder / "cells"

    def path(self, key: str) -> Path:
        """Where the result of a cell is."""
        return self.folder / f"{key}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        """A result that is there. Raises InputError for a file that is none."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict) or found.get("key") != key or "status" not in found:
                raise ValueError("it is not the result of this cell")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}): delete it, and the cell is run again") from error
        return found

    def put(self, result: Mapping[str, Any]) -> None:
        """Keeps the result of a cell."""
        put_json(self.path(result["key"]), result)

    def merge(self, other: Path) -> int:
        """Takes over the results of another folder that are not here, or are failures here; returns how many.

        Raises InputError for a folder that holds none.
        """
        files, taken = sorted((other / "cells").glob("*.json")), 0
        if not files:
            raise InputError(f"{other} holds no results to merge (it has no cells/*.json)")
        for file in files:
            mine = self.get(file.stem)
            if mine is None or mine["status"] != "done":
                result = Results(other).get(file.stem)
                if result is not None and result["status"] == "done":
                    self.put(result)
                    taken += 1
        return taken
