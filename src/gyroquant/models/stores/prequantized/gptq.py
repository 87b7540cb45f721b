"""GPTQ's packed layout, of AutoGPTQ, GPTQModel and others: quant_method "gptq".

- `qweight` (inputs * bits / 32, outputs): codes along the inputs, as one bit stream, lowest bits first.
- `qzeros` (groups, outputs * bits / 32): zero points along the outputs, as one bit stream, lowest bits first.
- `scales` (groups, outputs).
- `g_idx` (inputs): the group of each input.

A weight is (code - zero) * scale. The first layout ("gptq") stores zero points minus one. At 2, 4 and 8 bits, GPTQModel
subtracts a packed word of ones from the whole word, so that a zero point of 0 borrows from its neighbour, and adds it
back in the same way. At 3 and 5 to 7 bits, it works field by field. Layout 2 ("gptq_v2") stores zero points unchanged.
The shapes determine the bits, so that layers with other bits (`dynamic`) need no special treatment.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.stores.prequantized.base import Arrays, Decoded, Modules, PrequantizedFormat, Stored
from gyroquant.models.stores.prequantized.bits import unpack

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_WORDS = {"I8": 8, "I16": 16, "I32": 32, "I64": 64}
_WHOLE = (2, 4, 8)  # bits at which a word holds a whole number of codes


def zero_points(packed: Tensor, bits: int, count: int, minus_one: bool) -> Tensor:
    """Unpacks zero points: (groups, outputs), fp32. `minus_one`: they are stored minus one."""
    if not minus_one:
        return unpack(packed, bits, count).float()
    if bits in _WHOLE:
        width = packed.element_size() * 8
        ones = sum(1 << shift for shift in range(0, width, bits))
        ones -= (1 << width) if ones >> (width - 1) else 0  # as a signed word
        return unpack(packed + torch.tensor(ones, dtype=packed.dtype), bits, count).float()
    return ((unpack(packed, bits, count).int() + 1) & ((1 << bits) - 1)).float()


def dequantize(arrays: Arrays, *, bits: int, inputs: int, group: int, minus_one: bool, turned: bool) -> Tensor:
    """The fp32 weight, (outputs, inputs), or (inputs, outputs) if `turned`.

    Without `g_idx`, each `group` consecutive inputs form a group. Raises InputError if `g_idx` does not fit.
    """
    scales = arrays["scales"].float()
    groups, outputs = scales.shape
    zeros = zero_points(arrays["qzeros"], bits, outputs, minus_one)
    order = arrays.get("g_idx")
    index = torch.arange(inputs) // group if order is None else order.long()
    if index.shape != (inputs,) or not 0 <= int(index.min()) <= int(index.max()) < groups:
        raise InputError(f"its g_idx is not {inputs} numbers of groups below {groups}")
    codes = unpack(arrays["qweight"].T, bits, inputs)
    weight = codes.T.float().sub_(zeros[index]).mul_(scales[index])
    return weight if turned else weight.T.contiguous()


def check_linear(module: str, parts: Stored, label: str) -> tuple[int, int, int, int]:
    """Bits, inputs, outputs and groups of a packed layer, from the shapes of its parts.

    Raises InputError if these do not fit one another.
    """
    weight, zeros, scales = (parts[part] for part in ("qweight", "qzeros", "scales"))
    flat = all(len(part.shape) == 2 for part in (weight, zeros, scales))
    if flat and weight.dtype in _WORDS and zeros.dtype == weight.dtype and weight.shape[1] == scales.shape[1]:
        (groups, outputs), width = scales.shape, _WORDS[weight.dtype]
        bits, rest = divmod(zeros.shape[1] * width, outputs)
        inputs = weight.shape[0] * width // bits if bits else 0
        if 2 <= bits <= 8 and not rest and weight.shape[0] * width == inputs * bits and zeros.shape[0] == groups:
            return bits, inputs, outputs, groups
    shapes = ", ".join(f"{name} {part.dtype} {part.shape}" for name, part in parts.items())
    raise InputError(f"{label}: {module} is not packed as GPTQ packs layers ({shapes}): fetch it again")


class Gptq(PrequantizedFormat):
    """GPTQ's layouts 1 and 2."""

    methods = ("gptq",)

    @property
    def layout(self) -> str:
        return "gptq" if self._minus_one else "gptq_v2"

    def check(self) -> None:
        layout = self.settings.get("checkpoint_format") or self.settings.get("format") or "gptq"
        if self.settings.get("is_marlin_format"):
            layout = "marlin"
        if layout not in ("gptq", "gptq_v2"):
            raise self.refusal(f"in the layout {layout!r} of one kernel, which is not decoded (gptq and gptq_v2 are)")
        self._minus_one = layout == "gptq"
        self._group = self.setting("group_size", int, -1)

    def take(self, stored: Stored, modules: Modules) -> Iterator[Decoded]:
        for key in [key for key in stored if key.endswith(".qweight")]:
            module = key.removesuffix(".qweight")
            yield self.linear(stored, module, modules.turned(module))

    def linear(self, stored: Stored, module: str, turned: bool) -> Decoded:
        """One packed layer. Removes its parts from `stored`."""
        parts = {part: self.part(stored, f"{module}.{part}") for part in PARTS[:3]}
        if f"{module}.g_idx" in stored:
            parts["g_idx"] = stored.pop(f"{module}.g_idx")
        bits, inputs, outputs, groups = check_linear(module, parts, self.label)
        group = inputs // groups if inputs % groups == 0 else self._group
        if "g_idx" not in parts and (group < 1 or -(-inputs // group) != groups):
            raise self.refusal(
                f"and {module} has {groups} groups for {inputs} inputs, which does not fit a group size of {group}"
            )
        shape = (inputs, outputs) if turned else (outputs, inputs)
        minus_one = self._minus_one
        rule = partial(dequantize, bits=bits, inputs=inputs, group=group, minus_one=minus_one, turned=turned)
        return self.decoded(f"{module}.weight", shape, parts, rule, bits, -1 if groups == 1 else group)


__all__ = ["Gptq", "check_linear", "dequantize", "zero_points"]
