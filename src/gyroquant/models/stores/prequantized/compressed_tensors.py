"""compressed-tensors, as llm-compressor and vLLM use it: integers, packed or not, and floats of 8, 6 and 4 bits.

The stored tensors of a layer determine its form:

- `weight_packed` of int32: pack-quantized.
- `weight_packed` of bytes, with scales of 8-bit floats and a `weight_global_scale` that divides them:
  nvfp4-pack-quantized.
- `weight_packed` of bytes, with exponents of two as scales: mxfp4- and mxfp6-pack-quantized.
- `weight` of int8 or float8 with a `weight_scale`: int-, float-, naive-quantized and mxfp8.

The scheme whose targets include the layer's name or kind gives bits, symmetry and group sizes.

There are two layouts under the name pack-quantized. Until version 0.17, a 32-bit word holds 32 // bits whole codes.
Since 0.18, codes are one bit stream that crosses words. For 2, 4 and 8 bits the two are equal. For 3, 5, 6 and 7 bits
the number of words shows the layout. Codes are stored plus 2^(bits - 1). Source: compressed_tensors/compressors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.graph.model_graph import Shape
from gyroquant.models.stores.prequantized.base import Arrays, Decoded, Modules, PrequantizedFormat, Stored
from gyroquant.models.stores.prequantized.bits import e2m1, e8m0, scale_blocks, unpack, unpack_padded
from gyroquant.models.stores.prequantized.fp8 import FLOATS_OF_8

_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"),
)
_OPTIONAL_PARTS = {"global": "weight_global_scale", "zeros": "weight_zero_point", "g_idx": "weight_g_idx"}
# 6 bits, E2M3: 0 to 7/8, then eight steps for each power of two from 1 on
_E2M3 = torch.tensor([m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)])
_E2M3 = torch.cat((_E2M3, -_E2M3))


@dataclass(frozen=True)
class Scheme:
    """How the weights of some layers are rounded. `block`: rows and columns that share a scale; -1 means all."""

    bits: int
    floats: bool
    symmetric: bool
    block: tuple[int, int]
    targets: tuple[str, ...]

    @property
    def group(self) -> int | tuple[int, int]:
        return self.block[1] if self.block[0] == 1 else self.block


def _unpacker(packed: Shape | int, count: int, bits: int) -> Callable[[Tensor, int, int], Tensor]:
    """The function that unpacks `count` codes from `packed` words a row. Raises InputError if no layout fits."""
    if packed == -(-count * bits // 32):
        return unpack
    if packed == -(-count // (32 // bits)):
        return unpack_padded
    raise InputError(f"{packed} words do not hold {count} codes of {bits} bits")


def _zero_points(zeros: Tensor, scale: Tensor, rows: int, bits: int) -> Tensor:
    """Zero points of a packed layer, (..., rows, groups), fp32. They are packed along the rows, or plain bytes."""
    if zeros.dtype != torch.int32:
        return zeros.float().expand(scale.shape)
    read = _unpacker(zeros.shape[-2], rows, bits)
    return read(zeros.transpose(-1, -2), bits, rows).transpose(-1, -2).float() - (1 << (bits - 1))


def _block_scales(values: Tensor, scale: Tensor, block: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
    """Scales of shape (..., row blocks, column blocks), and the block with sizes in place of -1."""
    rows, columns = values.shape[-2:]
    high, wide = (rows if block[0] == -1 else block[0]), (columns if block[1] == -1 else block[1])
    return scale.reshape(*values.shape[:-2], -(-rows // high), -(-columns // wide)), (high, wide)


def _repeat_blocks(numbers: Tensor, values: Tensor, block: tuple[int, int]) -> Tensor:
    """Repeats a number for each block to one number for each value."""
    rows, columns = values.shape[-2:]
    return numbers.repeat_interleave(block[0], -2)[..., :rows, :].repeat_interleave(block[1], -1)[..., :columns]


def integers(arrays: Arrays, *, scheme: Scheme, shape: Shape) -> Tensor:
    """Integers, packed or one in a byte, minus their zero points, times their scales: fp32 of shape `shape`."""
    if "packed" in arrays:
        packed = arrays["packed"]
        read = _unpacker(packed.shape[-1], shape[-1], scheme.bits)
        values = read(packed, scheme.bits, shape[-1]).float().sub_(1 << (scheme.bits - 1))
    else:
        values = arrays["weight"].float()
    scale, zeros, order = arrays["scale"].float(), arrays.get("zeros"), arrays.get("g_idx")
    if zeros is not None:
        zeros = _zero_points(zeros, scale, shape[-2], scheme.bits)
    if order is not None and bool((order >= 0).all()):  # a g_idx of -1 was never set
        index = order.long()
        values = values if zeros is None else values.sub_(zeros[..., index])
        return values.mul_(scale[..., index])
    scale, block = _block_scales(values, scale, scheme.block)
    if zeros is not None:
        values.sub_(_repeat_blocks(zeros.reshape(scale.shape), values, block))
    return scale_blocks(values, scale, block)


def floats(arrays: Arrays, *, scheme: Scheme, shape: Shape) -> Tensor:
    """Floats of 8, 6 or 4 bits times their scales: fp32 of shape `shape`."""
    if "packed" not in arrays:
        values = arrays["weight"].float()
    elif scheme.bits == 4:
        values = e2m1(arrays["packed"])
    else:
        values = _E2M3[unpack(arrays["packed"], 6, shape[-1]).int()]
    scale = e8m0(arrays["scale"]) if arrays["scale"].dtype == torch.uint8 else arrays["scale"].float()
    if "global" in arrays:
        scale = scale / arrays["global"].float()
    return scale_blocks(values, *_block_scales(values, scale, scheme.block))


def _scheme(group: Mapping[str, Any], refusal: Callable[[str], InputError]) -> Scheme | None:
    """The scheme of a group of layers; None if its weights are not rounded. Raises `refusal` if it is not decoded."""
    weights, targets = group.get("weights"), group.get("targets")
    if weights is None:
        return None
    if not isinstance(weights, dict) or not isinstance(targets, list):
        raise refusal("and a group of its config_groups has no weights or targets: correct config.json")
    bits, group_size, kind = weights.get("num_bits"), weights.get("group_size"), weights.get("type", "int")
    strategy = weights.get("strategy") or (
        "tensor" if group_size is None else "channel" if group_size == -1 else "group"
    )
    structure = weights.get("block_structure")
    if isinstance(structure, str):  # "128x128" in old files
        structure = [int(number) for number in re.findall(r"\d+", structure)]
    sizes: Any = {"tensor": (-1, -1), "channel": (1, -1), "block": structure}.get(strategy, (1, group_size))
    valid = isinstance(bits, int) and (1 <= bits <= 8 if kind == "int" else kind == "float" and bits in (4, 6, 8))
    valid = valid and strategy in _STRATEGIES and isinstance(sizes, (list, tuple)) and len(sizes) == 2
    if not valid or not all(isinstance(size, int) and (size > 0 or size == -1) for size in sizes):
        raise refusal(f"with weights of {weights}, a scheme that is not decoded")
    symmetric = weights.get("symmetric", True) is not False
    return Scheme(weights["num_bits"], kind == "float", symmetric, (sizes[0], sizes[1]), tuple(map(str, targets)))


class CompressedTensors(PrequantizedFormat):
    """The formats of compressed-tensors that hold only weights."""

    methods = ("compressed-tensors", "compressed_tensors")

    @property
    def layout(self) -> str | None:
        return self.settings.get("format")

    def check(self) -> None:
        settings = self.settings
        if settings.get("transform_config"):
            raise self.refusal(
                "with a transform_config: rotations that run with the model, which transformers silently ignores"
            )
        sparse = settings.get("sparsity_config") or {}
        if sparse.get("format", "dense") != "dense" or settings.get("moe_sparsity_config"):
            raise self.refusal(f"and sparse ({sparse.get('format') or 'pruned experts'}), which is not decoded")
        groups = settings.get("config_groups")
        if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
            raise self.refusal(f"and its config_groups are {groups!r}, which is not a scheme: correct config.json")
        for kind in (settings.get("format"), *(group.get("format") for group in groups.values())):
            if kind is not None and kind not in _FORMATS:
                raise self.refusal(f"in the format {kind!r}, which is not decoded ({', '.join(_FORMATS)} are)")
        schemes = [_scheme(group, self.refusal) for group in groups.values()]
        self.schemes = [scheme for scheme in schemes if scheme is not None]
        for group in groups.values():
            for name in ("input_activations", "output_activations"):
                self._note(name.replace("_", " "), group.get(name))
        self._note("the KV cache", settings.get("kv_cache_scheme"))

    def _note(self, rounded: str, scheme: Any) -> None:
        """Notes what else the runtime rounds, if there is a scheme for it."""
        if isinstance(scheme, dict):
            form = f"{scheme.get('num_bits')} bits ({scheme.get('type', 'int')})"
            text = f"its runtime rounds {rounded} to {form}; gyroquant does not"
            if text not in self.notes:
                self.notes.append(text)

    def scheme_of(self, module: str, modules: Modules) -> Scheme:
        """The scheme of a layer: by its name, a pattern of names, or its kind, in this order.

        Raises InputError if there are several schemes and none of them has the layer as a target.
        """
        layer = modules.find(module)
        kind = "Linear" if layer is None else type(layer).__name__
        for matches in (module.__eq__, lambda t: t[:3] == "re:" and re.match(t[3:], module), lambda t: t == kind):
            for scheme in self.schemes:
                if any(matches(target) for target in scheme.targets):
                    return scheme
        if len(self.schemes) == 1:
            return self.schemes[0]
        raise self.refusal(f"and no group of its config_groups has {module} as a target: correct config.json")

    def take(self, stored: Stored, modules: Modules) -> Iterator[Decoded]:
        for key in [key for key in stored if key.endswith(".weight_packed")]:
            module = key.removesuffix(".weight_packed")
            yield self._layer(stored, module, "packed", self.scheme_of(module, modules))
        for key in [key for key in stored if key.endswith(".weight_scale")]:
            module = key.removesuffix(".weight_scale")
            weight = stored.get(f"{module}.weight")
            if weight is None or weight.dtype not in (*FLOATS_OF_8, "I8"):
                why = "its weight is missing" if weight is None else f"its weight is plain numbers ({weight.dtype})"
                raise self.refusal(f"and {key} is a scale, but {why}: it was not saved compressed")
            yield self._layer(stored, module, "weight", self.scheme_of(module, modules))

    def _layer(self, stored: Stored, module: str, kind: str, scheme: Scheme) -> Decoded:
        names = {"packed": "weight_packed", "weight": "weight", "scale": "weight_scale"}
        parts = {part: self.part(stored, f"{module}.{names[part]}") for part in (kind, "scale")}
        for part, name in _OPTIONAL_PARTS.items():
            if f"{module}.{name}" in stored:
                parts[part] = stored.pop(f"{module}.{name}")
        stated_shape = stored.pop(f"{module}.weight_shape", None)
        if scheme.symmetric:
            parts.pop("zeros", None)  # the library ignores them too
        elif "zeros" not in parts:
            raise self.refusal(f"and {module} has no zero points, although its scheme is asymmetric")
        codes = parts[kind]
        dtypes = {"packed": ("U8",) if scheme.floats else ("I32",), "weight": FLOATS_OF_8 if scheme.floats else ("I8",)}
        if codes.dtype not in dtypes[kind] or len(codes.shape) < 2:
            raise self.refusal(f"and {module} is {codes.dtype} {codes.shape}, not {scheme.bits} bits of its scheme")
        columns = self._columns(kind, codes.shape[-1], parts["scale"].shape, stated_shape, scheme)
        shape = (*codes.shape[:-1], columns)
        rule = partial(floats if scheme.floats else integers, scheme=scheme, shape=shape)
        return self.decoded(f"{module}.weight", shape, parts, rule, scheme.bits, scheme.group)

    @staticmethod
    def _columns(kind: str, width: int, scale: Shape, stated_shape: Any, scheme: Scheme) -> int:
        """The number of inputs of a layer, from its stored tensors."""
        if kind == "weight":
            return width
        if scheme.floats:
            return width * 8 // scheme.bits
        if scheme.block[0] == 1 and scheme.block[1] > 0:
            return scale[-1] * scheme.block[1]
        return width * 32 // scheme.bits if stated_shape is None else int(stated_shape[...][-1])


__all__ = ["CompressedTensors", "Scheme", "floats", "integers"]
