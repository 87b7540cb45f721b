"""What a comparison found, put together from its cells, and written as JSON, Markdown and a page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from gyroquant.comparison.cells import Conditions
from gyroquant.comparison.command import Asked
from gyroquant.comparison.shared import own_grid
from gyroquant.comparison.texts import Texts
from gyroquant.comparison.verdict import verdict
from gyroquant.environment import versions
from gyroquant.errors import InputError
from gyroquant.files import put_json
from gyroquant.models.store import WeightStore
from gyroquant.progress import Stages
from gyroquant.report.comparison_markdown import markdown
from gyroquant.report.page import write_page

FORMAT = 1


def outcome(
    asked: Asked,
    store: WeightStore,
    conditions: Conditions,
    texts: Texts,
    facts: Mapping[str, Any],
    cells: Sequence[Mapping[str, Any]],
    threads: int,
) -> dict[str, Any]:
    """The comparison as it is written and returned: `facts` are the original's measurements, `cells` all rows, and
    `threads` those of a cell that is run now.
    """
    graph, calibration = store.graph, texts.calibration
    tests = {name: facts["tests"][key] for name, key in texts.keys.items()}
    used = {one["versions"]["threads"] for one in _done(cells)}
    return {
        "format": FORMAT,
        "name": Path(asked.model).name,
        "made": date.today().isoformat(),
        "command": asked.again(used.pop() if len(used) == 1 else threads),
        "model": {
            "label": Path(store.label).name,
            "sha256": conditions.model,
            "model_type": graph.config.model_type,
            "blocks": len(graph.blocks),
            "hidden": graph.hidden,
            "weights": sum(math.prod(op.shape) for block in graph.blocks for op in block.linears if op.entry.quantize),
        },
        "texts": {
            "calibration": {
                "name": Path(asked.calibration).name,
                "sha256": calibration.sha256,
                "seqlen": asked.wanted.seqlen,
                "bos": texts.bos,
            },
            "tests": texts.about(),
        },
        "settings": {key: _plain(value) for key, value in vars(asked.wanted).items()} | {"dtype": asked.dtype},
        "versions": versions(),
        "notes": [*store.notes, *own_grid(store), *made_differently(cells)],
        "original": {"tests": tests, "outliers": facts["outliers"]},
        "cells": list(cells),
        "verdict": verdict(cells, tests),
    }


def made_differently(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What has to be said of cells that were run with different numbers of threads, or on different processors."""
    ways = Counter((one["versions"]["threads"], one["versions"]["cpu_capability"]) for one in _done(cells))
    if len(ways) < 2:
        return []
    counted = [
        f"{count} with {threads} thread{'s' * (threads != 1)} ({capability})"
        for (threads, capability), count in sorted(ways.items())
    ]
    return [
        f"The cells were not all run alike: {', '.join(counted)}. Their sums are made in other orders, which a close "
        "call can turn on, and their times do not compare."
    ]


def write(out: Path, comparison: Mapping[str, Any], progress: Stages) -> None:
    """Writes a comparison to a folder, three times; a page that cannot be made is a warning."""
    put_json(out / "comparison.json", comparison)
    (out / "comparison.md").write_text(markdown(comparison), encoding="utf-8")
    try:
        write_page(comparison, out / "index.html")
    except InputError as error:  # the numbers are there, whatever the page lacks
        progress.warn(f"there is no page: {error}")


def _done(cells: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [cell for cell in cells if cell["status"] == "done"]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


__all__ = ["FORMAT", "made_differently", "outcome", "write"]
