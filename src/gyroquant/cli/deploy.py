"""`gyroquant export`, `verify-export`, `formats` and `push`: folders for other programs, and for the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gyroquant.cli.common import AsJson, Debug, Public, Push, check_push_options, print_json, push_output
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
        str | None, typer.Option(metavar="TYPE", help="gguf: llama.cpp rounds again, to Q4_K_M or another type.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Compare logits with the program of the format before DEST gets its name.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DEST when the export is complete.")] = False,
    push: Push = None,
    public: Public = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write OUT in a format that another program opens without gyroquant."""
    check_push_options(push, public)
    progress = console.ConsoleProgress()
    manifest = deploy.export(
        out, format, destination, requantize=requantize, overwrite=overwrite, check=check, progress=progress
    )
    if not as_json:
        console.show(*summaries.exported(manifest, str(destination)))
    manifest |= push_output(destination, push, public, as_json)
    if as_json:
        print_json(manifest)


def verify_export(
    destination: Destination,
    against: Annotated[Path, typer.Option(help="The folder that DEST was exported from.")],
    text: Annotated[str | None, typer.Option("--text", help="A text to measure on. Default: random tokens.")] = None,
    tokens: Annotated[int, typer.Option(help="Greedy tokens to compare, and to measure speed on.")] = 32,
    window: Annotated[int, typer.Option(help="Tokens in a window of the text.")] = 256,
    windows: Annotated[int, typer.Option(help="At most this many windows.")] = 4,
    devices: Annotated[bool, typer.Option("--devices", help="Also use every device that the program finds.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run an export in its own program and compare logits, perplexity and greedy tokens with OUT; exit 1 beyond the
    tolerance.
    """
    settings = {"tokens": tokens, "window": window, "windows": windows}
    progress = console.ConsoleProgress()
    result = verify(destination, against, text, **settings, devices=devices, progress=progress)
    print_json(result) if as_json else console.show(*summaries.verified(result))
    if not result["passed"]:
        raise typer.Exit(1)


def formats(
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="State which formats hold this folder.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the formats of other programs and what each can hold. With OUT: whether each can hold OUT, and why not."""
    entries = deploy.formats(out)
    print_json(entries) if as_json else console.show(*summaries.formats(entries))


def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that gyroquant wrote.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="A repository on the hub: OWNER/NAME, or NAME.")],
    public: Public = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Push a folder that gyroquant wrote to the hub, as a private model unless --public is given."""
    result = push_output(folder, name, public, as_json)
    if as_json:
        print_json(result)
