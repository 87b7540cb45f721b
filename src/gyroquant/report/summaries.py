"""The tables that the commands print at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from gyroquant.evaluation.diagnosis.measures import diagnosed
from gyroquant.inspection.fuzz import Finding, Report
from gyroquant.inspection.model import Inspection, bits_of
from gyroquant.maps import factors
from gyroquant.models.stores.prequantized.base import told
from gyroquant.models.stores.weight_bytes import PARTS
from gyroquant.report.console import duration, table
from gyroquant.report.layer_tables import hadamard_advice, mean, outliers, rounded_layers
from gyroquant.report.task_table import task_table
from gyroquant.system.environment import size


def _above(limits: Sequence[Mapping[str, float]]) -> str:
    """The mean distance of the layers to the rate-distortion bound, in decibels and in bits per weight."""
    decibels, bits = (mean(limit[key] for limit in limits) for key in ("decibels", "excess_bits"))
    return f"{decibels:.1f} dB, or {bits:.2f} bits per weight (mean of {len(limits)} layers)"


def _proof(proof: Mapping[str, Any]) -> str:
    return f"{proof['relative_logit_error']:.1e} (on {proof['tokens']} tokens)"


def _begins(bos: str | None) -> str:
    """States which special tokens every window begins with. Empty if there are none."""
    return f", each beginning with {bos}" if bos else ""


_ROTATION = {
    "fused": "rotated, the map is fused into the weights",
    "online": "rotated, the map runs with the model",
    "unrotated": "not rotated",
    "": "not recorded",
}


def quantized(manifest: Mapping[str, Any], out: str) -> list[Table]:
    """The table of `quantize`: proof, bits, errors, time and memory."""
    proof, bits = manifest["proof"], manifest["bits"]
    weights = [layer["weight_error"] for layer in manifest["layers"]]
    outputs = [layer["output_error"] for layer in manifest["layers"] if layer["output_error"] is not None]
    limits = [layer["rate_distortion"] for layer in manifest["layers"] if layer.get("rate_distortion")]
    folded = proof["tokens"] > 0
    rows = [
        ("written to", out),
        ("recipe", manifest["recipe"]["name"]),
        ("residual stream", _ROTATION[manifest.get("rotation", "")]),
        ("proof: relative logit error", _proof(proof) if folded else "0 (nothing folded)"),
        ("proof: worst block", f"{proof['worst_block']} ({proof['worst_block_error']:.1e})" if folded else "-"),
        ("true bits per rounded weight", f"{bits['per_weight']:.4f}"),
        *_effective(bits.get("effective")),
        *_table_row(bits),
        *_whole_model(*bits_of(manifest)),
        ("squared relative error of the weights", f"{mean(weights):.2g} (mean of {len(weights)} layers)"),
        ("squared relative error of the outputs", f"{mean(outputs):.2g}" if outputs else "not measured"),
        ("above the rate-distortion bound", _above(limits) if limits else "not measured"),
        ("time", _time(manifest)),
        ("peak memory", size(manifest["peak_memory_bytes"])),
    ]
    if manifest.get("source_quantization"):
        rows.append(("the original", told(manifest["source_quantization"])))
    if manifest["untied"]:
        rows.append(("untied", ", ".join(manifest["untied"]) + " (its norm's gain was folded into it)"))
    return [table("", ("quantized", ""), rows)]


def _time(manifest: Mapping[str, Any]) -> str:
    """The time of the last process, and that of the stages that took at least a tenth of it, longest first."""
    total, stages = manifest["seconds"], manifest.get("stage_seconds", {})  # the last release has no stages
    long = sorted(((seconds, name) for name, seconds in stages.items() if seconds >= total / 10), reverse=True)
    parts = ", ".join(f"{name} {duration(seconds)}" for seconds, name in long)
    return f"{duration(total)} ({parts})" if parts else duration(total)


def _effective(bits: float | None) -> list[tuple[str, str]]:
    """Bits with the entropy of the codes in place of their stored bits. Models without codes have none."""
    return [] if bits is None else [("effective bits, by the entropy of the codes", f"{bits:.4f}")]


def _whole_model(bits: float, bytes_: Mapping[str, int] | None) -> list[tuple[str, str]]:
    """Bits and bytes of everything that is stored. Manifests of the last release do not have the bytes."""
    rows = [("bits per weight, whole model", f"{bits:.4f}")]
    if bytes_ is not None:
        parts = ", ".join(f"{part} {size(bytes_[part])}" for part in PARTS if bytes_[part])
        rows.append(("weights in the file", f"{size(bytes_['total'])} ({parts})"))
    return rows


def _table_row(bits: Mapping[str, Any]) -> list[tuple[str, str]]:
    if "embeddings" not in bits:
        return []
    return [("true bits per weight of embeddings", f"{bits['embeddings']['per_weight']:.4f}")]


def exported(manifest: Mapping[str, Any], destination: str) -> list[Table]:
    """The table of `export`: the folder, the check of its logits, and facts about the files."""
    check = manifest["check"]
    rows = [("written to", destination), ("format", manifest["format"]), ("size", size(manifest["bytes"]))]
    if "weight_bytes" in manifest:  # exports of the last release do not have it
        whole = f"{manifest['whole_model_bits_per_weight']:.4f}"
        rows += [("files with weights", size(manifest["weight_bytes"])), ("bits per weight, whole model", whole)]
    if check is None or "not_run" in check:
        rows.append(("checked", "no" if check is None else f"no: {check['not_run']}"))
    else:
        rows.append((f"in {check['runtime']}, fp32", _usage_check(check)))
        if "requantized" in manifest["facts"]:
            rows.append(("KL, nats a token", f"{check['kl']:.2e}"))
            rows.append(("top-1 agreement", f"{check['top1_agreement']:.4f}"))
        rows.append(("as it runs by default", _usage_check(check["as_it_runs"])))
    facts = {
        key: _compared_tokens(value) if key == "tokenizer" and isinstance(value, Mapping) else _as_text(value)
        for key, value in manifest["facts"].items()
    }
    rows += [(key.replace("_", " "), text) for key, text in facts.items()]
    return [table("", ("exported", ""), rows)]


def _compared_tokens(comparison: Mapping[str, Any]) -> str:
    """On how many texts the tokenizer of an export gives other tokens than the original's."""
    differ, texts = comparison["texts_that_differ"], comparison["texts"]
    return f"{differ} of {texts} texts differ by {comparison['compared_by']}"


