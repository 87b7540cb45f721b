"""From a folder that gyroquant wrote to one that other programs open, and the proof that they see the same model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gyroquant.export.hf
import gyroquant.export.known  # noqa: F401  (registers the formats)
from gyroquant.calibration.text import load_text, token_stream
from gyroquant.environment import versions
from gyroquant.errors import InputError, ProofError
from gyroquant.export.folder import OutputFolder, check_destination, check_room
from gyroquant.export.formats import Format, Layer, Needs, check_fit, format_named, needs_of
from gyroquant.export.requantize import requantized
from gyroquant.footprint import footprint
from gyroquant.grids import Grid
from gyroquant.integrity import check_files, read_sums, seal
from gyroquant.job import Job
from gyroquant.models.outside import read_json
from gyroquant.models.packed import PackedStore
from gyroquant.models.source import open_model
from gyroquant.progress import Advance, Stages
from gyroquant.rounding.allocate import grids_by_bits
from gyroquant.runtimes import Runtime, TransformersRuntime, in_use, open_runtime

MANIFEST = "gyroquant_export.json"
TOLERANCE = 1e-3  # of the largest logit: sums in another order
_SPREAD = 20  # what the logits may be off by for each part that a weight is: 4 to 6 were seen with GGUF's Q4_1


def export(
    out: str | Path,
    format_name: str,
    destination: str | Path,
    *,
    requantize: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    progress: Stages | None = None,
) -> dict[str, Any]:
    """Writes a folder that gyroquant wrote in another format; returns what stands in its manifest.

    With `check`, the program of the format is run as it will be used before the folder is put in place: a prompt,
    single tokens after it and a padded batch, in fp32 and as it runs by default (`runtimes.in_use`). With `requantize`,
    a type of llama.cpp such as Q4_K_M, llama.cpp rounds all weights again; what that loses is measured, and nothing too
    much. Raises InputError with every reason why the model does not fit, before any work, and
    ProofError, leaving nothing, when the program sees another model.
    """
    chosen = format_named(format_name)
    if requantize is not None:
        chosen = requantized(chosen, requantize)
    store = open_saved(out)
    check_fit(chosen, needs_of(store))
    chosen.check_packages()
    destination, progress = Path(destination), progress or Stages()
    check_destination(destination, overwrite, [store.folder])
    with OutputFolder(destination, overwrite) as folder:
        check_room(destination, 2 * sum(path.stat().st_size for path in store.folder.glob("*.safetensors")))
        with progress.stage("write", len(store.description["tensors"])) as store.read_one:
            facts = chosen.write(store, folder)
        manifest: dict[str, Any] = {"format": chosen.name, "source": str(out), "facts": facts, "versions": versions()}
        manifest["bytes"] = sum(path.stat().st_size for path in folder.partial.iterdir())
        tolerance = _tolerance(facts)
        with progress.stage("check", 1) as done:
            manifest["check"] = _checked(chosen, folder.partial, store, tolerance) if check else None
            done()
        folder.json(MANIFEST, manifest)
        seal(folder.partial)
        folder.commit()
    return manifest


def check_job(format_name: str, job: Job) -> None:
    """Raises InputError, before any work, where the result of a quantization would not fit a format."""
    chosen = format_named(format_name)
    check_fit(chosen, needs_of_job(job))
    chosen.check_packages()


def formats(out: str | Path | None = None) -> list[dict[str, Any]]:
    """Every format with what it can hold and, for a folder that gyroquant wrote, every reason why it does not fit."""
    needs = None if out is None else needs_of(open_saved(out))
    found = []
    for name, one in sorted(Format.kinds.items()):
        carries = one.carries
        entry: dict[str, Any] = {"format": name, "title": one.title, "dense": carries.dense}
        entry["weights"] = [str(kind) for kind in carries.weights]
        entry["online_maps"] = sorted(carries.points)
        entry["model_types"] = None if carries.model_types is None else list(carries.model_types)
        found.append(entry | ({} if needs is None else {"problems": one.problems(needs)}))
    return found


def open_saved(out: str | Path) -> PackedStore:
    """A folder that gyroquant wrote with codes. Raises InputError for any other model."""
    store = open_model(out)
    if not isinstance(store, PackedStore):
        raise InputError(f"{out} is not a folder of codes that gyroquant wrote; run `gyroquant quantize` first")
    return store


def needs_of_job(job: Job) -> Needs:
    """What the result of a quantization is going to need; every width that it may choose among counts."""
    weights = job.recipe.weights
    layers: list[Layer] = []
    for name, op in job.targets.items():
        grids: Iterable[Grid] = [job.grids[name]]
        if weights.allocate is not None:
            grids = grids_by_bits(weights.grid, weights.allocate.bits).values()
        plain = weights.basis is None
        layers += [Layer(name, grid, op.in_features, plain, op.entry.stacked) for grid in grids]
    online = (*job.plan.online, *job.quantizers)
    return Needs(job.graph.config.model_type, tuple(layers), online, job.graph.config)


def _tolerance(facts: Mapping[str, Any]) -> float:
    """What the logits of an export may be off by, relative to the largest: more where the format says by how much its
    weights deviate, and anything where they were rounded again.
    """
    return inf if "requantized" in facts else TOLERANCE + _SPREAD * facts.get("deviation", 0.0)


def _checked(chosen: Format, folder: Path, store: PackedStore, tolerance: float) -> dict[str, Any]:
    """How the program of a format differs from us when it is used, or why that is not known."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(store.text_config.vocab_size, (in_use.PROMPT + in_use.SHORTER,), generator=draw)
    try:
        runtime = open_runtime(chosen.name, folder, exact=True)
    except InputError as error:
        return {"not_run": str(error)}
    texts = in_use.texts_of(ids, in_use.STEPS, _longest(store, runtime))
    usage = in_use.usage_of(TransformersRuntime(store.folder, exact=True), *texts)
    result: dict[str, Any] = {"runtime": runtime.title, "tokens": len(texts[0]) + len(usage.tokens)}
    result |= _held_to(runtime, usage, tolerance, chosen.name, store.folder)
    del runtime
    by_default = open_runtime(chosen.name, folder, exact=False)
    return result | {"as_it_runs": _held_to(by_default, usage, tolerance, chosen.name, store.folder)}


