"""Plain numbers: a checkpoint that every loader of the architecture opens. It is as large as the original."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from gyroquant.formats.base import Format, FormatCapabilities
from gyroquant.formats.checkpoint import TRANSFORMERS_USAGE, deviation, dtype_name, write_rest, write_tensors
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import QuantizedWeight
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.stores.packed import PackedStore


class Dense(Format):
    """Every weight as a decoded number, low-rank branch included, under the names of the original checkpoint.

    A decoded weight has more digits than 16-bit numbers, so it is rounded once more if the model is stored in 16 bits.
    The facts state the largest change: relative to the weight itself, and, as `deviation`, relative to the largest
    weight of its layer. `dtype` is the dtype of rounded weights. None: the model's own.
    """

    name = "dense"
    title = "plain safetensors"
    runtime = TransformersRuntime
    library = "transformers"
    usage = TRANSFORMERS_USAGE
    capabilities = FormatCapabilities(dense=True, experts=True, unties=True, wrappers=True, low_rank=True)
    dtype: ClassVar[torch.dtype | None] = None

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        dtype, relative, largest = self.dtype or store.dtype, 0.0, 0.0

        def encode(op: LinearOp, weight: QuantizedWeight) -> dict[str, Tensor]:
            nonlocal relative, largest
            exact = op.to_param(weight.merged())
            written = exact.to(dtype)
            relative = max(relative, _relative_deviation(written, exact))
            largest = max(largest, deviation(written, exact))
            return {op.weight: written}

        write_tensors(store, folder, encode)
        folder.merge()
        write_rest(store, folder, dtype)
        return {"dtype": dtype_name(dtype), "largest_relative_deviation": relative, "deviation": largest}

    def weight_in_file(self, store: PackedStore, name: str) -> Tensor | None:
        op, weight = store.graph.op(name), store.quantized(name)
        written = op.to_param(weight.merged()).to(self.dtype or store.dtype).float()
        # the low-rank branch is in the file's weight, and runs beside that of the saved model
        return written if weight.low_rank is None else written - op.to_param(weight.low_rank.product())


def _relative_deviation(written: Tensor, exact: Tensor) -> float:
    """The largest relative deviation from the exact numbers; absolute where the exact number is 0."""
    wrong = (written.float() - exact).abs_()
    return float(torch.where(exact == 0, wrong, wrong / exact.abs()).max())
