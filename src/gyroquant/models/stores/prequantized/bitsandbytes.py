"""bitsandbytes: NF4 and FP4 in blocks of a flat tensor, with or without rounded maxima, and int8.

4 bits:

- `weight`: two codes in a byte, the upper half first, row after row of the whole tensor.
- `weight.absmax`: the largest magnitude of each block.
- `weight.quant_map`: the values of the codes.
- `weight.quant_state.bitsandbytes__nf4`: the rest, as JSON.

With double quantization, `absmax` holds codes: a maximum is `nested_quant_map` of its code, times `nested_absmax` of
its block, plus `nested_offset`. 8 bits: `weight` is int8, times the `SCB` of its row over 127.
Source: bitsandbytes/functional.py.

This module does not call the library: if a row is not a whole number of blocks, its CPU kernels use the scales of other
blocks.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.stores.prequantized.base import Arrays, Decoded, Modules, PrequantizedFormat, Stored

_STATE = ".quant_state.bitsandbytes__"
_NESTED = ("nested_absmax", "nested_quant_map")


def _blockwise(values: Tensor, largest: Tensor, size: int) -> Tensor:
    """Flat values times the maximum of their block of `size` values, fp32."""
    if largest.numel() != -(-values.numel() // size):
        raise InputError(f"{largest.numel()} maxima are not those of {values.numel()} numbers in blocks of {size}")
    return values * largest.repeat_interleave(size)[: values.numel()]


def dequantize_4(arrays: Arrays, *, state: dict[str, Any]) -> Tensor:
    """The fp32 tensor that `state` describes. Raises InputError if there are too few codes or maxima."""
    count, largest = prod(state["shape"]), arrays["absmax"]
    if "nested_absmax" in arrays:
        steps = arrays["nested_quant_map"].float()[largest.int()]
        largest = _blockwise(steps, arrays["nested_absmax"].float(), state["nested_blocksize"]) + state["nested_offset"]
    data = arrays["weight"].reshape(-1).view(torch.uint8)
    codes = torch.stack((data >> 4, data & 15), dim=1).reshape(-1)
    if codes.numel() < count:
        raise InputError(f"{codes.numel()} codes are too few for shape {state['shape']}")
    values = arrays["quant_map"].float()[codes[:count].int()]
    return _blockwise(values, largest.float(), state["blocksize"]).reshape(state["shape"])


def dequantize_8(arrays: Arrays) -> Tensor:
    """int8 rows times their scale over 127, as fp32."""
    return arrays["weight"].float() * (arrays["SCB"].float() / 127).unsqueeze(-1)


class BitsAndBytes(PrequantizedFormat):
    """NF4, FP4 and int8 as bitsandbytes stores them."""

    methods = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")

    @property
    def layout(self) -> str:
        return str(self.settings.get("bnb_4bit_quant_type", "fp4")) if self.settings.get("load_in_4bit") else "int8"

    def check(self) -> None:
        if self.settings.get("load_in_8bit"):
            threshold = self.settings.get("llm_int8_threshold", 6.0)
            self.notes.append(
                f"its runtime rounds inputs to int8, except columns above {threshold}; gyroquant does not"
            )

    def take(self, stored: Stored, modules: Modules) -> Iterator[Decoded]:
        for key in [key for key in stored if _STATE in key]:
            yield self._four_bit(stored, key)
        for key in [key for key in stored if key.endswith(".SCB")]:
            yield self._eight_bit(stored, key.removesuffix(".SCB"))

    def _four_bit(self, stored: Stored, key: str) -> Decoded:
        name = key.partition(_STATE)[0]
        state = self._state(key, stored.pop(key)[...])
        names = ("absmax", "quant_map", *(_NESTED if "nested_blocksize" in state else ()))
        parts = {"weight": self.part(stored, name)} | {part: self.part(stored, f"{name}.{part}") for part in names}
        rule = partial(dequantize_4, state=state)
        return self.decoded(name, tuple(state["shape"]), parts, rule, 4, state["blocksize"])

    def _state(self, key: str, data: Tensor) -> dict[str, Any]:
        try:
            state = json.loads(bytes(data.tolist()))
            nested = "nested_blocksize" in state or "nested_offset" in state
            sizes = [state["blocksize"], *state["shape"], *([state["nested_blocksize"]] if nested else [])]
            valid = state["shape"] and all(isinstance(size, int) and size > 0 for size in sizes)
            if not valid or (nested and not isinstance(state["nested_offset"], float)):
                raise ValueError("its sizes are not positive numbers")
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.label}: {key} does not describe a tensor ({error}): fetch it again") from error
        return dict(state)

    def _eight_bit(self, stored: Stored, module: str) -> Decoded:
        parts = {"weight": self.part(stored, f"{module}.weight"), "SCB": self.part(stored, f"{module}.SCB")}
        order, weight = stored.pop(f"{module}.weight_format", None), parts["weight"]
        if order is not None and int(order[...]) != 0:
            raise self.refusal(f"and {module} is in the order of a GPU's tiles: save it with a newer bitsandbytes")
        if weight.dtype != "I8" or len(weight.shape) != 2 or parts["SCB"].shape != weight.shape[:1]:
            raise self.refusal(f"and {module} is {weight.dtype} {weight.shape} with scales {parts['SCB'].shape}")
        return self.decoded(f"{module}.weight", weight.shape, parts, dequantize_8, 8, -1)