def _held_to(runtime: Runtime, usage: in_use.Usage, tolerance: float, name: str, against: Path) -> dict[str, Any]:
    """What comparing the use of an export gives. Raises ProofError where it is another model."""
    measured = in_use.compare_usage(runtime, usage, _near(tolerance, runtime.exact))
    faults = in_use.faults(measured, tolerance, runtime.exact)
    if faults:
        way = "in fp32" if runtime.exact else "as it runs by default"
        raise ProofError(
            f"{runtime.title} {way} makes another model of the {name} export than gyroquant of {against}: "
            f"{'; '.join(faults)}. No export was written; --no-check (check=False) writes it unchecked"
        )
    return measured


def _near(tolerance: float, exact: bool) -> float:
    """What logits may be off by where a greedy token that differs is a near tie."""
    limit = TOLERANCE if tolerance == inf else tolerance
    return limit if exact else max(limit, in_use.DEFAULT_ERROR)


def _longest(store: PackedStore, runtime: Runtime) -> int | None:
    """How many tokens both models take."""
    known = (getattr(store.config, "max_position_embeddings", None), runtime.longest)
    return min((one for one in known if one), default=None)


def read_manifest(destination: Path) -> dict[str, Any]:
    """What an export says of itself. Raises InputError for a folder that is none, or whose manifest is damaged."""
    try:
        manifest = read_json(destination / MANIFEST)
        for key, kind in (("format", str), ("facts", dict), ("bytes", int)):
            if not isinstance(manifest.get(key), kind):
                raise InputError(f"{key} is missing or damaged")
    except InputError as error:
        raise InputError(
            f"{destination} is not an export of gyroquant (it has no usable {MANIFEST}: {error})"
        ) from error
    return manifest