def _usage_check(check: Mapping[str, Any]) -> str:
    """The errors of an export as it is used: relative errors of logits, and greedy tokens that are the same."""
    parts = {"prompt": "prompt_error", "single tokens": "step_error", "padded batch": "batch_error"}
    errors = ", ".join(f"{name} {_error(check, key)}" for name, key in parts.items())
    ties = f" and {check['greedy_near_ties']} near ties" if check["greedy_near_ties"] else ""
    same = f"{check['greedy_tokens_alike']} of {check['greedy_tokens']} greedy tokens are the same{ties}"
    return f"relative logit error: {errors}; {same}"


def _error(check: Mapping[str, Any], key: str) -> str:
    return f"not run ({check['batch_not_run']})" if check[key] is None else f"{check[key]:.1e}"


def _as_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_as_text(entry)}" for key, entry in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(map(_as_text, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verified(result: Mapping[str, Any]) -> list[Table]:
    """The table of `verify-export`, with one column for each way of running the export."""
    ways = list(result["ways"].values())
    lines = (
        ("relative logit error", "relative_logit_error", ".1e"),
        ("a prompt in one call", "prompt_error", ".1e"),
        ("single tokens after it", "step_error", ".1e"),
        ("a padded batch", "batch_error", ".1e"),
        ("KL, nats a token", "kl", ".2e"),
        ("top-1 agreement", "top1_agreement", ".4f"),
        ("perplexity", "perplexity", ".3f"),
        ("perplexity, gyroquant in fp32", "perplexity_ours", ".3f"),
        ("greedy tokens compared", "greedy_tokens", "d"),
        ("of which the same", "greedy_tokens_alike", "d"),
        ("of which near ties", "greedy_near_ties", "d"),
        ("prefill, tokens/s", "prefill_tokens_per_second", ".0f"),
        ("decode, tokens/s", "decode_tokens_per_second", ".1f"),
    )
    rows = [
        (title, *("-" if way.get(key) is None else format(way[key], spec) for way in ways))
        for title, key, spec in lines
    ]
    for title, key in (("peak memory", "peak_memory_bytes"), ("of which before opening", "memory_before_bytes")):
        rows.append((title, *(size(way[key]) if key in way else "-" for way in ways)))
    allowed = result["tolerance"]
    within = ["no tolerance applies" if allowed is None else "; ".join(way["faults"]) or "yes" for way in ways]
    rows.append(("the same model" if allowed is None else f"the same model ({allowed:.1e})", *within))
    rows.append(("the text was read", _reading(result["reading"]), *["-"] * (len(ways) - 1)))
    return [table(f"{result['format']} in {result['runtime']}", ("", *result["ways"]), rows)]


