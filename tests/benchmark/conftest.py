"""Fixtures of comparisons."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gyroquant.benchmark import worker
from gyroquant.benchmark.external_tools import ExternalTool
from gyroquant.registry import Registry

running = importlib.import_module("gyroquant.benchmark.execute")  # the package has a function of that name


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has runs run in this process, which takes a moment instead of seconds; holds their names in order. Two baselines
    do here.
    """
    order: list[str] = []

    def run_in_worker(spec: Any, log: Path, processes: Any) -> dict[str, Any]:
        order.append(spec["run"]["label"])
        (Path(spec["scratch"]) / str(len(order))).mkdir()
        return worker.answered(json.loads(json.dumps(spec)) | {"scratch": f"{spec['scratch']}/{len(order)}"})

    monkeypatch.setattr(running, "run_in_worker", run_in_worker)
    monkeypatch.setattr(running, "BASELINES", ("rtn", "gptq"))
    return order


@pytest.fixture
def tools() -> Iterator[Registry[type[ExternalTool]]]:
    """The registry of external tools; what a test adds is gone afterwards."""
    with ExternalTool.registry.restored() as registry:
        yield registry
