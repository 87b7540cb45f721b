"""Errors of rounded layers, and their distance to the rate-distortion bound at the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace

from torch import Tensor

from gyroquant.grids import code_entropy
from gyroquant.grids.error import in_reach, weight_error
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.rounding.base import InputStatistics, output_energy
from gyroquant.rounding.layers import LayerGroup
from gyroquant.rounding.rate_distortion import RateDistortion, rate_distortion, spectrum


@dataclass(frozen=True)
class LayerReport:
    """The errors of one rounded layer, its low-rank branch included.

    - `name`: the layer's name, as in recipes.
    - `weight_error`: the relative squared error of its weights.
    - `output_error`: the relative squared error of its output over the calibration tokens. None without statistics.
    - `rate_distortion`: the bound on `output_error`. None without statistics, or if it was not computed.
    - `code_entropy`: the entropy of its codes, in bits a code.
    """

    name: str
    weight_error: float
    output_error: float | None
    rate_distortion: RateDistortion | None
    code_entropy: float = 0.0


def layer_reports(group: LayerGroup, rounded: Mapping[str, RoundedLayer], bound: bool = True) -> list[LayerReport]:
    """One report for each target. `bound`: whether it has the rate-distortion bound.

    The statistics of an input are dropped from `group` as soon as its layers are reported, the widest inputs first. So
    the memory that they free is used for the decoded layers, which are kept.
    """
    reports, readers = dict[str, LayerReport](), group.by_shared_input()
    for key, ops in sorted(readers.items(), key=lambda item: -item[1][0].in_features):
        statistics = group.statistics(key)
        eigenvalues = _spectrum(statistics, bound)
        for op in ops:
            layer = rounded[op.weight]
            if op.entry.stacked:
                report = _experts(group, key, layer, bound)
            else:
                matrix = group.matrix(op)
                bits = layer.weight.bits / op.numel
                report = _report(op.name, matrix, layer.op.to_matrix(layer.merged), bits, statistics, eigenvalues)
            reports[op.weight] = replace(report, code_entropy=code_entropy(layer.weight.codes))
        del statistics
        group.forget(key)
    return [reports[op.weight] for ops in readers.values() for op in ops]


def _spectrum(statistics: InputStatistics | None, bound: bool) -> Tensor | None:
    return spectrum(statistics.second_moments) if bound and statistics is not None else None


def table_report(
    name: str, matrix: Tensor, layer: RoundedLayer, statistics: InputStatistics | None, bound: bool = True
) -> LayerReport:
    """The report of a table of embeddings, shape (tokens, hidden). `statistics` are those of the head tied to it."""
    eigenvalues = _spectrum(statistics, bound)
    report = _report(name, matrix, layer.matrix, layer.weight.bits / layer.op.numel, statistics, eigenvalues)
    return replace(report, code_entropy=code_entropy(layer.weight.codes))


def _experts(group: LayerGroup, key: str, layer: RoundedLayer, bound: bool) -> LayerReport:
    """The means over the experts of one stacked weight. Output errors are averaged over the experts that got tokens."""
    reports, matrices, rest = [], group.experts(layer.op), layer.matrix
    bits = layer.weight.bits / layer.op.numel
    for expert, matrix in enumerate(matrices):
        statistics = group.statistics(key, expert)
        eigenvalues = _spectrum(statistics, bound)
        rows, rest = rest[: len(matrix)], rest[len(matrix) :]
        reports.append(_report("", matrix, rows, bits, statistics, eigenvalues))
    errors = [report.output_error for report in reports if report.output_error is not None]
    bounds = [astuple(report.rate_distortion) for report in reports if report.rate_distortion is not None]
    return LayerReport(
        layer.op.name,
        sum(report.weight_error for report in reports) / len(reports),
        sum(errors) / len(errors) if errors else None,
        RateDistortion(*(sum(values) / len(values) for values in zip(*bounds, strict=True))) if bounds else None,
    )


def _report(
    name: str,
    matrix: Tensor,
    rounded: Tensor,
    bits: float,
    statistics: InputStatistics | None,
    eigenvalues: Tensor | None,
) -> LayerReport:
    matrix, rounded = in_reach(matrix, rounded)
    if statistics is None:
        return LayerReport(name, weight_error(matrix, rounded), None, None)
    energy = output_energy(matrix, statistics)
    error = output_energy(matrix - rounded, statistics) / max(energy, 1e-30)
    bound = None if eigenvalues is None else rate_distortion(matrix, eigenvalues, error, energy, bits)
    return LayerReport(name, weight_error(matrix, rounded), error, bound)
