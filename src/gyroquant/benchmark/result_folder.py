"""The folder of a comparison: one file per run, written whole or not at all, so that folders can be merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gyroquant.errors import InputError
from gyroquant.system.files import put_json


class ResultFolder:
    """The results of runs in a folder, by key."""

    def __init__(self, folder: Path):
        self.folder = folder / "cells"

    def path(self, key: str) -> Path:
        """The file of a run's result."""
        return self.folder / f"{key}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        """The result of a run, or None. Raises InputError if its file is damaged."""
        path = self.path(key)
        if not path.exists():
            return None
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(result, dict) or result.get("key") != key or "status" not in result:
                raise ValueError("it is not the result of this run")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} is damaged ({error}): delete it, and it is made again") from error
        return result

    def put(self, result: Mapping[str, Any]) -> None:
        """Stores the result of a run."""
        put_json(self.path(result["key"]), result)

    def merge(self, other: Path) -> int:
        """Takes over the results of another folder that are missing or failed here. Returns their number.

        Raises InputError if the other folder has no results.
        """
        files, taken = sorted((other / "cells").glob("*.json")), 0
        if not files:
            raise InputError(
                f"{other} holds no results to merge (it has no cells/*.json): give the OUT of a comparison"
            )
        for file in files:
            own = self.get(file.stem)
            if own is None or own["status"] != "done":
                result = ResultFolder(other).get(file.stem)
                if result is not None and result["status"] == "done":
                    self.put(result)
                    taken += 1
        return taken
