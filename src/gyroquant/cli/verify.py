"""`gyroquant verify`: checks the files of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gyroquant.cli.common import AsJson, Debug, print_json
from gyroquant.inspection import verify as verification
from gyroquant.report import console, summaries


def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that gyroquant wrote, or an export.")],
    proof: Annotated[bool, typer.Option("--proof", help="Repeat the proof on the original.")] = False,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The original, for --proof. Default: as recorded in OUT.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="The calibration text of the run, for --proof.")] = None,
    recipe_file: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="Write the recipe of OUT to this file, as YAML.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check the sha256 of every file of OUT and every array in it, and print the command that makes it again; exit 1
    if there is a problem.
    """
    progress = console.ConsoleProgress()
    result = verification.verify(
        out, proof=proof, against=against, text=text, recipe_file=recipe_file, progress=progress
    )
    print_json(result) if as_json else console.show(*summaries.checked(result))
    if not result["passed"]:
        raise typer.Exit(1)
