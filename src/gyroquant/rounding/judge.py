"""How far rounded layers are from the original ones, and from what any code of as many bits could reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from torch import Tensor

from gyroquant.calibration.observers import Gram, Key
from gyroquant.grids import QuantizedWeight
from gyroquant.models.graph import Group, LinearOp
from gyroquant.models.online import Attachment
from gyroquant.models.packed import as_matrix
from gyroquant.rounding.base import InputStatistics, output_energy, weight_error
from gyroquant.rounding.limit import Limit, limit, spectrum
from gyroquant.rounding.stage import statistics_of, together


@dataclass(frozen=True)
class LayerReport:
    """How far one rounded layer is from the original: relative squared errors of its weights and of its output.

    `output_error` and `limit`, the bound on it, are over the calibration tokens, None without statistics.
    """

    name: str
    weight_error: float
    output_error: float | None
    limit: Limit | None


def judge_group(
    group: Group,
    targets: Mapping[str, LinearOp],
    tensors: Mapping[str, Tensor],
    observed: Mapping[Key, Gram],
    online: Sequence[Attachment],
    rounded: Mapping[str, QuantizedWeight],
) -> list[LayerReport]:
    """A report for each target of one group, whose folded weights are `tensors`."""
    reports = []
    for key, ops in together(group, targets, online).items():
        seen = statistics_of(observed.get((key, None)))
        eigenvalues = None if seen is None else spectrum(seen.gram)
        for op in ops:
            if op.entry.stacked:
                reports.append(_experts(op, key, tensors[op.weight], observed, rounded[op.weight]))
            else:
                matrix, weight = as_matrix(tensors[op.weight].float(), op), rounded[op.weight]
                bits = weight.bits / matrix.numel()
                reports.append(_report(op.module, matrix, weight.dequantize(), bits, seen, eigenvalues))
    return reports


def _experts(
    op: LinearOp, key: str, tensor: Tensor, observed: Mapping[Key, Gram], weight: QuantizedWeight
) -> LayerReport:
    """The means over the experts of one stacked weight; what takes tokens, over those that tokens reached."""
    reports, bits, rest = [], weight.bits / tensor.numel(), weight.dequantize()
    for expert, stored in enumerate(tensor):
        matrix, seen = as_matrix(stored.float(), op), statistics_of(observed.get((key, expert)))
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
    if statistics is None or eigenvalues is None:
        return LayerReport(name, weight_error(matrix, rounded), None, None)
    energy = output_energy(matrix, statistics)
    error = output_energy(matrix - rounded, statistics) / max(energy, 1e-30)
    return LayerReport(name, weight_error(matrix, rounded), error, limit(matrix, eigenvalues, error, energy, bits))
