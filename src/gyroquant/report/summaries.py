"""The tables that each command ends with."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from gyroquant.evaluation.outliers import Outliers
from gyroquant.inspection.fuzz import Finding, Report
from gyroquant.inspection.model import Inspection
from gyroquant.maps import factors
from gyroquant.models.stores.prequantized.base import told
from gyroquant.report.console import duration, table
from gyroquant.system.environment import size


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _above(limits: Sequence[Mapping[str, float]]) -> str:
    """How far the layers of a model are above what any code of as many bits could reach."""
    decibels, bits = (_mean(one[key] for one in limits) for key in ("decibels", "excess_bits"))
    return f"{decibels:.1f} dB, or {bits:.2f} bits per weight (mean of {len(limits)} layers)"


def _proof(proof: Mapping[str, Any]) -> str:
    return f"{proof['relative_logit_error']:.1e} (on {proof['tokens']} tokens)"


def _begins(bos: str | None) -> str:
    """What is said of windows of which each begins with special tokens."""
    return f", each of which begins with {bos}" if bos else ""


def quantized(manifest: Mapping[str, Any], out: str) -> list[Table]:
    """What `quantize` did: proof, bits, time, memory."""
    proof, bits = manifest["proof"], manifest["bits"]
    weights = [layer["weight_error"] for layer in manifest["layers"]]
    outputs = [layer["output_error"] for layer in manifest["layers"] if layer["output_error"] is not None]
    limits = [layer["rate_distortion"] for layer in manifest["layers"] if layer.get("rate_distortion")]
    folded = proof["tokens"] > 0
    rows = [
        ("written to", out),
        ("recipe", manifest["recipe"]["name"]),
        ("proof: relative logit error", _proof(proof) if folded else "0 (nothing folded)"),
        ("proof: worst block", f"{proof['worst_block']} ({proof['worst_block_error']:.1e})" if folded else "-"),
        ("true bits per rounded weight", f"{bits['per_weight']:.4f}"),
        ("bits per weight, whole model", f"{bits['whole_model_per_weight']:.2f}"),
        ("squared relative error of the weights", f"{_mean(weights):.2g} (mean of {len(weights)} layers)"),
        ("squared relative error of the outputs", f"{_mean(outputs):.2g}" if outputs else "not measured"),
        ("above the limit of any code", _above(limits) if limits else "not measured"),
        ("time", duration(manifest["seconds"])),
        ("peak memory", size(manifest["peak_memory_bytes"])),
    ]
    if manifest.get("source_quantization"):
        rows.append(("the original", told(manifest["source_quantization"])))
    if manifest["untied"]:
        rows.append(("untied", ", ".join(manifest["untied"]) + " (its norm's gain was folded into it)"))
    return [table("", ("quantized", ""), rows)]


def exported(manifest: Mapping[str, Any], destination: str) -> list[Table]:
    """What `export` wrote."""
    check = manifest["check"]
    rows = [("written to", destination), ("format", manifest["format"]), ("size", size(manifest["bytes"]))]
    if check is None or "not_run" in check:
        rows.append(("checked", "no" if check is None else f"no: {check['not_run']}"))
    else:
        rows.append((f"in {check['runtime']}, fp32", _use(check)))
        if "requantized" in manifest["facts"]:
            rows.append(("KL, nats a token", f"{check['kl']:.2e}"))
            rows.append(("top-1 agreement", f"{check['top1_agreement']:.4f}"))
        rows.append(("as it runs by default", _use(check["as_it_runs"])))
    facts = {
        key: _compared_tokens(value) if key == "tokenizer" else _said(value) for key, value in manifest["facts"].items()
    }
    rows += [(key.replace("_", " "), text) for key, text in facts.items()]
    return [table("", ("exported", ""), rows)]


def _compared_tokens(found: Mapping[str, Any] | None) -> str:
    """How the tokens of an export's tokenizer compare."""
    if found is None:
        return "none"
    return f"{found['texts_that_differ']} of {found['texts']} texts differ by {found['compared_by']}"


