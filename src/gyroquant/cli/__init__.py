"""The command line. Each command is one call of a public function; results on stdout, bars and messages on stderr."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Annotated

import typer

from gyroquant.cli.chat import chat
from gyroquant.cli.common import AsJson, Changes, Debug, Device, Effort, Model, NoBos, TextSource, changes, print_json
from gyroquant.cli.compare import compare
from gyroquant.cli.deploy import export, formats, verify_export
from gyroquant.cli.quantize import quantize
from gyroquant.cli.rotations import rotations
from gyroquant.cli.verify import verify

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Rotate, prove, round and save language models: post-training quantization on a CPU.",
)


app.command()(quantize)


@app.command()
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
    from gyroquant import api
    from gyroquant.report import console, summaries

    result = api.evaluate(
        model,
        text,
        against,
        preset=preset,  # type: ignore[arg-type]  # checked there
        window=window,
        max_windows=windows,
        add_bos=not no_bos,
        dtype=dtype,
        device=device,
        progress=console.ConsoleStages(),
    )
    if as_json:
        print_json(result)
    else:
        console.show(*summaries.evaluated(result))


@app.command()
def inspect(
    model: Model,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Predict memory and time of this recipe.")
    ] = None,
    effort: Effort = None,
    change: Changes = None,
    text: TextSource = None,
    nsamples: Annotated[int | None, typer.Option(help="Windows of text, as for quantize.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in each window.")] = None,
    no_bos: NoBos = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only what the recipe takes: memory of every stage, disk and time.")
    ] = False,
    offload: Annotated[Path | None, typer.Option(help="As for quantize.")] = None,
    device: Device = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show a model's sites, which recipes fit it, where its outliers are, and what a recipe will take."""
    from gyroquant.inspection import inspect_model
    from gyroquant.report import console, summaries

    result = inspect_model(
        model,
        recipe,
        changes(change, nsamples, seqlen, None, no_bos),
        text,
        effort=effort,
        add_bos=not no_bos,
        device=device,
        dry_run=dry_run,
        offload=offload,
        progress=console.ConsoleStages(),
    )
    if as_json:
        print_json(result.to_dict())
    else:
        console.show(*(summaries.predicted(result) if dry_run else summaries.inspected(result)))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Show this recipe whole.")] = None,
    effort: Effort = None,
    change: Changes = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the recipes, or show one as YAML with every setting."""
    import yaml

    from gyroquant.presets import preset_names
    from gyroquant.recipe import load_recipe
    from gyroquant.report import console

    if name is None:
        found = {preset: load_recipe(preset).description for preset in preset_names()}
        if as_json:
            print_json(found)
        else:
            console.show(console.table("", ("recipe", "what it does"), list(found.items())))
        return
    data = load_recipe(name, change or (), effort).to_dict()
    print(json.dumps(data, indent=2) if as_json else yaml.safe_dump(data, sort_keys=False), end="\n" if as_json else "")


def _version(show: bool) -> None:
    if show:
        from gyroquant.environment import gyroquant_version

        print(gyroquant_version())
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


_INTERRUPTED = 130
_WANT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|[Cc]annot allocate memory|out of memory")  # as torch tells of it


def _fail(text: str, status: int) -> None:
    print(f"gyroquant: {text}", file=sys.stderr)
    raise SystemExit(status)


@app.command()
def fuzz(
    target: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A model type, a class name, or a folder with a config.json.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every causal language model that transformers has.")] = False,
    methods: Annotated[list[str] | None, typer.Option("--method", help="Only these methods.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Build a tiny random model of an architecture and prove every site with every method."""
    from gyroquant.errors import InputError
    from gyroquant.fuzz import Report, causal_model_types
    from gyroquant.fuzz import fuzz as run
    from gyroquant.report import console, summaries

    if every == (target is not None):
        raise InputError("give one MODEL, such as qwen3, or --all")
    reports = []
    for name in causal_model_types() if every else [target]:
        try:
            reports.append(run(str(name), methods, console.ConsoleStages()))
        except InputError as error:
            if not every:
                raise
            reports.append(Report(str(name), problem=str(error), known=False))
    print_json([one.to_dict() for one in reports]) if as_json else console.show(*summaries.fuzzed(reports))
    if any(one.wrong for one in reports):
        raise typer.Exit(1)


app.command()(export)
app.command("verify-export")(verify_export)
app.command()(verify)
app.command()(formats)
app.command()(chat)
app.command()(compare)

app.add_typer(rotations, name="rotations")


def main() -> None:
    """Runs the command line; exit status 0 only on success, errors on stderr without a traceback unless --debug."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    debug = "--debug" in sys.argv
    stopped = False

    def stop(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, stop)
    try:
        app(prog_name="gyroquant")
    except SystemExit as done:
        if done.code == _INTERRUPTED:  # typer turns Ctrl-C into this status
            print(f"gyroquant: interrupted; {_left(done)}", file=sys.stderr)
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        if stopped:  # compiled code may put an error of its own in place of the interruption
            _fail(f"interrupted; {_left(error)}", _INTERRUPTED)
        _fail(_message(error), 1)


def _left(error: BaseException | None) -> str:
    """What an error has left on the disk: what it says itself, the journal of a run that can go on, or nothing."""
    while error is not None:
        left = getattr(error, "left", None)
        if left is not None:
            return str(left)
        kept = getattr(error, "kept", None)
        if kept is not None:
            return f"the same command goes on from there (what is done is kept in {kept})"
        error = error.__cause__ or error.__context__
    return "nothing was left behind"


def _message(error: Exception) -> str:
    """What to tell the user about an error, in a line."""
    from gyroquant.errors import GyroquantError

    if isinstance(error, GyroquantError):
        return f"{error}; {_left(error)}" if hasattr(error, "left") else str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _WANT_OF_MEMORY.search(str(error))):
        return f"out of memory; use fewer or shorter samples (--nsamples, --seqlen) or --offload DIR; {_left(error)}"
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{place}; {_left(error)}"
    return (
        f"unexpected {type(error).__name__}: {error}\n"
        f"This is a bug; run again with --debug to see where; {_left(error)}"
    )


__all__ = ["app", "main"]
