"""Tables of many runs: one cell a run, each in a file of its own, so that a stopped table goes on where it was."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from forward_equivalents import forward_seconds

import gyroquant as gq
from gyroquant.finetuning.rotations_file import FILE_NAME
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare


class MissingCellError(Exception):
    """A cell that is not there, when only what is there is asked for."""


class Table:
    """A folder of cells, by the arguments of the table. A cell is named by what makes it: recipe, texts, model and
    evaluation.
    """

    def __init__(self, given: argparse.Namespace, evaluations: dict[str, dict[str, Any]]):
        self.model, self.calibration, self.test, self.done = given.model, given.calibration, given.test, given.done
        self.folder, self.evaluations = (given.out / "cells").resolve(), evaluations
        self.folder.mkdir(parents=True, exist_ok=True)

    def _path(self, name: str, recipe: dict[str, Any]) -> Path:
        key = {
            "recipe": _present(recipe),
            "model": Path(self.model).name,
            "texts": [hashlib.sha256(Path(text).read_bytes()).hexdigest() for text in (self.calibration, self.test)],
            "evaluations": self.evaluations,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"{name.replace(' ', '_')}-{digest}.json"

    def _evaluate(self, model: str | Path) -> dict[str, Any]:
        return {name: gq.evaluate(model, self.test, **options) for name, options in self.evaluations.items()}

    def original(self) -> dict[str, Any]:
        """The cell of the model in full precision."""
        return self._cell("original", {}, lambda: {"evaluations": self._evaluate(self.model)})

    def forward_pass(self, changes: Sequence[str]) -> float:
        """Seconds of one pass of the model, in bfloat16, over the calibration text of a recipe with these changes."""
        loaded = gq.load_recipe("gptq", changes)

        def make() -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as scratch:
                tokens = prepare(self.model, Path(scratch) / "out", loaded, self.calibration).tokens
                return {"seconds": forward_seconds(Path(self.model), tokens)}

        return self._cell("forward pass", loaded.to_dict(), make)["seconds"]

    def cell(self, name: str, recipe: str, changes: Sequence[str], rotations: Path | None = None) -> dict[str, Any]:
        """Quantizes and evaluates, unless that was done before; returns manifest and measurements.

        Raises MissingCellError for what was not done when only what is there is asked for. Learned rotations are kept
        in the file `rotations`, for cells that start where this one ended.
        """
        loaded = gq.load_recipe(recipe, changes)

        def make() -> dict[str, Any]:
            with tempfile.TemporaryDirectory() as scratch:
                out = Path(scratch) / "out"
                manifest = pipeline.run(prepare(self.model, out, loaded, self.calibration))
                if rotations is not None:
                    shutil.copy(out / FILE_NAME, rotations)
                return {"manifest": manifest, "evaluations": self._evaluate(out)}

        return self._cell(name, loaded.to_dict(), make)

    def _cell(self, name: str, recipe: dict[str, Any], make: Any) -> dict[str, Any]:
        path = self._path(name, recipe)
        if not path.exists():
            if self.done:
                raise MissingCellError(name)
            started = time.perf_counter()
            result = {"name": name} | make()
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(result, indent=1))
            temporary.replace(path)
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        return json.loads(path.read_text())


def _present(data: Any) -> Any:
    """Plain data without what is None, so that a section which is new and not there leaves the name of a cell alone."""
    if not isinstance(data, dict):
        return data
    return {key: _present(value) for key, value in data.items() if value is not None}


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every table takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--done", action="store_true", help="make the table of the cells that are there, run none")
    return parser


def write(out: Path, header: Sequence[str], rows: Sequence[Sequence[Any]], base: Any, data: Any) -> None:
    """Writes table.md and table.json and prints the former."""
    (out / "table.md").write_text(markdown(header, rows))
    (out / "table.json").write_text(json.dumps({"original": base, "cells": data}, indent=1) + "\n")
    print((out / "table.md").read_text())


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def short(value: float) -> str:
    """A perplexity with as many digits as mean something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"
