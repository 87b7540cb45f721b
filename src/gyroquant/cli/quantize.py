"""`gyroquant quantize`: quantizes a model and, if requested, exports it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from gyroquant.cli.common import (
    AsJson,
    Changes,
    Debug,
    Device,
    Effort,
    Model,
    NoBos,
    Public,
    Push,
    TextSource,
    changes,
    check_push_options,
    print_json,
    push_output,
)
from gyroquant.errors import InputError
from gyroquant.formats import export as deploy
from gyroquant.formats.base import format_named
from gyroquant.models.stores.source import open_original
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.export_requirements import check_job
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.options import OutputOptions
from gyroquant.pipeline.sizes import PRESET_BITS, preset_bits
from gyroquant.pipeline.validation import only_journal_left
from gyroquant.recipes.schema import load_recipe
from gyroquant.recipes.size import parse_size, with_size
from gyroquant.report import console, summaries
from gyroquant.system.checksums import CHECKSUM_FILE
from gyroquant.system.worker_pool import Workers

RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", "-r", metavar="NAME", help="A recipe or a YAML file; see `gyroquant recipes`. Default: gyro-w4."
    ),
]
Bits = Annotated[int | None, typer.Option(help="Bits of a weight: 2, 3 or 4 of the default recipe, or of NAME.")]
Size = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Choose bits so that all weights take at most this, e.g. 60MB.")
]
Ray = Annotated[str | None, typer.Option(metavar="ADDRESS", help="Round blocks on a Ray cluster; `local` starts one.")]
Format = Annotated[
    str | None, typer.Option("--format", help="Export OUT as well, into OUT/FORMAT; see `gyroquant formats`.")
]


def quantize(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    recipe: RecipeName = None,
    bits: Bits = None,
    size: Size = None,
    effort: Effort = None,
    change: Changes = None,
    text: TextSource = None,
    nsamples: Annotated[int | None, typer.Option(help="Number of calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens in each window.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random rotations and of the choice of windows.")] = None,
    no_bos: NoBos = False,
    dense: Annotated[
        bool, typer.Option("--dense", help="Write plain 16- or 32-bit weights that any loader opens.")
    ] = False,
    save_dtype: Annotated[
        str, typer.Option(help="dtype of parameters that are not rounded: auto, float16, bfloat16, float32.")
    ] = "auto",
    offload: Annotated[Path | None, typer.Option(help="Keep hidden states in files in this folder.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT when the new result is complete.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the journal of an earlier run.")] = False,
    workers: Annotated[int | None, typer.Option(help="Blocks in parallel; needs calibration.inputs=original.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads per worker.")] = None,
    ray: Ray = None,
    format: Format = None,
    push: Push = None,
    public: Public = False,
    device: Device = "cpu",
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Transform, prove, round and save a model."""
    check_push_options(push, public)
    if format is not None and not overwrite:
        _check_unexported(out, format)
    name = _recipe(model, recipe, bits, size)
    loaded = load_recipe(name, changes(change, nsamples, seqlen, seed, no_bos), effort)
    if size is not None:
        loaded = with_size(loaded, parse_size(size))
    options = OutputOptions(
        dense=dense,
        overwrite=overwrite,
        device=device,
        save_dtype=save_dtype,
        offload=offload,
        fresh=fresh,
        workers=None if (workers, threads, ray) == (None, None, None) else Workers(workers, threads, ray),
    )
    job = prepare(model, out, loaded, text, options=options, reads=[name])
    if format is not None:
        check_job(format, job)
    manifest = pipeline.run(job, console.ConsoleProgress())
    if format is not None:
        manifest["export"] = _export(out, format)
    if not as_json:
        _show(manifest, out)
    manifest |= push_output(out, push, public, as_json)
    if as_json:
        print_json(manifest)


def _recipe(model: str, recipe: str | None, bits: int | None, size: str | None) -> str:
    """The recipe's name: the given one at these bits, or ours at the bits that are given or that a size leaves."""
    if recipe is not None:
        if bits is not None:
            raise InputError(
                f"--bits is for the default recipe; write --set weights.bits={bits} with --recipe {recipe}"
            )
        return recipe
    if bits is None:
        bits = 4 if size is None else preset_bits(open_original(model), parse_size(size))
    if bits not in PRESET_BITS:
        raise InputError(f"--bits is 2, 3 or 4, not {bits}; other bits are settings of a recipe (weights.bits)")
    return f"gyro-w{bits}"


def _show(manifest: dict[str, Any], out: Path) -> None:
    console.show(*summaries.quantized(manifest, str(out)))
    if "export" in manifest:
        exported = manifest["export"]
        console.show(*summaries.exported(exported, str(out / exported["format"])))


def _export(out: Path, format: str) -> dict[str, Any]:
    try:
        return deploy.export(out, format, out / format, progress=console.ConsoleProgress())
    except BaseException as error:
        error.left = f"{out} is complete; run `{_export_command(out, format)}` to export it"  # type: ignore[attr-defined]
        raise


def _export_command(out: Path, format: str) -> str:
    return shlex.join(["gyroquant", "export", str(out), str(out / format), "--format", format])


def _check_unexported(out: Path, format: str) -> None:
    """Raises InputError if the folder is complete and only its export is missing."""
    format_named(format)
    complete = (out / "gyroquant.json").is_file() and (out / CHECKSUM_FILE).is_file()
    if complete and not (out / format / deploy.MANIFEST).exists() and not only_journal_left(out):
        raise InputError(
            f"{out} is complete, except for its export; run `{_export_command(out, format)}` to export it, or use "
            "--overwrite to quantize again"
        )
