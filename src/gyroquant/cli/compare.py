"""`gyroquant compare`: methods and other programs head to head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from gyroquant.cli.common import AsJson, Debug, print_json

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}


def _names(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _numbers(text: str, option: str) -> list[int]:
    from gyroquant.errors import InputError

    try:
        return [int(word) for word in _names(text)]
    except ValueError as error:
        raise InputError(f"{option} takes numbers with commas between them, such as 2,3,4, not {text!r}") from error


def _seconds(text: str | None) -> float | None:
    """Seconds of a text such as 90s, 45m, 2h or 1.5d."""
    from gyroquant.errors import InputError

    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not found:
        raise InputError(f"--budget takes a time such as 45m or 2h, not {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def compare(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, or a name on the hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of results; what is there is not run again.")],
    recipes: Annotated[str, typer.Option(help="Recipes, with commas; rtn and gptq are always among them.")],
    text: Annotated[str, typer.Option("--text", help="The text to calibrate on.")],
    test: Annotated[list[str] | None, typer.Option(help="A text to measure on; may be given more than once.")] = None,
    preset: Annotated[list[str] | None, typer.Option(help="bbt (8 windows of 1024), standard (all, of 2048).")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens in a window to measure on, instead of a preset.")] = None,
    windows: Annotated[int | None, typer.Option(help="At most this many windows.")] = None,
    opponents: Annotated[
        str | None, typer.Option(help="Other programs, such as auto-round,nncf,llama.cpp:Q2_K.")
    ] = None,
    bits: Annotated[str, typer.Option(help="Numbers of bits.")] = "2,3,4",
    group_size: Annotated[str, typer.Option(help="Group sizes; -1 is a whole row.")] = "64",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Grids without zero points.")] = False,
    seeds: Annotated[int, typer.Option(help="Seeds of what is random in a recipe.")] = 1,
    nsamples: Annotated[int, typer.Option(help="Windows of text to calibrate on.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens in each window.")] = 512,
    tasks: Annotated[str | None, typer.Option(help="Zero-shot tasks of lm-evaluation-harness, with commas.")] = None,
    task_limit: Annotated[int | None, typer.Option(help="At most this many questions of each.")] = None,
    effort: Annotated[str | None, typer.Option(help="light or best, of recipes that have them.")] = None,
    change: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change every recipe.")] = None,
    keep_activations: Annotated[
        bool, typer.Option("--keep-activations", help="Round activations and KV cache too, where a recipe does.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of what is measured.")] = "float32",
    budget: Annotated[str | None, typer.Option(help="Begin nothing that takes longer than this, such as 2h.")] = None,
    workers: Annotated[int | None, typer.Option(help="Cells at once, as far as memory has room.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each.")] = None,
    ray: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster; local starts one.")] = None,
    environments: Annotated[Path | None, typer.Option(help="The folder of other programs' environments.")] = None,
    make_environments: Annotated[
        bool, typer.Option("--make-environments", help="Install other programs that are missing there.")
    ] = False,
    merge: Annotated[list[Path] | None, typer.Option(help="Take over the results of another OUT.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run methods head to head on one model and say which to use; the page is OUT/index.html."""
    import gyroquant as gq
    from gyroquant.report import console, summaries

    found = gq.compare(
        model,
        _names(recipes),
        out,
        text,
        test or ["wikitext2"],
        presets=preset or ["bbt"],
        window=window,
        max_windows=windows,
        opponents=_names(opponents),
        bits=_numbers(bits, "--bits"),
        group_sizes=_numbers(group_size, "--group-size"),
        symmetric=symmetric,
        seeds=seeds,
        nsamples=nsamples,
        seqlen=seqlen,
        tasks=_names(tasks),
        task_limit=task_limit,
        effort=effort,
        changes=change or (),
        keep_activations=keep_activations,
        dtype=dtype,
        budget=_seconds(budget),
        workers=workers,
        threads=threads,
        ray=ray,
        environments=environments,
        make_environments=make_environments,
        merge=merge or (),
        progress=console.ConsoleStages(),
    )
    if as_json:
        print_json(found)
    else:
        console.show(*summaries.compared(found, str(out)))
