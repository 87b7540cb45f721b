"""`gyroquant evaluate`: measures a model on a text."""

from __future__ import annotations

from typing import Annotated

import typer

from gyroquant import api
from gyroquant.cli.common import AsJson, Debug, Device, NoBos, print_json
from gyroquant.report import console, summaries


def evaluate(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A folder that gyroquant wrote, or any MODEL.")],
    text: Annotated[
        str, typer.Option("--text", help="A text, .jsonl, .json or .parquet file, wikitext2 or another dataset.")
    ] = "wikitext2",
    against: Annotated[str | None, typer.Option(help="The original, for KL divergence and top-1 agreement.")] = None,
    preset: Annotated[str, typer.Option(help="standard (windows of 2048) or bbt (8 windows of 1024).")] = "standard",
    windows: Annotated[int | None, typer.Option(help="At most this many windows of that length.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    no_bos: NoBos = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, and divergence from the original, on a text."""
    result = api.evaluate(
        model,
        text,
        against,
        preset=preset,  # type: ignore[arg-type]  # checked there
        window=window,
        windows=windows,
        add_bos=not no_bos,
        dtype=dtype,
        device=device,
        progress=console.ConsoleProgress(),
    )
    if as_json:
        print_json(result)
    else:
        console.show(*summaries.evaluated(result))
