"""`gyroquant fuzz`: proves every method at every site of a tiny model."""

from __future__ import annotations

from typing import Annotated

import typer

from gyroquant.cli.common import AsJson, Debug, print_json
from gyroquant.errors import InputError
from gyroquant.inspection.fuzz import Report
from gyroquant.inspection.fuzz import fuzz as run
from gyroquant.models.deriving.tiny import causal_model_types
from gyroquant.report import console, summaries


def fuzz(
    target: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model type, a class name, or a folder with a config.json.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every causal language model of transformers.")] = False,
    methods: Annotated[list[str] | None, typer.Option("--method", help="Only this method; repeat for several.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Build a tiny random model of an architecture and prove every site with every method."""
    if every == (target is not None):
        raise InputError("give either one MODEL, such as qwen3, or --all")
    reports = []
    for name in causal_model_types() if every else [target]:
        try:
            reports.append(run(str(name), methods, console.ConsoleProgress()))
        except InputError as error:
            if not every:
                raise
            reports.append(Report(str(name), problem=str(error), known=False))
    print_json([report.to_dict() for report in reports]) if as_json else console.show(*summaries.fuzzed(reports))
    if any(report.wrong for report in reports):
        raise typer.Exit(1)
