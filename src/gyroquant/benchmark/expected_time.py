"""The expected time of a run, from the times of other runs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_SIZE = re.compile(r"-w\d+(?:a\d+)?(?:kv\d+)?(?:g\d+)?\b", re.IGNORECASE)


def expected_seconds(kind: str, name: str, done: Iterable[Mapping[str, Any]]) -> float:
    """Seconds that a run is expected to take.

    The longest time among the results of the same name at any size. If there are none, of the same kind. If there are
    none, of all. 0 without results.
    """
    results = list(done)
    of_kind = [result for result in results if result["kind"] == kind]
    of_name = [result for result in of_kind if _family(result["name"]) == _family(name)]
    return max(map(_seconds, of_name or of_kind or results), default=0.0)


def _family(name: str) -> str:
    return _SIZE.sub("", name)


def _seconds(result: Mapping[str, Any]) -> float:
    """The time of the whole run, with loading and evaluation. Results without it have that of the quantization only."""
    measured = result["measured"]
    return float(measured.get("wall_seconds", measured["seconds"]))


__all__ = ["expected_seconds"]
