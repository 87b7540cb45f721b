"""How far rounded layers are from the original ones, and from what any code of as many bits could reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

from torch import Tensor

from gyroquant.grids import QuantizedWeight
from gyroquant.models.graph import LinearOp
from gyroquant.rounding.base import InputStatistics, in_reach, output_energy, weight_error
from gyroquant.rounding.limit import Limit, limit, spectrum
from gyroquant.rounding.stage import Part


@dataclass(frozen=True)
class LayerReport:
    """How far one rounded layer is from the original: relative squared errors of its weights and of its output.

    `output_error` and `limit`, the bound on it, are over the calibration tokens, None without statistics.
    """

    name: str
    weight_error: float
    output_error: float | None
    limit: Limit | None


def judge_part(part: Part, rounded: Mapping[str, QuantizedWeight]) -> list[LayerReport]:
    """A report for each of the targets."""
    reports = []
    for key, ops in part.together().items():
        seen = part.statistics(key)
        eigenvalues = None if seen is None else spectrum(seen.gram)
        for op in ops:
            weight = rounded[op.weight]
            if op.entry.stacked:
                reports.append(_experts(part, op, key, weight))
            else:
                matrix = part.matrix(op)
                bits = weight.bits / matrix.numel()
                reports.append(_report(op.module, matrix, weight.dequantize(), bits, seen, eigenvalues))
    return reports


def _experts(part: Part, op: LinearOp, key: str, weight: QuantizedWeight) -> LayerReport:
    """The means over the experts of one stacked weight; what takes tokens, over those that tokens reached."""
    reports, matrices, rest = [], part.experts(op), weight.dequantize()
    bits = weight.bits / sum(matrix.numel() for matrix in matrices)
    for expert, matrix in enumerate(matrices):
        seen = part.statistics(key, expert)
        mine, rest = rest[: len(matrix)], rest[len(matrix) :]
        reports.append(_report("", matrix, mine, bits, seen, None if seen is None else spectrum(seen.gram)))
    errors = [r.output_error for r in reports if r.output_error is not None]
    limits = [astuple(r.limit) for r in reports if r.limit is not None]
    return LayerReport(
        op.weight,
        sum(r.weight_error for r in reports) / len(reports),
        sum(errors) / len(errors) if errors else None,
        Limit(*(sum(values) / len(values) for values in zip(*limits, strict=True))) if limits else None,
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
    if statistics is None or eigenvalues is None:
        return LayerReport(name, weight_error(matrix, rounded), None, None)
    energy = output_energy(matrix, statistics)
    error = output_energy(matrix - rounded, statistics) / max(energy, 1e-30)
    return LayerReport(name, weight_error(matrix, rounded), error, limit(matrix, eigenvalues, error, energy, bits))
