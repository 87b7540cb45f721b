"""Runs an export with its runtime and compares it with the folder that it was made from."""

from __future__ import annotations

from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.calibration.text import load_text, token_stream
from gyroquant.evaluation.divergence import agreeing, summed_divergence
from gyroquant.evaluation.speed import footprint
from gyroquant.formats import usage_check as in_use
from gyroquant.formats.export import longest_text, near_tie, open_saved, read_manifest, relative_error, tolerance_of
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.formats.runtime import Runtime, open_runtime
from gyroquant.models.stores.packed import PackedStore
from gyroquant.system.checksums import check_files, read_sums
from gyroquant.system.deprecation import renamed
from gyroquant.system.environment import versions
from gyroquant.system.progress import Advance, Progress


@renamed(max_windows="windows")
def verify_export(
    destination: str | Path,
    against: str | Path,
    text: str | Path | None = None,
    *,
    tokens: int = 32,
    window: int = 256,
    windows: int = 4,
    devices: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs an export with its runtime and compares it with the folder that it was made from.

    The export runs in two ways: "exact" computes in fp32, and "default" uses the runtime's defaults. Each way has two
    comparisons:

    - In use (`formats.usage_check`): a prompt, `tokens` single tokens after it, and a padded batch.
    - On windows of `text` (random tokens without a text): the largest difference of logits, KL divergence in nats per
      token, top-1 agreement, and both perplexities. Each window is read in several calls (`reading`), so that the
      runtime's KV cache is tested too.

    "default" also has the `footprint`. With `devices`, the export also runs on every device that the runtime finds,
    with the defaults. There is no tolerance for weights that the runtime rounded again. Raises InputError if the
    runtime cannot run here, or if a file of the export is damaged.
    """
    destination = Path(destination)
    manifest = read_manifest(destination)
    check_files(destination, read_sums(destination) or ())
    store = open_saved(against)
    batch = _windows(store, text, window, windows)
    reference, progress = TransformersRuntime(Path(against), exact=True), progress or Progress()
    runtimes = {way: open_runtime(manifest["format"], destination, way == "exact") for way in ("exact", "default")}
    runtime = runtimes["exact"]
    if devices:
        runtimes |= runtime.on_devices(destination)
    texts = in_use.texts_of(batch.flatten()[: 2 * in_use.PROMPT], tokens, longest_text(store, runtime))
    usage, tolerance = in_use.usage_of(reference, *texts), tolerance_of(manifest["facts"])
    ways: dict[str, Any] = {}
    for way, way_runtime in runtimes.items():
        with progress.stage(way, len(batch)) as advance:
            ways[way] = _compare(way_runtime, reference, batch, usage, tolerance, advance)
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
        length = min(window, store.graph.max_positions or window)
        return torch.randint(store.text_config.vocab_size, (1, length), generator=generator)
    source = load_text(text, split="test")
    return token_stream(source, store.tokenizer(), store.text_config.vocab_size).windows(window, count).ids


def _compare_logits(
    runtime: Runtime, reference: Runtime, batch: Tensor, advance: Advance = lambda: None
) -> dict[str, float]:
    """Compares logits with those of the reference on texts, shape (texts, length), read through the KV cache."""
    error, divergence, agreed, losses = 0.0, 0.0, 0, [0.0, 0.0]
    for ids in batch:
        ours, theirs = reference.logits(ids), in_use.read_in_pieces(runtime, ids)
        theirs = theirs[:, : ours.shape[1]]
        error = max(error, relative_error(theirs, ours))
        p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
        divergence += float(summed_divergence(p, q))
        agreed += int(agreeing(p, q))
        for index, logprobs in enumerate((p, q)):
            losses[index] -= float(logprobs[:-1].gather(1, ids[1:, None]).sum())
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
    return float(torch.tensor(value).exp())  # infinite for large values, where math.exp raises an error


def _compare(
    runtime: Runtime,
    reference: Runtime,
    batch: Tensor,
    usage: in_use.Usage,
    tolerance: float,
    advance: Advance,
) -> dict[str, Any]:
    """The results of `_compare_logits` and of the usage check. `faults` lists what exceeds the tolerance."""
    used = in_use.compare_usage(runtime, usage, near_tie(tolerance, runtime.exact))
    measured = _compare_logits(runtime, reference, batch, advance)
    faults = in_use.faults(used, tolerance, runtime.exact)
    if runtime.exact and not measured["relative_logit_error"] <= tolerance:
        error = measured["relative_logit_error"]
        faults.append(f"the text: relative error of the logits {error:.1e}, allowed {tolerance:.0e}")
    largest = max(used["relative_logit_error"], measured["relative_logit_error"])
    return used | measured | {"relative_logit_error": largest, "faults": faults}
