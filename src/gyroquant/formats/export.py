"""Exports a folder that gyroquant wrote to the format of another program, and checks that program's output."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError, ProofError
from gyroquant.formats import usage_check
from gyroquant.formats.base import Format, check_fit, format_named, requirements_of
from gyroquant.formats.gguf.requantize import requantized
from gyroquant.formats.model_card import write_export_card
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.formats.output_folder import OutputFolder, check_destination, check_room
from gyroquant.formats.runtime import Runtime, open_runtime
from gyroquant.formats.ties import UntiedStore, without_ties
from gyroquant.models.stores.config_loading import read_json
from gyroquant.models.stores.packed import PackedStore
from gyroquant.models.stores.source import open_model
from gyroquant.system.checksums import write_checksums
from gyroquant.system.environment import versions
from gyroquant.system.progress import Progress

MANIFEST = "gyroquant_export.json"
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".onnx", ".data", ".pth", ".pte")  # endings of files that hold weights
TOLERANCE = 1e-3  # allowed error relative to the largest logit: programs add in another order
IN_FILE = "the model with the weights of the file"
"""What an export is compared with if its weights differ so that the logits of the saved model are not comparable."""
_LOGIT_ERROR_PER_DEVIATION = 20  # allowed logit error per relative deviation of a weight; 4 to 6 measured with Q4_1


def export(
    out: str | Path,
    format_name: str,
    destination: str | Path,
    *,
    requantize: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Exports a folder that gyroquant wrote to another format. Returns the manifest of the export.

    out: a folder that `gyroquant quantize` wrote.
    format_name: the name of a format; see `formats`.
    destination: the folder to write.
    requantize: a type of llama.cpp, such as Q4_K_M. llama.cpp then rounds all weights again. The loss is measured, and
        no loss is too large. Default: None.
    overwrite: whether to replace `destination` if it exists. Default: False.
    check: whether to run the format's program before the folder gets its name: on a prompt, on single tokens after it
        and on a padded batch, in fp32 and as the program runs by default (`gyroquant.formats.usage_check`).
        Default: True.
    progress: where to report progress. Default: nowhere.

    Raises InputError before any work, with every reason why the model does not fit. Raises ProofError, and leaves
    nothing behind, if the program computes another model.
    """
    chosen = format_named(format_name)
    if requantize is not None:
        chosen = requantized(chosen, requantize)
    store = open_saved(out)
    weights = store.weights
    needs = requirements_of(store)
    check_fit(chosen, needs)
    chosen.check_packages()
    if chosen.capabilities.unties:
        store = without_ties(store, needs.tie_points)
    destination, progress = Path(destination), progress or Progress()
    check_destination(destination, overwrite, [store.folder])
    with OutputFolder(destination, overwrite) as folder:
        check_room(destination, 2 * sum(path.stat().st_size for path in store.folder.glob("*.safetensors")))
        with progress.stage("write", len(store.description["tensors"])) as store.read_one:
            facts = chosen.write(store, folder)
            if isinstance(store, UntiedStore):
                facts = with_deviation(facts, store.facts())
        manifest: dict[str, Any] = {"format": chosen.name, "source": str(out), "facts": facts, "versions": versions()}
        manifest |= _sizes(folder.partial, weights)
        tolerance = tolerance_of(facts)
        with progress.stage("check", 1) as done:
            manifest["check"] = _check_export(chosen, folder.partial, store, tolerance) if check else None
            done()
        folder.json(MANIFEST, manifest)
        write_export_card(folder.partial, manifest, store.folder, chosen)
        write_checksums(folder.partial)
        folder.commit()
    return manifest


def _sizes(folder: Path, weights: int) -> dict[str, Any]:
    """The bytes of an export's files, of those that hold weights, and the bits of the latter per weight of the model.

    What a file holds besides weights counts: the graph of an ONNX model, the tokenizer of a GGUF file.
    """
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    held = sum(count for name, count in files.items() if name.endswith(_WEIGHTS) and "tokenizer" not in name)
    return {
        "bytes": sum(files.values()),
        "weight_bytes": held,
        "whole_model_bits_per_weight": 8 * held / weights,
    }


def formats(out: str | Path | None = None) -> list[dict[str, Any]]:
    """Every format and what it can hold. With `out`, a folder that gyroquant wrote, also why the model does not fit
    (`problems`), and what an export would hold otherwise (`changes`).
    """
    needs = None if out is None else requirements_of(open_saved(out))
    entries = []
    for name, kind in Format.registry.items():
        format_ = kind()
        holds = format_.capabilities
        entry: dict[str, Any] = {"format": name, "title": format_.title, "dense": holds.dense}
        entry["weights"] = [str(weight_type) for weight_type in holds.weights]
        if holds.any_grid:
            entry["weights"].append("codes of every grid")
        entry["online_maps"] = sorted(holds.points)
        entry["model_types"] = None if holds.model_types is None else list(holds.model_types)
        if needs is not None:
            entry |= {"problems": format_.incompatibilities(needs), "changes": format_.changes(needs)}
        entries.append(entry)
    return entries


