"""`gyroquant compare`: compares recipes and external tools on one model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from gyroquant.benchmark import Limits
from gyroquant.benchmark import compare as run_comparison
from gyroquant.benchmark.console import compared
from gyroquant.cli.common import (
    TASKS_HELP,
    AsJson,
    Debug,
    NoBos,
    TaskSeed,
    TaskText,
    comma_separated,
    print_json,
)
from gyroquant.errors import InputError
from gyroquant.report import console
from gyroquant.system.deprecation import warn_renamed

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, or a name on the hub.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="The folder of results; runs in it are not repeated.")]
Recipes = Annotated[str, typer.Option(help="Recipes, with commas; rtn, gptq and gptq-act-order are always added.")]
Calibration = Annotated[str, typer.Option("--text", help="The text to calibrate on.")]
Tests = Annotated[list[str] | None, typer.Option(help="A text to measure on; repeat for several.")]
Presets = Annotated[list[str] | None, typer.Option(help="bbt (8 windows of 1024), standard (all, of 2048).")]
Window = Annotated[int | None, typer.Option(help="Tokens in an evaluation window, instead of a preset.")]
Windows = Annotated[int | None, typer.Option(help="At most this many windows of that length.")]
ExternalTools = Annotated[
    str | None, typer.Option(help="External tools, separated by commas, such as auto-round,nncf,llama.cpp:Q2_K.")
]
Opponents = Annotated[str | None, typer.Option(hidden=True)]
Bits = Annotated[
    str | None, typer.Option(help="Numbers of bits, separated by commas. Default: 2,3,4; none with --sizes.")
]
Sizes = Annotated[
    str | None,
    typer.Option(metavar="SIZES", help="Compare at equal bytes: sizes of all weights, such as 50MB,66MB."),
]
Tasks = Annotated[str | None, typer.Option(help=TASKS_HELP)]
TaskLimit = Annotated[
    int | None, typer.Option(help="At most this many questions per task. Default: all; 200 of each offline task.")
]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change every recipe, except for bits and seeds.")
]
Keep = Annotated[bool, typer.Option("--keep-activations", help="Round activations and KV cache if the recipe does.")]
Budget = Annotated[
    str | None, typer.Option(help="Time for all runs, such as 2h. Runs that would take longer are not started.")
]
Ray = Annotated[str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster; `local` starts one.")]
Environments = Annotated[Path | None, typer.Option(help="The folder of the external tools' environments.")]
MakeEnvironments = Annotated[
    bool, typer.Option("--make-environments", help="Install external tools that are missing there.")
]
Merge = Annotated[list[Path] | None, typer.Option(help="Add the results of another OUT; repeat for several.")]

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(word) for word in comma_separated(text)]
    except ValueError as error:
        raise InputError(f"{option} takes numbers, separated by commas, such as 2,3,4, not {text!r}") from error


def _sizes(text: str) -> list[str]:
    sizes = comma_separated(text)
    if not sizes:
        raise InputError("--sizes is empty: give sizes, separated by commas, such as 50MB,66MB")
    return sizes


def _seconds(text: str | None) -> float | None:
    """The seconds of a time such as 90s, 45m, 2h or 1.5d."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip())
    if not match:
        raise InputError(f"--budget takes a time such as 45m or 2h, not {text!r}")
    return float(match[1]) * _UNITS[match[2]]


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
    bits: Bits = None,
    sizes: Sizes = None,
    group_size: Annotated[str, typer.Option(help="Group sizes, separated by commas; -1 is a whole row.")] = "64",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Grids without zero points.")] = False,
    seeds: Annotated[int, typer.Option(help="Number of seeds, for random rotations and calibration windows.")] = 1,
    nsamples: Annotated[int, typer.Option(help="Number of calibration windows.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens in each window.")] = 512,
    tasks: Tasks = None,
    task_limit: TaskLimit = None,
    task_seed: TaskSeed = 0,
    task_text: TaskText = None,
    effort: Annotated[str | None, typer.Option(help="light or best, for recipes that have efforts.")] = None,
    change: Changes = None,
    keep_activations: Keep = False,
    no_bos: NoBos = False,
    dtype: Annotated[str, typer.Option(help="dtype of evaluation: float32, bfloat16 or float16.")] = "float32",
    budget: Budget = None,
    workers: Annotated[int | None, typer.Option(help="Number of runs in parallel; fewer if memory is short.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads per run.")] = None,
    ray: Ray = None,
    environments: Environments = None,
    make_environments: MakeEnvironments = False,
    merge: Merge = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare methods on one model and state which one to use; the page is OUT/index.html."""
    if opponents is not None:
        warn_renamed("--opponents", "--external-tools")
    grid = {
        "external_tools": comma_separated(external_tools) + comma_separated(opponents),
        "bits": None if bits is None else _numbers(bits, "--bits"),
        "sizes": [] if sizes is None else _sizes(sizes),
        "group_sizes": _numbers(group_size, "--group-size"),
        "symmetric": symmetric,
        "seeds": seeds,
        "nsamples": nsamples,
        "seqlen": seqlen,
        "tasks": comma_separated(tasks),
        "task_limit": task_limit,
        "task_seed": task_seed,
        "task_text": task_text,
        "effort": effort,
        "changes": change or (),
        "keep_activations": keep_activations,
        "add_bos": not no_bos,
    }
    folders = {"environments": environments, "make_environments": make_environments, "merge": merge or ()}
    options: dict[str, Any] = {"presets": preset or ["bbt"], "window": window, "windows": windows, "dtype": dtype}
    limits, progress = Limits(_seconds(budget), workers, threads, ray), console.ConsoleProgress()
    options |= folders | grid | {"limits": limits, "progress": progress}
    comparison = run_comparison(model, comma_separated(recipes), out, text, test or ["wikitext2"], **options)
    print_json(comparison) if as_json else console.show(*compared(comparison, str(out)))
