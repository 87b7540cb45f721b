"""The commands that write for other programs and check what those make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gyroquant.cli.common import AsJson, Debug, print_json
from gyroquant.formats import export as deploy
from gyroquant.inspection.verify_export import verify_export as verify
from gyroquant.report import console, summaries

Out = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that gyroquant wrote.")]
Destination = Annotated[Path, typer.Argument(metavar="DEST", help="The folder of the export.")]


def export(
    out: Out,
    destination: Destination,
    format: Annotated[str, typer.Option("--format", "-f", help="See `gyroquant formats`.")] = "openvino",
    requantize: Annotated[
        str | None, typer.Option(metavar="TYPE", help="gguf: have llama.cpp round again, to Q4_K_M or another type.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Compare logits with the program of the format before DEST appears.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DEST, once the new one is complete.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write OUT in a format that another program opens without gyroquant."""
    shown = console.ConsoleProgress()
    manifest = deploy.export(
        out, format, destination, requantize=requantize, overwrite=overwrite, check=check, progress=shown
    )
    print_json(manifest) if as_json else console.show(*summaries.exported(manifest, str(destination)))


def verify_export(
    destination: Destination,
    against: Annotated[Path, typer.Option(help="The folder that DEST was exported from.")],
    text: Annotated[str | None, typer.Option("--text", help="A text to measure on; random tokens without it.")] = None,
    tokens: Annotated[int, typer.Option(help="Greedy tokens to compare, and to measure speed on.")] = 32,
    window: Annotated[int, typer.Option(help="Tokens in a window of the text.")] = 256,
    windows: Annotated[int, typer.Option(help="At most this many windows.")] = 4,
    devices: Annotated[bool, typer.Option("--devices", help="Also on every device that the program finds.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run an export by its own program and compare logits, perplexity and greedy tokens with OUT; exit 1 beyond the
    tolerance.
    """
    settings = {"tokens": tokens, "window": window, "windows": windows}
    shown = console.ConsoleProgress()
    result = verify(destination, against, text, **settings, devices=devices, progress=shown)
    print_json(result) if as_json else console.show(*summaries.verified(result))
    if not result["passed"]:
        raise typer.Exit(1)


def formats(
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="Say which of them hold this folder.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the formats of other programs and what each can hold, or whether each holds a folder, and why not."""
    found = deploy.formats(out)
    print_json(found) if as_json else console.show(*summaries.formats(found))