def _reading(reading: Mapping[str, int]) -> str:
    text = "through the KV cache: {first} tokens, then {chunk} per call, the last {single} one by one"
    return text.format(**reading)


def checked(result: Mapping[str, Any]) -> list[Any]:
    """The table of `verify`, then the command that makes the folder again, then every problem in full."""
    files = "no checksums" if result["files"] is None else f"{result['files']} ({size(result['bytes'])})"
    rows = [("files with a sha256", files)]
    if result["extra"]:
        rows.append(("files without a sha256", ", ".join(result["extra"])))
    if result["tensors"] is not None:
        rows.append(("parameters decoded", str(result["tensors"])))
    proof = result["proof"]
    if proof is not None:
        again = "failed" if proof["again"] is None else f"{proof['again']:.1e}"
        rows.append(("proof: relative logit error", f"{again} (recorded: {proof['recorded']:.1e})"))
        rows += [("maps", proof["maps"])] if "maps" in proof else [("", proof["note"])]
    for name, (was, now) in result["versions"].items():
        rows.append((f"another version of {name}", f"{was} (here: {now})"))
    rows.append(("problems", "none found" if result["passed"] else str(len(result["problems"]))))
    return [table("", (result["folder"], ""), rows), f"made by: {result['command']}", *result["problems"]]


