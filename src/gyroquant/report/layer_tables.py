"""Tables about the layers of a model: the errors of rounded layers, and the outliers of their inputs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table

from gyroquant.evaluation.hadamard_advice import HadamardAdvice, LayerAdvice
from gyroquant.evaluation.outliers import Outliers
from gyroquant.report.console import table


def mean(values: Iterable[float]) -> float:
    """The mean of numbers, of which there is at least one."""
    numbers = list(values)
    return sum(numbers) / len(numbers)


def rounded_layers(layers: Iterable[Mapping[str, Any]]) -> Table:
    """The output error of rounded layers and their distance to the rate-distortion bound.

    One row for each kind of layer: the means over the blocks, and the worst block.
    """
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for layer in layers:
        if layer.get("rate_distortion"):
            kinds[re.sub(r"\d+", "*", layer["name"])].append(layer)
    rows = []
    for kind, members in kinds.items():
        bits, above, excess = (
            mean(layer["rate_distortion"][key] for layer in members) for key in ("bits", "decibels", "excess_bits")
        )
        error = mean(layer["output_error"] for layer in members)
        worst = max(members, key=lambda layer: layer["rate_distortion"]["decibels"])
        block = ".".join(re.findall(r"[0-9]+", worst["name"])) or "-"
        last = f"{block} ({worst['rate_distortion']['decibels']:.1f} dB)"
        entropy = "-"  # manifests of the last release do not have it
        if all("code_entropy" in layer for layer in members):
            entropy = f"{mean(layer['code_entropy'] for layer in members):.3f}"
        cells = (f"{bits:.3f}", entropy, f"{error:.4f}", f"{above:.1f} dB", f"{excess:.2f}", last)
        rows.append((kind.rpartition("*.")[2], *cells))
    title = "rounded layers, above the rate-distortion bound"
    columns = ("layers", "bits", "entropy of codes", "error", "above", "in bits", "worst block")
    return table(title, columns, rows, right=(1, 2, 3, 4, 5))


def outliers(rows: list[Outliers]) -> Table:
    """Measures of outliers by site: the means over the blocks, and the worst block."""
    by_site: dict[str, list[Outliers]] = defaultdict(list)
    for row in rows:
        by_site[row.site].append(row)
    cells = []
    for site, blocks in by_site.items():
        worst = max(blocks, key=lambda row: row.max_over_rms)
        kurtosis = sum(row.kurtosis for row in blocks) / len(blocks)
        ratio = sum(row.max_over_rms for row in blocks) / len(blocks)
        cells.append((site, f"{kurtosis:.1f}", f"{ratio:.1f}", f"{worst.block} ({worst.max_over_rms:.1f})"))
    return table(
        "outliers of the activations (a Gaussian has kurtosis 3)",
        ("site", "kurtosis", "max / rms", "worst block"),
        cells,
        right=(1, 2, 3),
    )


def hadamard_advice(advice: HadamardAdvice) -> list[Any]:
    """Whether a Hadamard matrix helps: one row for each kind of layer, with the means over its blocks; then the layers
    that were left out.
    """
    kinds: dict[str, list[LayerAdvice]] = defaultdict(list)
    for layer in advice.layers:
        kinds[_kind(layer.layer)].append(layer)
    measures = [("weights", "weights_turned")]
    measures += [("both", "both_turned")] if advice.activations is not None else []
    rows = []
    for kind, members in kinds.items():
        cells = []
        for pair in measures:
            for key in pair:
                values = [getattr(layer, key) for layer in members]
                cells.append("-" if None in values else f"{mean(values):.4g}")
        helped = sum(layer.helps for layer in members)
        rows.append((kind.rpartition(".")[2], str(members[0].order), *cells, f"{helped} of {len(members)}"))
    names = ("weights", "turned", "with inputs", "turned")[: 2 * len(measures)]
    title = "a Hadamard matrix on the inputs: relative squared errors of the outputs"
    shown: list[Any] = []
    if rows:
        columns = ("layers", "order", *names, "helps")
        shown.append(table(title, columns, rows, right=tuple(range(1, len(columns) - 1))))
    reasons: dict[str, int] = defaultdict(int)
    for reason in advice.left_out.values():
        reasons[reason] += 1
    return [*shown, *(f"not measured, {count} layers: {reason}" for reason, count in reasons.items())]


def _kind(name: str) -> str:
    """The name of a layer without its block and its expert."""
    return re.sub(r"\d+", "*", name).rpartition("*.")[2]
