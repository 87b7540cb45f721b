"""GPTQ's layout of packed weights, which gptqmodel, vLLM, auto-round and other runtimes read.

A linear layer with weights of shape (out, in) is stored as

    qweight  int32 (in * bits / 32, out)      codes, packed along the inputs
    qzeros   int32 (groups, out * bits / 32)  zero points, packed along the outputs
    scales   fp16  (groups, out)
    g_idx    int32 (in)                       the group of each input

Packed numbers form a stream of bits, one number after another, lowest bits first. The stream is cut into 32-bit words.
Version 1 of the layout stores every zero point minus one, version 2 stores it unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.formats.base import Format, FormatCapabilities, ModelRequirements, WeightType
from gyroquant.formats.checkpoint import (
    TRANSFORMERS_USAGE,
    DecodedTables,
    NegativeScales,
    dtype_name,
    linear_modules,
    original_names,
    pack_words,
    rounded_modules,
    write_rest,
    write_tensors,
)
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import Grid, IntegerGrid, QuantizedWeight
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.stores.packed import PackedStore
from gyroquant.system.version import gyroquant_version

_WORD = 32  # readers unpack as many numbers at a time


class Gptq(Format):
    """A GPTQ checkpoint: one width, one group size and one kind of zero points for all rounded layers of the blocks.

    Symmetric grids are written in version 1, which more readers support, other grids in version 2. There are two
    reasons. GPTQModel accepts zero points minus one from an unknown program only if they have no meaning. And a zero
    point of 0, minus one, would be read as the largest code or as no code, depending on the reader.
    """

    name = "gptq"
    title = "GPTQ checkpoint"
    runtime = TransformersRuntime
    library = "transformers"
    usage = TRANSFORMERS_USAGE + "\n\nIt needs `optimum` and `gptqmodel`. vLLM opens it too."
    capabilities = FormatCapabilities(
        weights=(WeightType("qweight", bits=(2, 3, 4, 8)),), decodes=True, unties=True, wrappers=True
    )

    def incompatibilities(self, needs: ModelRequirements) -> list[str]:
        packed = self.packed(needs)
        return [*super().incompatibilities(needs), *_one_kind(packed), *_whole_words(packed)]

    def decoded(self, needs: ModelRequirements) -> dict[str, str]:
        """All rounded embeddings and heads."""
        reason = f"readers of a {self.title} expect rounded layers in the blocks only"
        return {layer.name: reason for layer in needs.layers if needs.around_blocks(layer)}

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """As in `Format`. Raises InputError, before any work, if a layer's outputs do not fill whole words."""
        decoded = DecodedTables(self, store)
        _check_outputs(store, decoded)
        kinds: dict[tuple[int, int, bool], None] = {}
        zeros: dict[str, Tensor] = {}
        negative = NegativeScales()

        def encode(op: LinearOp, weight: QuantizedWeight) -> dict[str, Tensor]:
            if op in decoded:
                return decoded.tensors(op, weight)
            kinds[_kind(weight.grid)] = None
            negative.look(weight)
            zeros[op.module] = weight.params.zero.squeeze(-1).T.to(torch.uint8)
            return _arrays(op.module, weight)

        write_tensors(store, folder, encode)
        ((bits, group_size, symmetric),) = kinds
        version_2 = not symmetric
        offset = 0 if version_2 else 1
        packed = {f"{name}.qzeros": pack_words(zero - offset, bits).T for name, zero in zeros.items()}
        folder.add(original_names(store, packed))
        folder.merge()
        config = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2" if version_2 else "gptq",
            "bits": bits,
            "group_size": group_size,
            "sym": symmetric,
            "desc_act": False,
            "static_groups": False,
            "true_sequential": True,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"gyroquant:{gyroquant_version()}"]},
        }
        skipped = _skipped(store)
        if skipped:
            architecture = store.graph.architecture
            config |= _exceptions([name for name in rounded_modules(store) if architecture.in_blocks(name)], skipped)
        dtype = store.dtype
        write_rest(store, folder, dtype, config)
        return {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "checkpoint_format": config["checkpoint_format"],
            "zero_points": "as they are" if version_2 else "minus one",
            "dtype": dtype_name(dtype),
            "layers_left_alone": skipped,
            **negative.facts(),
            **decoded.facts(),
        }


def _kind(grid: Grid) -> tuple[int, int, bool]:
    """What must be the same for all layers: bits, group size, and whether the grid is symmetric."""
    if not isinstance(grid, IntegerGrid):
        raise InputError(f"a GPTQ checkpoint cannot hold the grid {grid.grid}")
    return grid.bits, grid.group_size, grid.symmetric


def _arrays(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that are stored for a layer, except its zero points."""
    inputs, groups = weight.codes.shape[1], weight.params.scale.shape[1]
    return {
        f"{module}.qweight": pack_words(weight.codes, weight.grid.bits),
        f"{module}.scales": weight.params.scale.squeeze(-1).T.half(),
        f"{module}.g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
    }


def _one_kind(needs: ModelRequirements) -> Iterable[str]:
    grids = dict.fromkeys(_kind(layer.grid) for layer in needs.layers if isinstance(layer.grid, IntegerGrid))
    if len(grids) > 1:
        kinds = ", ".join(
            f"{bits}-bit {'symmetric' if symmetric else 'asymmetric'} in groups of {size}"
            for bits, size, symmetric in grids
        )
        yield (
            f"a {Gptq.title} has one width, group size and kind of zero points for all layers, but these have {kinds}; "
            "leave overrides and allocate out of the recipe"
        )


def _whole_words(needs: ModelRequirements) -> Iterable[str]:
    odd = next((layer for layer in needs.layers if layer.columns % _WORD), None)
    if odd is not None:
        yield (
            f"a {Gptq.title} packs {_WORD} inputs at a time, and {odd.name} has {odd.columns}; add it to weights.ignore"
        )
    odd = next((layer for layer in needs.layers if layer.rows % _WORD), None)
    if odd is not None:
        yield (
            f"a {Gptq.title} packs {_WORD} outputs at a time, and {odd.name} has {odd.rows}; add it to weights.ignore"
        )


def _check_outputs(store: PackedStore, decoded: DecodedTables) -> None:
    """Raises InputError if a layer's outputs do not fill whole words."""
    for name in store.description["tensors"]:
        op = store.graph.op(name)
        rows = op.matrix_shape[0]
        if rows % _WORD and op not in decoded:
            raise InputError(
                f"a {Gptq.title} packs {_WORD} outputs at a time, and {name} has {rows}; add it to weights.ignore"
            )


def _skipped(store: PackedStore) -> list[str]:
    """The linear layers of the blocks that are not rounded."""
    rounded, architecture = set(rounded_modules(store)), store.graph.architecture
    return [name for name in linear_modules(store) if architecture.in_blocks(name) and name not in rounded]


def _exceptions(rounded: list[str], skipped: list[str]) -> dict[str, Any]:
    """The entries that tell readers which layers of the blocks are rounded. transformers reads the list of those that
    are rounded, gptqmodel the patterns of those that are not, vLLM and auto-round either.
    """
    return {
        "modules_in_block_to_quantize": [rounded],
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in skipped},
    }