def _use(check: Mapping[str, Any]) -> str:
    """How an export differs when it is used."""
    parts = {"prompt": "prompt_error", "single tokens": "step_error", "padded batch": "batch_error"}
    errors = ", ".join(f"{name} {_error(check, key)}" for name, key in parts.items())
    ties = f" and {check['greedy_near_ties']} near ties" if check["greedy_near_ties"] else ""
    alike = f"{check['greedy_tokens_alike']} of {check['greedy_tokens']} greedy tokens alike{ties}"
    return f"relative logit error: {errors}; {alike}"


def _error(check: Mapping[str, Any], key: str) -> str:
    return f"not run ({check['batch_not_run']})" if check[key] is None else f"{check[key]:.1e}"


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_said(one)}" for key, one in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "; ".join(map(_said, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def verified(result: Mapping[str, Any]) -> list[Table]:
    """What `verify-export` measured, one column a way of running it."""
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
        ("greedy tokens alike", "greedy_tokens_alike", "d"),
        ("near ties", "greedy_near_ties", "d"),
        ("of", "greedy_tokens", "d"),
        ("prefill, tokens/s", "prefill_tokens_per_second", ".0f"),
        ("decode, tokens/s", "decode_tokens_per_second", ".1f"),
    )
    rows = [
        (title, *("-" if way.get(key) is None else format(way[key], how) for way in ways)) for title, key, how in lines
    ]
    for title, key in (("peak memory", "peak_memory_bytes"), ("of which before opening", "memory_before_bytes")):
        rows.append((title, *(size(way[key]) if key in way else "-" for way in ways)))
    allowed = result["tolerance"]
    within = ["none applies" if allowed is None else "; ".join(way["faults"]) or "yes" for way in ways]
    rows.append(("the same model" if allowed is None else f"the same model ({allowed:.1e})", *within))
    rows.append(("the text was read", _pieces(result["reading"]), *["-"] * (len(ways) - 1)))
    return [table(f"{result['format']} in {result['runtime']}", ("", *result["ways"]), rows)]


def _pieces(reading: Mapping[str, int]) -> str:
    return "through the KV cache: {first} tokens, then {chunk} a call, the last {single} singly".format(**reading)


def checked(result: Mapping[str, Any]) -> list[Any]:
    """What `verify` found; problems last, in full."""
    files = "no checksums" if result["files"] is None else f"{result['files']} ({size(result['bytes'])})"
    rows = [("files with a sha256", files)]
    if result["extra"]:
        rows.append(("others, not in the list", ", ".join(result["extra"])))
    if result["tensors"] is not None:
        rows.append(("parameters decoded", str(result["tensors"])))
    proof = result["proof"]
    if proof is not None:
        again = "failed" if proof["again"] is None else f"{proof['again']:.1e}"
        rows.append(("proof: relative logit error", f"{again} (recorded: {proof['recorded']:.1e})"))
        rows += [("maps", proof["maps"])] if "maps" in proof else [("", proof["note"])]
    for name, (was, now) in result["versions"].items():
        rows.append((f"made with another {name}", f"{was} (here: {now})"))
    rows.append(("", "all is as it was written" if result["passed"] else f"{len(result['problems'])} wrong"))
    return [table("", (result["folder"], ""), rows), f"made by: {result['command']}", *result["problems"]]


def formats(found: Sequence[Mapping[str, Any]]) -> list[Table]:
    """The formats, and for a folder whether each holds it."""
    rows: list[tuple[str, ...]] = []
    for one in found:
        holds = "any, as plain numbers" if one["dense"] else "; ".join(one["weights"])
        if "problems" in one:
            rows.append((one["format"], "; ".join(one["problems"]) or "fits"))
        else:
            rows.append((one["format"], holds, ", ".join(one["online_maps"]) or "none"))
    asked = bool(found) and "problems" in found[0]
    return [table("", ("format", "this folder") if asked else ("format", "rounded weights", "maps online"), rows)]


