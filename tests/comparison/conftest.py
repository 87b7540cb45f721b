"""Fixtures of comparisons."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from gyroquant.comparison import worker

running = importlib.import_module("gyroquant.comparison.run")  # the package has a function of that name


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Has cells run in this process, which takes a moment instead of seconds; holds their names in order. Two baselines
    do here.
    """
    order: list[str] = []

    def run_cell(spec: Any, log: Path, processes: Any) -> dict[str, Any]:
        order.append(spec["cell"]["label"])
        (Path(spec["scratch"]) / str(len(order))).mkdir()
        return worker.answered(json.loads(json.dumps(spec)) | {"scratch": f"{spec['scratch']}/{len(order)}"})

    monkeypatch.setattr(running, "run_cell", run_cell)
    monkeypatch.setattr(running, "BASELINES", ("rtn", "gptq"))
    return order
