"""`gyroquant evaluate`: measures a model on a text and in tasks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gyroquant import api
from gyroquant.cli.common import (
    TASKS_HELP,
    AsJson,
    Debug,
    Device,
    NoBos,
    TaskSeed,
    TaskText,
    comma_separated,
    print_json,
)
from gyroquant.evaluation.diagnosis.options import ReportOptions
from gyroquant.report import console, summaries


def evaluate(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A folder that gyroquant wrote, or any MODEL.")],
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            help="A text, .jsonl, .json or .parquet file, or a dataset. Default: wikitext2; with --tasks none.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The original, for KL divergence, top-1 agreement and paired tests.")
    ] = None,
    preset: Annotated[str, typer.Option(help="standard (windows of 2048) or bbt (8 windows of 1024).")] = "standard",
    windows: Annotated[int | None, typer.Option(help="At most this many windows of that length.")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    tasks: Annotated[str | None, typer.Option(help=TASKS_HELP)] = None,
    task_items: Annotated[
        int | None, typer.Option(help="Items of each offline task (default 200); at most this many of other tasks.")
    ] = None,
    task_seed: TaskSeed = 0,
    task_text: TaskText = None,
    no_bos: NoBos = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Device = "cpu",
    report: Annotated[
        str | None, typer.Option(metavar="DEST", help="Write a diagnosis against the original into this folder.")
    ] = None,
    prompts: Annotated[int | None, typer.Option(help="For --report: prompts to continue. Default 8.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="For --report: tokens of a prompt. Default 32.")] = None,
    steps: Annotated[int | None, typer.Option(help="For --report: tokens of a continuation. Default 32.")] = None,
    coverage: Annotated[
        float | None, typer.Option(help="For --report: coverage of the prediction sets. Default 0.9.")
    ] = None,
    generations: Annotated[
        str | None, typer.Option(metavar="FILE", help="For --report: .jsonl of the original's prompt and completion.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure perplexity, divergence from the original, and accuracy in zero-shot tasks."""
    options: dict[str, Any] = {
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "steps": steps,
        "coverage": coverage,
        "generations": generations,
    }
    given = {name: value for name, value in options.items() if value is not None}
    result = api.evaluate(
        model,
        text,
        against,
        preset=preset,  # type: ignore[arg-type]  # checked there
        window=window,
        windows=windows,
        tasks=comma_separated(tasks),
        task_items=task_items,
        task_seed=task_seed,
        task_text=task_text,
        add_bos=not no_bos,
        dtype=dtype,
        device=device,
        progress=console.ConsoleProgress(),
        report=report,
        report_options=ReportOptions(**given) if given else None,
    )
    if as_json:
        print_json(result)
    else:
        console.show(*summaries.evaluated(result))
