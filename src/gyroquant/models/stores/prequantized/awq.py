"""AutoAWQ's packed layout "gemm": quant_method "awq".

`qweight` (inputs, outputs * bits / 32) and `qzeros` (groups, outputs * bits / 32) hold codes along the outputs. Every
eight codes are in the order 0 2 4 6 1 3 5 7. `scales` has shape (groups, outputs). A weight is (code - zero) * scale.
Zero points are stored unchanged. Source: AutoAWQ, awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.stores.prequantized.base import Arrays, Decoded, Modules, PrequantizedFormat, Stored
from gyroquant.models.stores.prequantized.bits import unpack

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output at each of eight places
_PLACES = torch.tensor(_ORDER).argsort()


def _codes(packed: Tensor, bits: int, outputs: int) -> Tensor:
    codes = unpack(packed, bits, outputs)
    return codes.unflatten(-1, (-1, 8))[..., _PLACES].flatten(-2).float()


def dequantize(arrays: Arrays, *, bits: int, turned: bool) -> Tensor:
    """The fp32 weight, (outputs, inputs), or (inputs, outputs) if `turned`."""
    scales = arrays["scales"].float()
    groups, outputs = scales.shape
    codes = _codes(arrays["qweight"], bits, outputs).unflatten(0, (groups, -1))
    codes.sub_(_codes(arrays["qzeros"], bits, outputs).unsqueeze(1)).mul_(scales.unsqueeze(1))
    weight = codes.flatten(0, 1)
    return weight if turned else weight.T.contiguous()


class Awq(PrequantizedFormat):
    """AWQ in the layout of AutoAWQ's GEMM kernels."""

    methods = ("awq",)

    @property
    def layout(self) -> str:
        return "gemm"

    def check(self) -> None:
        layout = str(self.settings.get("version") or self.settings.get("format") or "gemm").lower()
        if self.settings.get("backend") == "llm-awq":
            layout = "llm-awq"
        if layout != "gemm":
            raise self.refusal(f"in the layout {layout!r} of one kernel, which is not decoded (gemm is)")

    def take(self, stored: Stored, modules: Modules) -> Iterator[Decoded]:
        for key in [key for key in stored if key.endswith(".qweight")]:
            module = key.removesuffix(".qweight")
            yield self.linear(stored, module, modules.turned(module))

    def linear(self, stored: Stored, module: str, turned: bool) -> Decoded:
        """One packed layer. Removes its parts from `stored`."""
        parts = {part: self.part(stored, f"{module}.{part}") for part in ("qweight", "qzeros", "scales")}
        weight, zeros, scales = parts.values()
        flat = all(len(part.shape) == 2 for part in parts.values()) and weight.dtype == zeros.dtype == "I32"
        bits, rest = divmod(weight.shape[-1] * 32, scales.shape[-1])
        inputs, (groups, outputs) = weight.shape[0], scales.shape[:2] if flat else (1, 1)
        if not flat or rest or not 2 <= bits <= 8 or zeros.shape != (groups, weight.shape[1]) or inputs % groups:
            shapes = ", ".join(f"{name} {part.dtype} {part.shape}" for name, part in parts.items())
            raise InputError(f"{self.label}: {module} is not packed as AutoAWQ packs layers ({shapes}): fetch it again")
        group = inputs // groups
        shape = (inputs, outputs) if turned else (outputs, inputs)
        rule = partial(dequantize, bits=bits, turned=turned)
        return self.decoded(f"{module}.weight", shape, parts, rule, bits, -1 if groups == 1 else group)


__all__ = ["Awq"]
