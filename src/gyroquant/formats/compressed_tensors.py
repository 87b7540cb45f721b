"""compressed-tensors' `pack-quantized` checkpoints, which transformers and vLLM read.

A linear layer with weights of shape (out, in) is stored as

    weight_packed      int32 (out, in * bits / 32)      codes minus 2^(bits-1), packed along the inputs
    weight_scale       fp16 or fp32 (out, groups)
    weight_zero_point  int32 (out * bits / 32, groups)  zero points minus 2^(bits-1), packed along the outputs
    weight_shape       int64 (2)

The compressed-tensors library packs the codes and makes the configuration. Since version 0.18, it packs codes of 3, 5,
6 and 7 bits differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.base import Format, FormatCapabilities, Layer, ModelRequirements, WeightType, requirements_of
from gyroquant.formats.checkpoint import (
    TRANSFORMERS_USAGE,
    DecodedTables,
    NegativeScales,
    assembled_weights,
    dtype_name,
    linear_modules,
    original_names,
    weights_are_read,
    write_rest,
    write_tensors,
)
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import Grid, IntegerGrid, QuantizedWeight
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.stores.packed import PackedStore

_FORMAT = "pack-quantized"
_WORD = 32  # bits


class CompressedTensors(Format):
    """A compressed-tensors checkpoint. Every rounded linear layer has a scheme, and several layers may share one.

    Readers compute codes times scales in the dtype in which they open the model, so the weights are exact in fp32. The
    scales are fp16 numbers, which bfloat16 cannot hold. The configuration of a bfloat16 model therefore names float32.
    Its tensors stay in the dtype in which they are stored.

    transformers loads asymmetric weights only if it decompresses them at once, and then in the dtype of the stored
    scales. So those scales are stored in fp32, and the configuration requests the decompression. It also does so if the
    code of the architecture reads the weights of linear layers itself, as that of Mamba does.

    A head of its own is a layer like others. A table of embeddings is decoded: transformers initializes the weights of
    embeddings when it loads a model, and packed ones have none (version 5.23; compressed-tensors 0.20 can pack them).
    """

    name = "compressed-tensors"
    title = "compressed-tensors"
    runtime = TransformersRuntime
    library = "transformers"
    usage = TRANSFORMERS_USAGE + "\n\nIt needs `compressed-tensors`. vLLM opens it too."
    capabilities = FormatCapabilities(
        weights=(WeightType(_FORMAT, bits=tuple(range(2, 9))),), decodes=True, unties=True, wrappers=True
    )
    packages = ("compressed_tensors",)
    extra = "compressed-tensors"

    def incompatibilities(self, needs: ModelRequirements) -> list[str]:
        reasons = [*super().incompatibilities(needs), *_known_modules(needs), *_one_scheme(self.packed(needs))]
        return reasons or list(_loads(needs))

    def decoded(self, needs: ModelRequirements) -> dict[str, str]:
        return {**_unlike_others(needs), **super().decoded(needs)}

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        layers: dict[Grid, list[str]] = {}
        negative, decoded = NegativeScales(), DecodedTables(self, store)
        at_once = _at_once(requirements_of(store))

        def encode(op: LinearOp, weight: QuantizedWeight) -> dict[str, Tensor]:
            if op in decoded:
                return decoded.tensors(op, weight)
            layers.setdefault(_scheme_grid(weight.grid), []).append(op.module)
            negative.look(weight)
            return {f"{op.module}.{part}": tensor for part, tensor in _arrays(weight, at_once).items()}

        write_tensors(store, folder, encode)
        folder.merge()
        dtype = torch.float16 if store.dtype == torch.float16 else torch.float32
        write_rest(store, folder, dtype, _config(store, layers) | ({"dequantize": True} if at_once else {}))
        return {
            "format": _FORMAT,
            "schemes": len(layers),
            "dtype": dtype_name(dtype),
            "scale_dtype": "float32" if at_once else "float16",
            "exact_in": "float32",
            **_readers({grid.bits for grid in layers}),
            **negative.facts(),
            **decoded.facts(),
        }


def _at_once(needs: ModelRequirements) -> bool:
    """Whether all weights are decompressed when they are loaded. Layers outside the blocks follow those inside."""
    symmetric = all(_symmetric(layer.grid) for layer in needs.layers if not needs.around_blocks(layer))
    return not symmetric or (needs.config is not None and weights_are_read(needs.config.get_text_config(decoder=True)))


def _unlike_others(needs: ModelRequirements) -> dict[str, str]:
    """The embeddings and heads that transformers cannot open as they are rounded, each with the reason."""
    around = [layer for layer in needs.layers if needs.around_blocks(layer)]
    if not around:
        return {}
    found, at_once = dict[str, str](), _at_once(needs)
    inside = {_scheme_grid(layer.grid) for layer in needs.layers if layer not in around and _is_integer(layer)}
    for layer in filter(_is_integer, around):
        if layer.table:
            found[layer.name] = "transformers cannot open packed embeddings"
        elif at_once and {_scheme_grid(layer.grid)} != inside:
            found[layer.name] = "transformers decompresses it as if it had the grid of the layers in the blocks"
        elif not at_once and not _symmetric(layer.grid):
            found[layer.name] = "transformers cannot open an asymmetric grid next to a symmetric one"
    return found


def _is_integer(layer: Layer) -> bool:
    return isinstance(layer.grid, IntegerGrid)


def _scheme_grid(grid: Grid) -> Grid:
    """A grid without the settings that do not affect how it is stored, so that layers stored alike share a scheme."""
    if not isinstance(grid, IntegerGrid):
        raise InputError(f"compressed-tensors' {_FORMAT} cannot hold the grid {grid.grid}")
    return IntegerGrid(bits=grid.bits, group_size=grid.group_size, symmetric=grid.symmetric)


def _symmetric(grid: Grid) -> bool:
    return isinstance(grid, IntegerGrid) and grid.symmetric


def _arrays(weight: QuantizedWeight, at_once: bool) -> dict[str, Tensor]:
    """The tensors that are stored for a layer, by the last part of their names. With `at_once`, they are decompressed
    when they are loaded.
    """
    pack = import_module("compressed_tensors.compressors.pack_quantized").pack_to_int32
    bits, scale = weight.grid.bits, weight.params.scale.squeeze(-1)

    def signed(numbers: Tensor) -> Tensor:
        return (numbers.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)

    arrays = {
        "weight_packed": pack(signed(weight.codes), bits),
        "weight_shape": torch.tensor(weight.codes.shape),
        "weight_scale": scale if at_once else scale.half(),
    }
    if not _symmetric(weight.grid):
        arrays["weight_zero_point"] = pack(signed(weight.params.zero.squeeze(-1)), bits, packed_dim=0)
    return arrays


def _readers(widths: Iterable[int]) -> dict[str, Any]:
    """Which versions of compressed-tensors read these widths. Empty if all do.

    Codes whose width does not divide 32 are packed 32 // bits to a word up to version 0.17, and as one stream of bits
    since 0.18. Both packings have the same name, so each version takes every file for its own: a file of the other
    packing fails or is read as other numbers.
    """
    odd = sorted(bits for bits in widths if _WORD % bits)
    if not odd:
        return {}
    pack = import_module("compressed_tensors.compressors.pack_quantized").pack_to_int32
    stream = pack(torch.zeros(1, _WORD, dtype=torch.int8), odd[0]).shape[1] == odd[0]
    versions = "0.18 and newer" if stream else "0.17 and older"
    return {"read_by": f"compressed-tensors {versions}, for the layers of {', '.join(map(str, odd))} bits"}


def _config(store: PackedStore, layers: dict[Grid, list[str]]) -> dict[str, Any]:
    """The `quantization_config`, made by the library's own classes. A single scheme targets all linear layers except
    those that are not rounded. If there are several schemes, each names its layers.
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
    """Modules under their names in transformers and, if these differ, also under their names in the checkpoint."""
    original = original_names(store, {f"{name}.weight": torch.empty(0) for name in modules})
    return list(dict.fromkeys([*modules, *(name.removesuffix(".weight") for name in original)]))


