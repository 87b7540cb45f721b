"""Options and functions of several commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer

from gyroquant.errors import InputError
from gyroquant.formats.push import check_push, push, push_command

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a GGUF file, or a name on the hub.")]
Changes = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change the recipe, e.g. weights.bits=2.")
]
Effort = Annotated[
    str | None,
    typer.Option("--effort", help="light, default or best, for recipes with efforts (gyro-w2, ...)."),
]
TextSource = Annotated[
    str | None,
    typer.Option(
        "--text", help="A text, .jsonl, .json or .parquet file, wikitext2, c4, pile-10k, or name:split:column."
    ),
]
NoBos = Annotated[
    bool, typer.Option("--no-bos", help="Do not begin every window of text with the tokenizer's BOS tokens.")
]
Device = Annotated[str, typer.Option(help="The device to compute on: cpu, cuda, ...")]
TASKS_HELP = (
    "Zero-shot tasks, separated by commas: offline (cloze, arithmetic, spelling, code and brackets, which need no "
    "network), some of these, or tasks of lm-evaluation-harness."
)
TaskSeed = Annotated[int, typer.Option(help="The seed of the items of offline tasks.")]
TaskText = Annotated[
    str | None,
    typer.Option(help="The text to make items of cloze and spelling from. Default: Python's language reference."),
]

Push = Annotated[
    str | None, typer.Option("--push", metavar="NAME", help="Push the result to the hub, as OWNER/NAME or NAME.")
]
Public = Annotated[bool, typer.Option("--public", help="Everyone may see what is pushed. Default: private.")]


def check_push_options(name: str | None, public: bool) -> None:
    """Raises InputError, before any work, if a push as `--push` and `--public` ask for cannot be done."""
    if name is not None:
        check_push(name, public)
    elif public:
        raise InputError("--public is for --push NAME; add --push, or leave out --public")


def push_output(folder: Path, name: str | None, public: bool, as_json: bool) -> dict[str, str]:
    """Pushes a result if `--push` asks for it. Prints the address, or, with `as_json`, returns it as an entry."""
    if name is None:
        return {}
    try:
        address = push(folder, name, public=public)
    except KeyboardInterrupt as error:
        error.left = (  # type: ignore[attr-defined]
            f"{folder} is complete; run `{push_command(folder, name, public)}` to push it"
        )
        raise
    if not as_json:
        print(f"pushed to {address}")
    return {"pushed": address}


def changes(
    given: list[str] | None, nsamples: int | None, seqlen: int | None, seed: int | None, no_bos: bool = False
) -> list[str]:
    """The changes of a recipe by --set, followed by those of --nsamples, --seqlen, --seed and --no-bos."""
    result = list(given or ())
    if nsamples is not None:
        result.append(f"calibration.nsamples={nsamples}")
    if seqlen is not None:
        result.append(f"calibration.seqlen={seqlen}")
    if seed is not None:
        result += [f"seed={seed}", f"calibration.seed={seed}"]
    if no_bos:
        result.append("calibration.add_bos=false")
    return result


def comma_separated(text: str | None) -> list[str]:
    """The words of an option that takes several, separated by commas. Empty for None."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def quiet_transformers() -> None:
    """Makes transformers print errors only, and no progress bars."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def print_json(data: Any) -> None:
    """Prints a result as JSON to stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))
