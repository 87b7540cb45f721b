"""`gyroquant rotations`: saves and changes files of rotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gyroquant.cli.common import AsJson, print_json
from gyroquant.finetuning.rotations_file import compose, describe, invert, load_rotations, write_rotations
from gyroquant.report import console, summaries

rotations = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Save the rotations of a run to a file, change them and use them again.",
)
Rotations = Annotated[Path, typer.Argument(help="A file of rotations, or a folder of a run that learned rotations.")]
RotationsOut = Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")]


@rotations.command("show")
def show_rotations(place: Rotations, as_json: AsJson = False) -> None:
    """List the sites of a file and the distance of its matrices from orthogonal and from the identity."""
    rows = describe(load_rotations(place))
    print_json(rows) if as_json else console.show(summaries.rotations(rows))


@rotations.command("save")
def save_rotations(place: Rotations, file: RotationsOut) -> None:
    """Save the learned rotations of a run to FILE; use it with transform.R1={method: stored, file: FILE}."""
    write_rotations(file, load_rotations(place))


@rotations.command("compose")
def compose_rotations(first: Rotations, second: Rotations, file: RotationsOut) -> None:
    """Write the products of two files of rotations: apply the first, then the second."""
    write_rotations(file, compose(load_rotations(first), load_rotations(second)))


@rotations.command("invert")
def invert_rotations(place: Rotations, file: RotationsOut) -> None:
    """Write the inverses of the rotations of a file."""
    write_rotations(file, invert(load_rotations(place)))