def _known_modules(needs: ModelRequirements) -> Iterable[str]:
    architecture = needs.architecture
    linears = () if architecture is None else tuple(architecture.linears())
    if any(linear.transposed for linear in linears):
        yield f"compressed-tensors does not support the transposed linear weights of {needs.model_type}"
    if any(linear.stacked for linear in linears) and not any(layer.stacked for layer in needs.layers):
        yield (
            f"transformers cannot load the experts of {needs.model_type} from compressed-tensors, even if they are not "
            "rounded"
        )


def _loads(needs: ModelRequirements) -> Iterable[str]:
    if needs.config is None:
        return
    config = needs.config.get_text_config(decoder=True)
    if assembled := assembled_weights(config):
        yield (
            f"transformers cannot load {needs.model_type} from compressed-tensors, because it assembles {assembled[0]} "
            "from several stored weights"
        )


def _one_scheme(needs: ModelRequirements) -> Iterable[str]:
    grids = {_scheme_grid(layer.grid) for layer in needs.layers if isinstance(layer.grid, IntegerGrid)}
    if len(grids) > 1 and _at_once(needs):
        yield (
            "transformers decompresses asymmetric weights as if all layers had the same bits and group size, but these "
            "layers differ; use a symmetric grid, or leave overrides and allocate out of the recipe"
        )
