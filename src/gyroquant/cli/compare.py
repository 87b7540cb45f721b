"""`gyroquant compare`: methods and external tools head to head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from gyroquant.benchmark import Limits
from gyroquant.benchmark import compare as run_comparison
from gyroquant.benchmark.console import compared
from gyroquant.cli.common import AsJson, Debug, NoBos, print_json
from gyroquant.errors import InputError
from gyroquant.report import console
from gyroquant.system.deprecation import warn_renamed

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, or a name on the hub.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder of results; what is there is not run again.")]
Recipes = Annotated[str, typer.Option(help="Recipes, with commas; rtn, gptq and gptq-act-order are always there.")]
Calibration = Annotated[str, typer.Option("--text", help="The text to calibrate on.")]
Tests = Annotated[list[str] | None, typer.Option(help="A text to measure on; may be given more than once.")]
Presets = Annotated[list[str] | None, typer.Option(help="bbt (8 windows of 1024), standard (all, of 2048).")]
Window = Annotated[int | None, typer.Option(help="Tokens in a window to measure on, instead of a preset.")]
Windows = Annotated[int | None, typer.Option(help="At most this many windows of that length.")]
ExternalTools = Annotated[
    str | None, typer.Option(help="External tools, with commas, such as auto-round,nncf,llama.cpp:Q2_K.")
]
Opponents = Annotated[str | None, typer.Option(hidden=True)]
Tasks = Annotated[str | None, typer.Option(help="Zero-shot tasks of lm-evaluation-harness, with commas.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change every recipe, not its bits or seeds.")
]
Keep = Annotated[bool, typer.Option("--keep-activations", help="Round activations and KV cache where a recipe does.")]
Budget = Annotated[
    str | None, typer.Option(help="Time for all runs, such as 2h: start none that would not end by then.")
]
Ray = Annotated[str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster; local starts one.")]
Places = Annotated[Path | None, typer.Option(help="The folder of the external tools' environments.")]
Make = Annotated[bool, typer.Option("--make-environments", help="Install external tools that are missing there.")]
Merge = Annotated[list[Path] | None, typer.Option(help="Take over the results of another OUT.")]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}


def _names(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(word) for word in _names(text)]
    except ValueError as error:
        raise InputError(f"{option} takes numbers with commas between them, such as 2,3,4, not {text!r}") from error


def _seconds(text: str | None) -> float | None:
    """Seconds of a text such as 90s, 45m, 2h or 1.5d."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not found:
        raise InputError(f"--budget takes a time such as 45m or 2h, not {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def compare(
    model: Model,
    out: Out,
    recipes: Recipes,
    text: Calibration,
    test: Tests = None,
    preset: Presets = None,
    window: Window = None,
    windows: Windows = None,
    external_tools: ExternalTools = None,
    opponents: Opponents = None,
    bits: Annotated[str, typer.Option(help="Numbers of bits.")] = "2,3,4",
    group_size: Annotated[str, typer.Option(help="Group sizes; -1 is a whole row.")] = "64",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Grids without zero points.")] = False,
    seeds: Annotated[int, typer.Option(help="Seeds of random rotations and calibration windows.")] = 1,
    nsamples: Annotated[int, typer.Option(help="Windows of text to calibrate on.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens in each window.")] = 512,
    tasks: Tasks = None,
    task_limit: Annotated[int | None, typer.Option(help="At most this many questions of each.")] = None,
    effort: Annotated[str | None, typer.Option(help="light or best, of recipes that have them.")] = None,
    change: Changes = None,
    keep_activations: Keep = False,
    no_bos: NoBos = False,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of what is measured.")] = "float32",
    budget: Budget = None,
    workers: Annotated[int | None, typer.Option(help="Runs at once, as far as memory has room.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each.")] = None,
    ray: Ray = None,
    environments: Places = None,
    make_environments: Make = False,
    merge: Merge = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run methods head to head on one model and say which to use; the page is OUT/index.html."""
    if opponents is not None:
        warn_renamed("--opponents", "--external-tools")
    grid = {
        "external_tools": _names(external_tools) + _names(opponents),
        "bits": _numbers(bits, "--bits"),
        "group_sizes": _numbers(group_size, "--group-size"),
        "symmetric": symmetric,
        "seeds": seeds,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "tasks": _names(tasks),
        "task_limit": task_limit,
        "effort": effort,
        "changes": change or (),
        "keep_activations": keep_activations,
        "add_bos": not no_bos,
    }
    where = {"environments": environments, "make_environments": make_environments, "merge": merge or ()}
    how: dict[str, Any] = {"presets": preset or ["bbt"], "window": window, "windows": windows, "dtype": dtype}
    limits, stages = Limits(_seconds(budget), workers, threads, ray), console.ConsoleProgress()
    how |= where | grid | {"limits": limits, "progress": stages}
    comparison = run_comparison(model, _names(recipes), out, text, test or ["wikitext2"], **how)
    print_json(comparison) if as_json else console.show(*compared(comparison, str(out)))