def formats(entries: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The formats and what each can hold or, for a folder, whether each can hold it."""
    rows: list[tuple[str, ...]] = []
    for entry in entries:
        weights = "any, as plain numbers" if entry["dense"] else "; ".join(entry["weights"])
        if "problems" in entry:
            rows.append((entry["format"], "; ".join(entry["problems"]) or "; ".join(["fits", *entry["changes"]])))
        else:
            rows.append((entry["format"], weights, ", ".join(entry["online_maps"]) or "none"))
    for_folder = bool(entries) and "problems" in entries[0]
    columns = ("format", "this folder") if for_folder else ("format", "rounded weights", "online maps")
    return [table("", columns, rows)]


def evaluated(result: Mapping[str, Any]) -> list[Table]:
    """The tables of `evaluate`: every measure with its interval, and the accuracy in every task."""

    def interval(pair: Any, digits: int) -> str:
        return f"{pair[0]:.{digits}f} to {pair[1]:.{digits}f}"

    rows: list[tuple[str, str, str]] = []
    if "perplexity" in result:
        rows.append(("perplexity", f"{result['perplexity']:.3f}", interval(result["perplexity_interval"], 3)))
    if result.get("kl") is not None:
        rows.append(("KL divergence (nats a token)", f"{result['kl']:.4f}", interval(result["kl_interval"], 4)))
        rows.append(("top-1 agreement", f"{result['top1_agreement']:.4f}", interval(result["top1_interval"], 4)))
    if "diagnosis" in result:
        rows += diagnosed(result)
    rows.append(("true bits per rounded weight", f"{result['true_bits_per_weight']:.4f}", ""))
    sizes = _effective(result.get("effective_bits_per_weight"))
    sizes += _whole_model(result["whole_model_bits_per_weight"], result["bytes"])
    rows += [(name, value, "") for name, value in sizes]
    if "windows" in result:
        requested, count = result["windows_asked"], result["windows"]
        fewer = f" ({requested} requested; the text has no more)" if requested is not None and count < requested else ""
        windows = f"{count} windows of {result['window']}{_begins(result['bos'])}{fewer}"
        rows.append(("tokens", f"{result['tokens']} of {result['text']['tokens']} in {windows}", ""))
        rows.append(("predicted", str(result["predicted"]), ""))
    shown = [table(result["model"], ("measured", "value", "95 % interval"), rows, right=(1,))]
    return [*shown, task_table(result)] if result.get("tasks") else shown


def inspected(result: Inspection) -> list[Any]:
    """The tables of `inspect`: the model, its sites and recipes; if known, layers, outliers and expected resources."""
    shape = result.shape
    tied = ", ".join(shape["tied"]) or "nothing"
    about = [
        ("architecture", f"{shape['model_type']} ({_describer(shape)})"),
        ("R1", f"{shape['level']}: {_LEVELS[shape['level']]}"),
        ("blocks", f"{shape['blocks']} of hidden {shape['hidden']}, {shape['parameters'] / 1e6:.1f} M parameters"),
        ("heads", f"{shape['heads']} of {shape['head_dim']}, {shape['kv_heads']} for keys and values"),
        ("tied", tied),
        ("stored bits per weight", f"{shape['bits_per_weight']:.2f}"),
        *_effective(result.effective_bits),
        *_whole_model(shape["whole_model_bits_per_weight"], shape["bytes"]),
    ]
    if result.store.source_quantization is not None:
        about.append(("quantized by another program", told(result.store.source_quantization)))
        about += [("", note) for note in result.store.source_quantization["notes"]]
    shown: list[Any] = [
        table(result.store.label, ("model", ""), about),
        sites(result),
        table("", ("recipe", "fits"), [(name, problem or "yes") for name, problem in result.fits.items()]),
    ]
    if result.layers:
        shown.append(rounded_layers(result.layers))
    if result.outliers:
        shown.append(outliers(result.outliers))
    if result.advice is not None:
        shown += hadamard_advice(result.advice)
    return shown + (predicted(result) if result.prediction else [])


_LEVELS = {
    "fused": "a map of the residual stream is folded into the weights, and costs nothing at run time",
    "online": "a map of the residual stream runs with the model, before every layer that reads the stream",
    "unrotated": "no map of the residual stream is exact; other sites may still take maps",
}
"""What R1 can do on a model."""


def _describer(shape: Mapping[str, Any]) -> str:
    if shape["derived"]:
        return "derived from the model and proven on a tiny one"
    return f"described by {shape['described_by']}"


def described(result: Inspection) -> list[Any]:
    """The tables of `inspect --sites`: what R1 can do, every site and, if it was derived, the description."""
    shape, stream = result.shape, next(row for row in result.sites() if row["site"] == "R1")
    here = {
        "fused": f"no: {stream['blocked']}" if stream["blocked"] else "yes",
        "online": "yes" if stream["online"] else "no",
        "unrotated": "yes" if shape["level"] == "unrotated" else "no",
    }
    levels = [(name, text, here[name]) for name, text in _LEVELS.items()]
    parts: list[Any] = [
        f"{result.store.label}: {shape['model_type']}, {_describer(shape)}",
        table(f"R1 on this model: {shape['level']}", ("R1", "meaning", "this model"), levels),
    ]
    parts += _proven_sites(result)
    derivation = result.store.derivation
    path = "" if derivation is None else derivation.architecture.blocks
    for title, inside in ((f"entries of each block of {path}", True), ("entries around the blocks", False)):
        rows = [
            (entry["name"], entry["reads"] or "-", _bases(entry["writes"]), entry["fact"])
            for entry in result.entries()
            if entry["in_block"] == inside
        ]
        if rows:
            parts.append(table(title, ("name", "reads", "writes", "where that comes from"), rows))
    return parts + ([f"description written to {result.saved}"] if result.saved else [])


def _bases(writes: str | tuple[str, ...] | None) -> str:
    return ", ".join([writes] if isinstance(writes, str) else writes or ["-"])


def _proven_sites(result: Inspection) -> list[Table]:
    """Every site with the maps that it takes and, if there is one, its proof; then why maps cannot be used there."""
    derived, rows, reasons = result.shape["derived"], [], []
    for row in result.sites():
        fused = "no" if row["blocked"] else _admitted(row["admits"])
        online = _admitted(row["admits_online"]) if row["online"] else "no"
        proofs = ", ".join(f"{_way(row, label)} {error:.1e}" for label, error in row["proofs"].items())
        rows.append((row["site"], row["places"], ", ".join(map(str, row["orders"])), fused, online, proofs or "-"))
        reasons += [(row["site"], reason) for reason in _reasons(row)]
    for name, reason in result.missing_sites().items():
        rows.append((name, 0, "-", "no", "no", "-"))
        reasons.append((name, reason))
    columns = ("site", "places", "order", "fused", "online", "proof on a tiny model")[: 6 if derived else 5]
    shown = table("sites", columns, [row[: len(columns)] for row in rows], right=(1, 2))
    return [shown, table("why not", ("site", "reason"), reasons)] if reasons else [shown]


def _reasons(row: Mapping[str, Any]) -> list[str]:
    """The reasons why maps cannot be fused at a site, and why others were not proven. Each is said once."""
    blocked = row["blocked"]
    reasons = [f"not fused: {blocked}"] if blocked else []
    reasons += [f"not fused {row['partly_blocked']}"] if row["partly_blocked"] else []
    for label, reason in row["not_proven"].items():
        if not blocked or (blocked not in reason and reason not in blocked):
            reasons.append(f"{_way(row, label)}: not proven: {reason}")
    return reasons


def _way(row: Mapping[str, Any], label: str) -> str:
    """How the maps of a proof were folded: the rest of its label, or what the site does if nothing is asked."""
    return label.removeprefix(row["site"]).strip() or ("online" if row["online_unasked"] else "fused")


def predicted(result: Inspection) -> list[Any]:
    """The expected time, memory and disk space of a recipe: of every stage and of the whole run."""
    estimate = result.prediction
    assert estimate is not None
    rows = [
        (stage.name, "unknown" if stage.seconds is None else duration(stage.seconds), size(stage.peak_memory_bytes))
        for stage in estimate.stages
    ]
    rows.append(("whole run", duration(estimate.seconds), size(estimate.peak_memory_bytes)))
    stages = table(f"estimate for {result.recipe}", ("stage", "time", "peak memory"), rows, right=(1, 2))
    lines = [("size of the result", size(estimate.disk_bytes)), ("more during the run", size(estimate.scratch_bytes))]
    shown = [stages, table("", ("disk", ""), lines)]
    if result.expected is None:
        return shown
    expected = [("true bits per rounded weight", f"{result.expected['per_weight']:.4f}")]
    expected += _whole_model(result.expected["whole_model"], result.expected["bytes"])
    expected += [("not counted", what) for what in result.expected["not_counted"]]
    return [*shown, table("", ("expected", ""), expected)]


def sites(result: Inspection) -> Table:
    """Every site of a model: how many places, their orders, and which maps are possible there."""
    rows = [
        (row["site"], row["places"], ", ".join(map(str, row["orders"])), _hadamards(row["orders"]), _possible_maps(row))
        for row in result.sites()
    ]
    return table("sites", ("site", "places", "order", "Hadamard", "maps"), rows, right=(1, 2))


def _hadamards(orders: Iterable[int]) -> str:
    """The factors of the Hadamard matrix of each order. Factors of 2 are multiplied into one."""
    parts = []
    for n in orders:
        matrices = factors(n)
        if matrices is None:
            parts.append("none")
            continue
        odd = [str(factor) for factor in matrices if factor != 2]
        twos = [str(2 ** matrices.count(2))] if 2 in matrices or not odd else []
        parts.append(" x ".join(odd + twos))
    return ", ".join(parts)


def _possible_maps(row: Mapping[str, Any]) -> str:
    if row["blocked"]:
        asked = "not fused (online: true runs it with the model)" if row["online"] else "not available"
        return f"{'online only' if row['online_unasked'] else asked}: {row['blocked']}"
    online = f"; online: {_admitted(row['admits_online'])}" if row["online"] else ""
    partly = f"; not fused {row['partly_blocked']}" if row["partly_blocked"] else ""
    return f"fused: {_admitted(row['admits'])}{online}{partly}"


def _admitted(admits: str) -> str:
    names = {"any": "any map", "orthogonal": "any rotation", "rope": "a map that commutes with RoPE"}
    return names.get(admits, f"a {admits} map")


def rotations(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The sites of a file of rotations, and the distances of its matrices from orthogonal and from the identity."""
    lines = [(r["site"], str(r["n"]), f"{r['drift']:.1e}", f"{r['from_identity']:.3f}") for r in rows]
    return table("", ("site", "order", "from orthogonal", "from the identity"), lines, right=(1, 2, 3))


def fuzzed(reports: Sequence[Report]) -> list[Any]:
    """The results of fuzzing: methods by sites for one architecture, one row each for several."""
    if len(reports) > 1:
        lines = []
        for report in reports:
            worst = "-" if report.worst is None else f"{report.worst:.1e}"
            state = report.problem or (f"{len(report.wrong)} wrong" if report.wrong else "exact")
            description = report.described_by + ("" if report.known else " (fits)")
            lines.append((report.model_type, description, worst, state[:90]))
        return [table("", ("architecture", "description", "worst error", ""), lines, right=(2,))]
    (report,) = reports
    if report.problem:
        return [f"{report.model_type}: {report.problem}"]
    sites = list(dict.fromkeys(f.site for f in report.findings))
    findings = {(f.site, f.method): f for f in report.findings}
    rows = []
    for method in dict.fromkeys(f.method for f in report.findings):
        cells = [findings.get((site, method)) for site in sites]
        rows.append((method, *(_fuzz_cell(cell) for cell in cells)))
    title = f"{report.model_type}, described by {report.described_by}" + ("" if report.known else " (fits)")
    reasons = dict.fromkeys(f"{f.site}: {f.fault or f.refused}" for f in report.findings if f.fault or f.refused)
    return [table(title, ("method", *sites), rows, right=tuple(range(1, len(sites) + 1))), *reasons]


def _fuzz_cell(finding: Finding | None) -> str:
    if finding is None:
        return ""
    if finding.fault:
        return "WRONG"
    return "refused" if finding.error is None else f"{finding.error:.0e}"
