"""compressed-tensors' `pack-quantized` checkpoints, which transformers and vLLM read.

A linear layer with weights of shape (out, in) is stored as

    weight_packed      int32 (out, in * bits / 32)      codes minus 2^(bits-1), packed along the inputs
    weight_scale       fp16 or fp32 (out, groups)
    weight_zero_point  int32 (out * bits / 32, groups)  zero points minus 2^(bits-1), packed along the outputs
    weight_shape       int64 (2)

Packing and the configuration are the library's own. Codes of 3, 5, 6 and 7 bits are packed differently since its
version 0.18.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.export.checkpoint import (
    NegativeScales,
    described,
    dtype_name,
    linear_modules,
    linears_of,
    original_names,
    write_rest,
    write_tensors,
)
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Carries, Format, Needs, WeightType
from gyroquant.grids import Grid, IntegerGrid, QuantizedWeight
from gyroquant.models.graph import LinearOp
from gyroquant.models.packed import PackedStore

_FORMAT = "pack-quantized"
_WORD = 32  # bits


class CompressedTensors(Format):
    """A compressed-tensors checkpoint: every linear layer has a scheme, several layers may share one.

    Weights come out as codes times scales in the dtype that the model is opened in, so that they are exact in fp32. The
    scales are fp16 numbers; a model in bfloat16 could not hold them and is given out as float32, without its tensors
    being stored any longer for that.

    transformers loads asymmetric weights only when it decompresses them at once, and then in the dtype of the stored
    scales: those are stored in fp32, and the configuration asks for it.
    """

    name = "compressed-tensors"
    title = "compressed-tensors"
    carries = Carries(weights=(WeightType(_FORMAT, bits=tuple(range(2, 9))),), wrappers=True)
    packages = ("compressed_tensors",)
    extra = "compressed-tensors"

    def problems(self, needs: Needs) -> list[str]:
        return [*super().problems(needs), *_known_modules(needs), *_one_asymmetric(needs)]

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        layers: dict[Grid, list[str]] = {}
        negative = NegativeScales()

        def encode(op: LinearOp, weight: QuantizedWeight) -> dict[str, Tensor]:
            layers.setdefault(_plain(weight.grid), []).append(op.module)
            negative.look(weight)
            return {f"{op.module}.{part}": tensor for part, tensor in _arrays(weight).items()}

        write_tensors(store, folder, encode)
        folder.merge()
        dtype = torch.float16 if store.dtype == torch.float16 else torch.float32
        at_once = not all(_symmetric(grid) for grid in layers)
        write_rest(store, folder, dtype, _config(store, layers) | ({"dequantize": True} if at_once else {}))
        return {
            "format": _FORMAT,
            "schemes": len(layers),
            "dtype": dtype_name(dtype),
            "scale_dtype": "float32" if at_once else "float16",
            "exact_in": "float32",
            **_readers({grid.bits for grid in layers}),
            **negative.facts(),
        }


def _plain(grid: Grid) -> Grid:
    """A grid without what makes no difference to its codes, so that layers which are stored alike share a scheme."""
    if not isinstance(grid, IntegerGrid):
        raise InputError(f"compressed-tensors' {_FORMAT} cannot hold the grid {grid.grid}")
    return IntegerGrid(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric)


def _symmetric(grid: Grid) -> bool:
    return isinstance(grid, IntegerGrid) and grid.symmetric


def _arrays(weight: QuantizedWeight) -> dict[str, Tensor]:
    """What is stored for a layer."""
    pack = import_module("compressed_tensors.compressors.pack_quantized").pack_to_int32
    bits, scale = weight.grid.bits, weight.params.scale.squeeze(-1)

    def signed(numbers: Tensor) -> Tensor:
        return (numbers.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)

    arrays = {
        "weight_packed": pack(signed(weight.codes), bits),
        "weight_shape": torch.tensor(weight.codes.shape),
        "weight_scale": scale.half() if _symmetric(weight.grid) else scale,
    }
    if not _symmetric(weight.grid):
        arrays["weight_zero_point"] = pack(signed(weight.params.zero.squeeze(-1)), bits, packed_dim=0)
    return arrays


def _readers(widths: Iterable[int]) -> dict[str, Any]:
    """Which versions of compressed-tensors read these widths, where not all do.

    Widths that do not divide 32 were packed 32 // bits to a word up to version 0.17, and are one stream of bits since
    0.18, under the same name. Versions take either for their own: the other's file fails or comes out as other numbers.
    """
    odd = sorted(bits for bits in widths if _WORD % bits)
    if not odd:
        return {}
    pack = import_module("compressed_tensors.compressors.pack_quantized").pack_to_int32
    stream = pack(torch.zeros(1, _WORD, dtype=torch.int8), odd[0]).shape[1] == odd[0]
    versions = "0.18 and newer" if stream else "0.17 and older"
    return {"read_by": f"compressed-tensors {versions}, for the layers of {', '.join(map(str, odd))} bits"}


def _config(store: PackedStore, layers: dict[Grid, list[str]]) -> dict[str, Any]:
    """The `quantization_config`, by the library's own classes. One scheme is for all linear layers but the ones that
    are left alone, several name their layers.
    """
    library = import_module("compressed_tensors.quantization")
    groups = {}
    for number, (grid, names) in enumerate(layers.items()):
        in_groups = grid.group_size != -1
        weights = library.QuantizationArgs(
            num_bits=grid.bits,
            type="int",
            symmetric=_symmetric(grid),
            strategy="group" if in_groups else "channel",
            group_size=grid.group_size if in_groups else None,
        )
        targets = ["Linear"] if len(layers) == 1 else _both_names(store, names)
        groups[f"group_{number}"] = library.QuantizationScheme(targets=targets, weights=weights, format=_FORMAT)
    rounded = {name for names in layers.values() for name in names}
    config = library.QuantizationConfig(
        config_groups=groups,
        format=_FORMAT,
        quantization_status="compressed",
        ignore=_both_names(store, [name for name in linear_modules(store) if name not in rounded]),
    )
    version = import_module("compressed_tensors").__version__
    return dict(config.model_dump(mode="json")) | {"version": version}


def _both_names(store: PackedStore, modules: list[str]) -> list[str]:
    """Modules under the names that transformers has for them and, where it is another, the name in the checkpoint."""
    original = original_names(store, {f"{name}.weight": torch.empty(0) for name in modules})
    return list(dict.fromkeys([*modules, *(name.removesuffix(".weight") for name in original)]))


def _known_modules(needs: Needs) -> Iterable[str]:
    architecture = described(needs.model_type)
    linears = () if architecture is None else tuple(linears_of(architecture))
    if any(one.transposed for one in linears):
        yield f"compressed-tensors knows no linear layers with transposed weights, as {needs.model_type} has them"
    if any(one.stacked for one in linears) and not any(one.stacked for one in needs.layers):
        yield f"transformers loads no experts from compressed-tensors, rounded or not, and {needs.model_type} has some"


def _one_asymmetric(needs: Needs) -> Iterable[str]:
    grids = {_plain(one.grid) for one in needs.layers if isinstance(one.grid, IntegerGrid)}
    if len(grids) > 1 and not all(_symmetric(grid) for grid in grids):
        yield (
            "transformers decompresses asymmetric weights as if all layers of a model had the same bits and groups, "
            "these have several; use a symmetric grid, or leave overrides and allocate out"
        )