def relative_error(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference of logits over the largest logit, both of shape (length, words); infinite where some of
    `theirs` are not finite.
    """
    if not theirs.isfinite().all():
        return inf
    return float((theirs[:, : ours.shape[1]] - ours).abs().max() / ours.abs().max())


def verify_export(
    destination: str | Path,
    against: str | Path,
    text: str | Path | None = None,
    *,
    tokens: int = 32,
    window: int = 256,
    max_windows: int = 4,
    devices: bool = False,
    progress: Stages | None = None,
) -> dict[str, Any]:
    """Runs an export by its own program, once in fp32 throughout and once as that program does by default, and compares
    it with the folder that it was made from.

    For each way: how it differs when it is used (`runtimes.in_use`: a prompt, `tokens` single tokens after it, a padded
    batch), and on windows of `text` (random tokens where there is none) the largest difference of logits, KL divergence
    in nats a token, agreement of the most likely token and perplexity of both; as it runs by default also its
    `footprint`. Windows are read in several calls, so that the KV cache is in play as the program keeps it (`reading`).
    With `devices`, also on every device that the program finds, as it runs there by default. No tolerance applies to
    weights that were rounded again. Raises InputError when the program cannot be run here or a file of the export is
    damaged.
    """
    destination = Path(destination)
    manifest = read_manifest(destination)
    check_files(destination, read_sums(destination) or ())
    store = open_saved(against)
    batch = _windows(store, text, window, max_windows)
    reference, progress = TransformersRuntime(Path(against), exact=True), progress or Stages()
    runtimes = {way: open_runtime(manifest["format"], destination, way == "exact") for way in ("exact", "default")}
    runtime = runtimes["exact"]
    if devices:
        runtimes |= runtime.on_devices(destination)
    texts = in_use.texts_of(batch.flatten()[: 2 * in_use.PROMPT], tokens, _longest(store, runtime))
    usage, tolerance = in_use.usage_of(reference, *texts), _tolerance(manifest["facts"])
    ways: dict[str, Any] = {}
    for way, one in runtimes.items():
        with progress.stage(way, len(batch)) as advance:
            ways[way] = _compared(one, reference, batch, usage, tolerance, advance)
    with progress.stage("speed", 1) as advance:
        ways["default"] |= footprint(manifest["format"], destination, batch[0].tolist(), tokens, exact=False)
        advance()
    return {"format": manifest["format"], "runtime": runtime.title, "against": str(against), "ways": ways} | {
        "text": None if text is None else str(text),
        "tokens": batch.numel(),
        "reading": in_use.reading(batch.shape[1]),
        "bytes": manifest["bytes"],
        "facts": manifest["facts"],
        "tolerance": None if tolerance == inf else tolerance,
        "passed": not any(way["faults"] for way in ways.values()),
        "versions": versions(),
    }


def _windows(store: PackedStore, text: str | Path | None, window: int, count: int) -> Tensor:
    if text is None:
        generator = torch.Generator().manual_seed(0)
        length = min(window, getattr(store.text_config, "max_position_embeddings", window))
        return torch.randint(store.text_config.vocab_size, (1, length), generator=generator)
    source = load_text(text, split="test")
    return token_stream(source, store.tokenizer(), store.text_config.vocab_size).windows(window, count).ids


def _measured(runtime: Runtime, reference: Runtime, batch: Tensor, advance: Advance = lambda: None) -> dict[str, float]:
    """How far the logits of texts, (texts, length), read through the KV cache, are from those of the reference."""
    error, divergence, agreed, losses = 0.0, 0.0, 0, [0.0, 0.0]
    for ids in batch:
        ours, theirs = reference.logits(ids), in_use.read_in_pieces(runtime, ids)
        theirs = theirs[:, : ours.shape[1]]
        error = max(error, relative_error(theirs, ours))
        p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        for place, one in enumerate((p, q)):
            losses[place] -= float(one[:-1].gather(1, ids[1:, None]).sum())
        advance()
    predicted = len(batch) * (batch.shape[1] - 1)
    return {
        "relative_logit_error": error,
        "kl": divergence / batch.numel(),
        "top1_agreement": agreed / batch.numel(),
        "perplexity": _exp(losses[1] / predicted),
        "perplexity_ours": _exp(losses[0] / predicted),
    }


def _exp(value: float) -> float:
    return float(torch.tensor(value).exp())  # of what is too large it is infinite, no error


def _compared(
    runtime: Runtime,
    reference: Runtime,
    batch: Tensor,
    usage: in_use.Usage,
    tolerance: float,
    advance: Advance,
) -> dict[str, Any]:
    """As `_measured`, and how an export differs when it is used; `faults` are what speaks against it."""
    used = in_use.compare_usage(runtime, usage, _near(tolerance, runtime.exact))
    measured = _measured(runtime, reference, batch, advance)
    faults = in_use.faults(used, tolerance, runtime.exact)
    if runtime.exact and not measured["relative_logit_error"] <= tolerance:
        error = measured["relative_logit_error"]
        faults.append(f"the text: relative error of the logits {error:.1e}, allowed {tolerance:.0e}")
    largest = max(used["relative_logit_error"], measured["relative_logit_error"])
    return used | measured | {"relative_logit_error": largest, "faults": faults}
