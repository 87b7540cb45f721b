"""The experts of gpt-oss: E2M1 elements in blocks of 32, each block with a power of two. quant_method "mxfp4".

`X_blocks` (experts, outputs, blocks, 16) holds two elements in a byte, the lower half first. `X_scales` (experts,
outputs, blocks) holds exponents plus 127. The parameter X has shape (experts, inputs, outputs).
Sources: OCP Microscaling Formats 1.0; openai/gpt-oss, gpt_oss/torch/weights.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gyroquant.models.stores.prequantized.base import Arrays, Decoded, Modules, PrequantizedFormat, Stored
from gyroquant.models.stores.prequantized.bits import e2m1, e8m0, scale_blocks


def experts(arrays: Arrays) -> Tensor:
    """The stacked experts, (experts, inputs, outputs), fp32. Decodes one expert at a time to save memory."""
    blocks, scales = arrays["blocks"], arrays["scales"]
    count, rows, groups, size = blocks.shape
    out = torch.empty(count, groups * size * 2, rows)
    for number in range(count):
        values = e2m1(blocks[number]).reshape(rows, groups * size * 2)
        out[number] = scale_blocks(values, e8m0(scales[number]), (1, size * 2)).T
    return out


class Mxfp4(PrequantizedFormat):
    """MXFP4 experts beside plain parameters."""

    methods = ("mxfp4",)

    def check(self) -> None:
        """This format has no settings."""

    def take(self, stored: Stored, modules: Modules) -> Iterator[Decoded]:
        for key in [key for key in stored if key.endswith("_blocks")]:
            name = key.removesuffix("_blocks")
            parts = {"blocks": self.part(stored, key), "scales": self.part(stored, f"{name}_scales")}
            blocks, scales = parts["blocks"], parts["scales"]
            if len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or {blocks.dtype, scales.dtype} != {"U8"}:
                raise self.refusal(
                    f"and {key} is {blocks.dtype} {blocks.shape}, its scales {scales.dtype} {scales.shape}: "
                    "stacked experts must be bytes (experts, outputs, blocks, 16)"
                )
            count, rows, groups, size = blocks.shape
            yield self.decoded(name, (count, groups * size * 2, rows), parts, experts, 4, size * 2)
