"""The result of a comparison: assembled from its runs, and written as JSON, Markdown and a page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from gyroquant.benchmark.commands import ComparisonRequest
from gyroquant.benchmark.markdown import markdown
from gyroquant.benchmark.page import write_page
from gyroquant.benchmark.runs import Conditions
from gyroquant.benchmark.shared_measurements import own_grid
from gyroquant.benchmark.texts import Texts
from gyroquant.benchmark.verdict import verdict
from gyroquant.errors import InputError
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.environment import versions
from gyroquant.system.files import put_json
from gyroquant.system.progress import Progress

FORMAT = 1


def make_comparison(
    request: ComparisonRequest,
    store: WeightStore,
    conditions: Conditions,
    texts: Texts,
    facts: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    threads: int,
) -> dict[str, Any]:
    """The comparison as it is written and returned.

    facts: the original's measurements.
    runs: all rows.
    threads: threads of each run, for the command if the runs had different numbers of threads.
    """
    graph, calibration = store.graph, texts.calibration
    tests = {name: facts["tests"][key] for name, key in texts.keys.items()}
    used = {run["versions"]["threads"] for run in _done(runs)}
    return {
        "format": FORMAT,
        "name": Path(request.model).name,
        "made": date.today().isoformat(),
        "command": request.command(used.pop() if len(used) == 1 else threads),
        "model": {
            "label": Path(store.label).name,
            "sha256": conditions.model,
            "model_type": graph.config.model_type,
            "blocks": len(graph.blocks),
            "hidden": graph.hidden,
            "weights": sum(math.prod(op.shape) for block in graph.blocks for op in block.linears if op.entry.quantize),
            "all_weights": store.weights,
        },
        "texts": {
            "calibration": {
                "name": Path(request.calibration).name,
                "sha256": calibration.sha256,
                "seqlen": request.spec.seqlen,
                "bos": texts.bos,
            },
            "tests": texts.about(),
        },
        "settings": {key: _plain(value) for key, value in vars(request.spec).items()} | {"dtype": request.dtype},
        "versions": versions(),
        "notes": [*store.notes, *own_grid(store), *made_differently(runs)],
        "original": {"tests": tests, "outliers": facts["outliers"]},
        "cells": list(runs),
        "verdict": verdict(runs, tests),
    }


def made_differently(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note if the runs had different numbers of threads or different processors. Else empty."""
    machines = Counter((run["versions"]["threads"], run["versions"]["cpu_capability"]) for run in _done(runs))
    if len(machines) < 2:
        return []
    counts = [
        f"{count} with {threads} thread{'s' * (threads != 1)} ({capability})"
        for (threads, capability), count in sorted(machines.items())
    ]
    return [
        f"The runs differ in threads or processor: {', '.join(counts)}. They add numbers in different orders, which "
        "can change the order of close results. Their times are not comparable."
    ]


def write_comparison(out: Path, comparison: Mapping[str, Any], progress: Progress) -> None:
    """Writes a comparison to a folder as JSON, Markdown and a page. A page that cannot be made is a warning."""
    put_json(out / "comparison.json", comparison)
    (out / "comparison.md").write_text(markdown(comparison), encoding="utf-8")
    try:
        write_page(comparison, out / "index.html")
    except InputError as error:  # the other two files have all numbers
        progress.warn(f"the page index.html is missing: {error}")


def _done(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [run for run in runs if run["status"] == "done"]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (tuple, list)) else value


__all__ = ["FORMAT", "made_differently", "make_comparison", "write_comparison"]
