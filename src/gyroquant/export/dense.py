"""Plain numbers: a checkpoint that every loader of the architecture opens, as large as the original."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gyroquant.export.checkpoint import dtype_name, write_rest, write_tensors
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Carries, Format
from gyroquant.grids import QuantizedWeight
from gyroquant.models.graph import LinearOp
from gyroquant.models.packed import PackedStore, from_matrix


class Dense(Format):
    """Every weight as the number that it stands for, under the names of the original checkpoint.

    A rounded weight needs more digits than 16-bit numbers have, so it is rounded once more where the model is stored in
    16 bits; how far that moved it is among the facts, relative to itself and, as `deviation`, to the largest of its
    layer. `dtype` is the one of rounded weights, None the model's own.
    """

    name = "dense"
    title = "plain safetensors"
    carries = Carries(dense=True, experts=True, wrappers=True)
    dtype: ClassVar[torch.dtype | None] = None

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        dtype, relative, deviation = self.dtype or store.dtype, 0.0, 0.0

        def encode(op: LinearOp, weight: QuantizedWeight) -> dict[str, Tensor]:
            nonlocal relative, deviation
            exact = from_matrix(weight.dequantize(), op.shape, op.entry.transposed)
            written = exact.to(dtype)
            relative = max(relative, _relative_deviation(written, exact))
            deviation = max(
                deviation, float((written.float() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
            )
            return {op.weight: written}

        write_tensors(store, folder, encode)
        folder.merge()
        write_rest(store, folder, dtype)
        return {"dtype": dtype_name(dtype), "largest_relative_deviation": relative, "deviation": deviation}


def _relative_deviation(written: Tensor, exact: Tensor) -> float:
    """The largest deviation of a number from an exact one that is not 0, in parts of the latter."""
    wrong = (written.float() - exact).abs_()
    return float(torch.where(exact == 0, wrong, wrong / exact.abs()).max())
