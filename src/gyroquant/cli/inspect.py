"""`gyroquant inspect`: what a model is, and what a recipe will take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gyroquant.cli.common import AsJson, Changes, Debug, Device, Effort, Model, NoBos, TextSource, changes, print_json
from gyroquant.inspection.model import inspect_model
from gyroquant.report import console, summaries


def inspect(
    model: Model,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Predict memory and time of this recipe.")
    ] = None,
    effort: Effort = None,
    change: Changes = None,
    text: TextSource = None,
    nsamples: Annotated[int | None, typer.Option(help="Windows of text, as for quantize.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in each window.")] = None,
    no_bos: NoBos = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only what the recipe takes: memory of every stage, disk and time.")
    ] = False,
    offload: Annotated[Path | None, typer.Option(help="As for quantize.")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show a model's sites, which recipes fit it, where its outliers are, and what a recipe will take."""
    result = inspect_model(
        model,
        recipe,
        changes(change, nsamples, seqlen, None, no_bos),
        text,
        effort=effort,
        add_bos=not no_bos,
        device=device,
        dry_run=dry_run,
        offload=offload,
        progress=console.ConsoleProgress(),
    )
    if as_json:
        print_json(result.to_dict())
    else:
        console.show(*(summaries.predicted(result) if dry_run else summaries.inspected(result)))
