"""Weights of 8-bit floats with a scale for each block (DeepSeek-V3), matrix or row: quant_method "fp8" and "mxfp8".

Weights are multiplied by the scale, whatever its name: `weight_scale_inv` (DeepSeek, transformers), `weight_scale`
(AutoFP8, vLLM), `scale` (DeepSeek-V4), `qscale_weight` (Mistral). The dtypes of the tensors show which modules are
quantized; `modules_to_not_convert` states the same. DeepSeek-V4's 4-bit experts (`expert_dtype` "fp4") are stored as
int8, two in a byte. Sources: DeepSeek-V3's inference/kernel.py (`weight_dequant`), transformers'
integrations/finegrained_fp8.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from math import prod

from torch import Tensor

from gyroquant.models.graph.model_graph import Shape
from gyroquant.models.stores.prequantized.base import Arrays, Decoded, Modules, PrequantizedFormat, Stored
from gyroquant.models.stores.prequantized.bits import e2m1, e8m0, scale_blocks

FLOATS_OF_8 = ("F8_E4M3", "F8_E5M2")
_EXPONENTS = ("U8", "F8_E8M0")


def scale_of(arrays: Arrays, name: str = "scale") -> Tensor:
    """The stored scales as fp32 numbers. 8-bit scales are exponents of two."""
    scale = arrays[name]
    return e8m0(scale) if scale.element_size() == 1 else scale.float()


def scaled(arrays: Arrays, *, block: tuple[int, int], packed: bool = False) -> Tensor:
    """8-bit elements, or 4-bit elements in pairs if `packed`, times the scale of their block, fp32."""
    values = e2m1(arrays["weight"]) if packed else arrays["weight"].float()
    scale = scale_of(arrays)
    if block == (-1, -1):
        scale, block = scale.reshape(*values.shape[:-2], 1, 1), (values.shape[-2], values.shape[-1])
    elif block[1] == -1:
        scale, block = scale.reshape(*values.shape[:-1], 1), (1, values.shape[-1])
    return scale_blocks(values, scale, block)


def block_of(shape: Shape, scale: Shape, asked: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale, from the shapes of a weight (..., rows, columns) and of its scales.

    The first that fits: `asked`, blocks of 128 x 128, groups of 32 along a row (1, 32), one scale for a matrix
    (-1, -1), one for each row (1, -1). None if nothing fits.
    """
    *stack, rows, columns = shape
    if len(scale) == len(shape) and list(scale[:-2]) == stack:
        for high, wide in (*([asked] if asked else []), (128, 128)):
            if tuple(scale[-2:]) == (-(-rows // high), -(-columns // wide)):
                return high, wide
        if tuple(scale[-2:]) == (rows, columns // 32) and columns % 32 == 0:
            return 1, 32
    count, matrices = prod(scale), prod(stack)
    if count == matrices:
        return -1, -1
    return (1, -1) if count == matrices * rows and tuple(scale) in ((rows,), (*stack, rows, 1)) else None


class Fp8(PrequantizedFormat):
    """Parameters of 8-bit floats, together with plain parameters."""

    methods = ("fp8", "mxfp8")

    def check(self) -> None:
        size = self.settings.get("weight_block_size")
        valid = (
            isinstance(size, list) and len(size) == 2 and all(isinstance(number, int) and number > 0 for number in size)
        )
        if size is not None and not valid:
            raise self.refusal(
                f"in blocks of {size!r}, which is not a valid block size: correct weight_block_size in config.json"
            )
        self.block = None if size is None else (int(size[0]), int(size[1]))
        scheme = self.settings.get("activation_scheme")
        if scheme is not None:
            self.notes.append(f"its runtime rounds the inputs of these layers to fp8 ({scheme}); gyroquant does not")

    def take(self, stored: Stored, modules: Modules) -> Iterator[Decoded]:
        for key in list(stored):
            weight = stored.get(key)
            if weight is None or weight.dtype not in (*FLOATS_OF_8, "I8"):
                continue
            scale = next((name for name in self._scale_names(key) if name in stored), None)
            if scale is None:
                raise self.refusal(f"and {key} is stored as {weight.dtype} without a scale")
            packed = weight.dtype == "I8"
            shape = (*weight.shape[:-1], weight.shape[-1] * 2) if packed else weight.shape
            block = block_of(shape, stored[scale].shape, self.block)
            if block is None or len(shape) < 2:
                raise self.refusal(
                    f"and {scale} of shape {stored[scale].shape} does not fit {key} of shape {shape} "
                    f"in blocks of {self.block}"
                )
            parts = {"weight": stored.pop(key), "scale": stored.pop(scale)}
            rule = partial(scaled, block=block, packed=packed)
            yield self.decoded(key, shape, parts, rule, 4 if packed else 8, block[1] if block[0] == 1 else block)

    @staticmethod
    def _scale_names(key: str) -> tuple[str, ...]:
        """The names that the scale of a weight may have."""
        module = key.removesuffix(".weight")
        beside = () if module == key else (f"{module}.scale", f"{module}.qscale_weight")
        return f"{key}_scale_inv", f"{key}_scale", *beside


__all__ = ["FLOATS_OF_8", "Fp8", "block_of", "scale_of", "scaled"]