def evaluated(result: Mapping[str, Any]) -> list[Table]:
    """What `evaluate` measured, with its intervals."""

    def span(pair: Any, digits: int) -> str:
        return f"{pair[0]:.{digits}f} to {pair[1]:.{digits}f}"

    rows = [("perplexity", f"{result['perplexity']:.3f}", span(result["perplexity_interval"], 3))]
    if result["kl"] is not None:
        rows.append(("KL divergence (nats a token)", f"{result['kl']:.4f}", span(result["kl_interval"], 4)))
        rows.append(("top-1 agreement", f"{result['top1_agreement']:.4f}", span(result["top1_interval"], 4)))
    rows.append(("true bits per weight", f"{result['true_bits_per_weight']:.4f}", ""))
    asked, there = result["windows_asked"], result["windows"]
    fewer = f" (of {asked} asked for: the text has no more)" if asked is not None and there < asked else ""
    windows = f"{there} windows of {result['window']}{_begins(result['bos'])}{fewer}"
    rows.append(("tokens", f"{result['tokens']} of {result['text']['tokens']} in {windows}", ""))
    rows.append(("predicted", str(result["predicted"]), ""))
    return [table(result["model"], ("measured", "value", "95 % interval"), rows, right=(1,))]


def inspected(result: Inspection) -> list[Any]:
    """What `inspect` found."""
    shape = result.shape
    tied = ", ".join(shape["tied"]) or "nothing"
    about = [
        ("architecture", f"{shape['model_type']} (described by {shape['described_by']})"),
        ("blocks", f"{shape['blocks']} of hidden {shape['hidden']}, {shape['parameters'] / 1e6:.1f} M parameters"),
        ("heads", f"{shape['heads']} of {shape['head_dim']}, {shape['kv_heads']} for keys and values"),
        ("tied", tied),
        ("stored bits per weight", f"{shape['bits_per_weight']:.2f}"),
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
    return shown + (predicted(result) if result.prediction else [])


def predicted(result: Inspection) -> list[Any]:
    """What a recipe will take: every stage, and the whole."""
    guess = result.prediction
    assert guess is not None
    rows = [
        (stage.name, "not known" if stage.seconds is None else duration(stage.seconds), size(stage.peak_memory_bytes))
        for stage in guess.stages
    ]
    rows.append(("all of it", duration(guess.seconds), size(guess.peak_memory_bytes)))
    stages = table(f"{result.recipe} will take about", ("stage", "time", "peak memory"), rows, right=(1, 2))
    lines = [("size of the result", size(guess.disk_bytes)), ("beside it while it runs", size(guess.scratch_bytes))]
    return [stages, table("", ("disk", ""), lines)]


def rounded_layers(layers: Iterable[Mapping[str, Any]]) -> Table:
    """What rounding did to the layers of each kind, and how far they are above the limit: the mean, and the worst."""
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        if layer.get("rate_distortion"):
            kinds[re.sub(r"\d+", "*", layer["name"])].append(layer)
    rows = []
    for kind, found in kinds.items():
        bits, above, spare = (
            _mean(one["rate_distortion"][key] for one in found) for key in ("bits", "decibels", "excess_bits")
        )
        error = _mean(one["output_error"] for one in found)
        worst = max(found, key=lambda one: one["rate_distortion"]["decibels"])
        last = (
            f"{'.'.join(re.findall(r'[0-9]+', worst['name'])) or '-'} ({worst['rate_distortion']['decibels']:.1f} dB)"
        )
        rows.append((kind.rpartition("*.")[2], f"{bits:.3f}", f"{error:.4f}", f"{above:.1f} dB", f"{spare:.2f}", last))
    title = "rounded layers, and how far above the limit of any code they are"
    return table(title, ("layers", "bits", "error", "above", "in bits", "worst block"), rows, right=(1, 2, 3, 4))


def sites(result: Inspection) -> Table:
    """Every site of a model: how many, of which order, and what can be folded there."""
    rows = [
        (row["site"], row["places"], ", ".join(map(str, row["orders"])), _hadamards(row["orders"]), _how(row))
        for row in result.sites()
    ]
    return table("sites", ("site", "places", "order", "Hadamard", "maps"), rows, right=(1, 2))


def _hadamards(orders: Iterable[int]) -> str:
    """The factors of the Hadamard matrix of each order, powers of two written as one."""
    parts = []
    for n in orders:
        found = factors(n)
        if found is None:
            parts.append("none")
            continue
        odd = [str(factor) for factor in found if factor != 2]
        twos = [str(2 ** found.count(2))] if 2 in found or not odd else []
        parts.append(" x ".join(odd + twos))
    return ", ".join(parts)


def _how(row: Mapping[str, Any]) -> str:
    if row["blocked"]:
        online = "online only" if row["online"] else "not fused (online: true runs it with the model)"
        return f"{online}: {row['blocked']}"
    known = {"any": "any map", "orthogonal": "any rotation", "rope": "a map that commutes with RoPE"}
    fused = known.get(row["admits"], f"a {row['admits']} map")
    return f"fused: {fused}" + ("; online: any map" if row["online"] else "")


def outliers(rows: list[Outliers]) -> Table:
    """Outlier figures by site: the mean over blocks, and the worst block."""
    by_site: dict[str, list[Outliers]] = defaultdict(list)
    for row in rows:
        by_site[row.site].append(row)
    cells = []
    for site, found in by_site.items():
        worst = max(found, key=lambda row: row.max_over_rms)
        kurtosis = sum(row.kurtosis for row in found) / len(found)
        ratio = sum(row.max_over_rms for row in found) / len(found)
        cells.append((site, f"{kurtosis:.1f}", f"{ratio:.1f}", f"{worst.block} ({worst.max_over_rms:.1f})"))
    return table(
        "outliers of the activations (a Gaussian has kurtosis 3)",
        ("site", "kurtosis", "max / rms", "worst block"),
        cells,
        right=(1, 2, 3),
    )


def rotations(rows: Iterable[Mapping[str, Any]]) -> Table:
    """What a file of rotations holds."""
    lines = [(r["site"], str(r["n"]), f"{r['drift']:.1e}", f"{r['from_identity']:.3f}") for r in rows]
    return table("", ("site", "order", "from orthogonal", "from the identity"), lines, right=(1, 2, 3))


def fuzzed(reports: Sequence[Report]) -> list[Any]:
    """What fuzzing found: site by method for one architecture, a line each for many."""
    if len(reports) > 1:
        lines = []
        for one in reports:
            worst = "-" if one.worst is None else f"{one.worst:.1e}"
            state = one.problem or (f"{len(one.wrong)} wrong" if one.wrong else "exact")
            lines.append((one.model_type, one.described_by + ("" if one.known else " (fits)"), worst, state[:90]))
        return [table("", ("architecture", "description", "worst error", ""), lines, right=(2,))]
    (one,) = reports
    if one.problem:
        return [f"{one.model_type}: {one.problem}"]
    sites = list(dict.fromkeys(f.site for f in one.findings))
    found = {(f.site, f.method): f for f in one.findings}
    rows = []
    for method in dict.fromkeys(f.method for f in one.findings):
        cells = [found.get((site, method)) for site in sites]
        rows.append((method, *(_fuzz_cell(cell) for cell in cells)))
    title = f"{one.model_type}, described by {one.described_by}" + ("" if one.known else " (not its own)")
    reasons = dict.fromkeys(f"{f.site}: {f.fault or f.refused}" for f in one.findings if f.fault or f.refused)
    return [table(title, ("method", *sites), rows, right=tuple(range(1, len(sites) + 1))), *reasons]


def _fuzz_cell(finding: Finding | None) -> str:
    if finding is None:
        return ""
    if finding.fault:
        return "WRONG"
    return "refused" if finding.error is None else f"{finding.error:.0e}"