def open_saved(out: str | Path) -> PackedStore:
    """Opens a folder of codes that gyroquant wrote. Raises InputError for any other model."""
    store = open_model(out)
    if not isinstance(store, PackedStore):
        raise InputError(f"{out} is not a folder of codes that gyroquant wrote; run `gyroquant quantize` first")
    return store


def tolerance_of(facts: Mapping[str, Any]) -> float:
    """The allowed error of an export's logits, relative to the largest logit. It grows with the deviation of the
    weights that the format reports. It is infinite if the weights were rounded again.
    """
    return inf if "requantized" in facts else TOLERANCE + _LOGIT_ERROR_PER_DEVIATION * facts.get("deviation", 0.0)


def with_deviation(facts: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with more facts. `deviation` is the larger of both."""
    return {**facts, **more, "deviation": max(facts.get("deviation", 0.0), more["deviation"])}


def _check_export(chosen: Format, folder: Path, store: PackedStore, tolerance: float) -> dict[str, Any]:
    """How the program of a format differs from gyroquant in use, or why it was not run. Raises ProofError if it
    computes another model.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(store.text_config.vocab_size, (usage_check.PROMPT + usage_check.SHORTER,), generator=draw)
    try:
        runtime = open_runtime(chosen.name, folder, exact=True)
    except InputError as error:
        return {"not_run": str(error)}
    texts = usage_check.texts_of(ids, usage_check.STEPS, longest_text(store, runtime))
    reference = TransformersRuntime(store.folder, exact=True)
    usage, more = usage_check.usage_of(reference, *texts), dict[str, Any]()
    if TOLERANCE < tolerance < inf and _faults(runtime, usage, tolerance):
        # A weight that differs by 1e-4 can change which experts run, or add up in a recurrent state
        for name in store.description["tensors"]:
            reference.set_parameter(name, chosen.weight_in_file(store, name))
        usage, more, tolerance = usage_check.usage_of(reference, *texts), {"compared_with": IN_FILE}, TOLERANCE
    result: dict[str, Any] = {"runtime": runtime.title, "tokens": len(texts[0]) + len(usage.tokens), **more}
    result |= _check_usage(runtime, usage, tolerance, chosen.name, store.folder)
    del runtime
    by_default = open_runtime(chosen.name, folder, exact=False)
    try:
        result["as_it_runs"] = _check_usage(by_default, usage, tolerance, chosen.name, store.folder)
    except RuntimeError as error:  # the code of some architectures does not run in 16 bits
        result["as_it_runs"] = usage_check.not_run(str(error))
    return result


def _faults(runtime: Runtime, usage: usage_check.Usage, tolerance: float) -> list[str]:
    measured = usage_check.compare_usage(runtime, usage, near_tie(tolerance, exact=True))
    return usage_check.faults(measured, tolerance, exact=True)


def _check_usage(
    runtime: Runtime, usage: usage_check.Usage, tolerance: float, name: str, source: Path
) -> dict[str, Any]:
    """The comparison of an export with its source (`usage_check.compare_usage`). Raises ProofError if they differ."""
    measured = usage_check.compare_usage(runtime, usage, near_tie(tolerance, runtime.exact))
    faults = usage_check.faults(measured, tolerance, runtime.exact)
    if faults:
        mode = "in fp32" if runtime.exact else "as it runs by default"
        raise ProofError(
            f"the {name} export is another model than {source} when {runtime.title} runs it {mode}: "
            f"{'; '.join(faults)}. No export was written; --no-check (check=False) writes it unchecked"
        )
    return measured


def near_tie(tolerance: float, exact: bool) -> float:
    """The relative error of logits up to which a greedy token that differs counts as a near tie."""
    limit = TOLERANCE if tolerance == inf else tolerance
    return limit if exact else max(limit, usage_check.DEFAULT_ERROR)


def longest_text(store: PackedStore, runtime: Runtime) -> int | None:
    """The largest number of tokens that both models accept, or None if neither has a limit."""
    limits = (store.graph.max_positions, runtime.longest)
    return min((limit for limit in limits if limit), default=None)


def read_manifest(destination: Path) -> dict[str, Any]:
    """The manifest of an export. Raises InputError if the folder is not an export or its manifest is damaged."""
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
    """The largest difference of logits divided by the largest logit. Both have shape (length, words). Infinite if some
    of `theirs` are not finite.
    """
    if not theirs.isfinite().all():
        return inf
    return float((theirs[:, : ours.shape[1]] - ours).abs().max() / ours.abs().max())
