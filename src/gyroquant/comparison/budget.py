"""How long a cell may take, as far as others tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

_SIZE = re.compile(r"-w\d+(?:a\d+)?(?:kv\d+)?(?:g\d+)?\b", re.IGNORECASE)


def expected_seconds(kind: str, name: str, done: Iterable[Mapping[str, Any]]) -> float:
    """Seconds that a cell may take, of the results of others: as long as the longest of its name at any size, or else
    of its kind, or of all; 0 when nothing is known.
    """
    there = list(done)
    like = [one for one in there if one["kind"] == kind]
    same = [one for one in like if _family(one["name"]) == _family(name)]
    return max(map(_seconds, same or like or there), default=0.0)


def _family(name: str) -> str:
    return _SIZE.sub("", name)


def _seconds(result: Mapping[str, Any]) -> float:
    """Of the whole cell, with loading and evaluation; of the quantization alone where a result tells no more."""
    measured = result["measured"]
    return float(measured.get("wall_seconds", measured["seconds"]))


__all__ = ["expected_seconds"]
