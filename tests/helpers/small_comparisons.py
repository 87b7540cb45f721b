"""Small comparisons of a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gyroquant as gq

SMALL: dict[str, Any] = {"bits": [2], "group_sizes": [16], "nsamples": 4, "seqlen": 32, "window": 32, "windows": 4}


def compared(folder: Path, corpus: Path, out: Path, recipes: list[str], **changes: Any) -> dict[str, Any]:
    return gq.compare(folder, recipes, out, corpus, corpus, **{**SMALL, **changes})
