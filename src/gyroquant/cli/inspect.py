"""`gyroquant inspect`: the structure of a model, and the time and memory that a recipe needs."""

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
        str | None, typer.Option("--recipe", "-r", help="Estimate memory and time of this recipe.")
    ] = None,
    effort: Effort = None,
    change: Changes = None,
    text: TextSource = None,
    nsamples: Annotated[int | None, typer.Option(help="Windows of text, as for quantize.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in each window.")] = None,
    no_bos: NoBos = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show only the memory and time of every stage, and disk space."),
    ] = False,
    sites: Annotated[
        bool, typer.Option("--sites", help="Show only the sites, and where a derived description comes from.")
    ] = False,
    save: Annotated[
        Path | None, typer.Option(help="With --sites: write the derived description to this new Python file.")
    ] = None,
    offload: Annotated[Path | None, typer.Option(help="As for quantize.")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the sites of a model, its outliers, the recipes that fit it, and the time and memory of a recipe."""
    result = inspect_model(
        model,
        recipe,
        changes(change, nsamples, seqlen, None, no_bos),
        text,
        effort=effort,
        add_bos=not no_bos,
        device=device,
        dry_run=dry_run,
        sites=sites,
        save=save,
        offload=offload,
        progress=console.ConsoleProgress(),
    )
    if as_json:
        print_json(result.to_dict())
    elif sites:
        console.show(*summaries.described(result))
    else:
        console.show(*(summaries.predicted(result) if dry_run else summaries.inspected(result)))
