"""GPTQ's layout of packed weights, which gptqmodel, vLLM, auto-round and other runtimes read.

A linear layer with weights of shape (out, in) is stored as

    qweight  int32 (in * bits / 32, out)      codes, packed along the inputs
    qzeros   int32 (groups, out * bits / 32)  zero points, packed along the outputs
    scales   fp16  (groups, out)
    g_idx    int32 (in)                       the group of each input

where packed numbers lie one behind the other in a stream of bits, lowest bits first, that is cut into 32-bit words.
The first version of the layout stores every zero point minus one, the second as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gyroquant.environment import gyroquant_version
from gyroquant.errors import InputError
from gyroquant.export.checkpoint import (
    NegativeScales,
    described,
    dtype_name,
    linear_modules,
    original_names,
    rounded_modules,
    write_rest,
    write_tensors,
)
from gyroquant.export.folder import OutputFolder
from gyroquant.export.formats import Carries, Format, Needs, WeightType
from gyroquant.grids import Grid, IntegerGrid, QuantizedWeight
from gyroquant.models.graph import LinearOp
from gyroquant.models.packed import PackedStore, matrix_shape

_WORD = 32  # readers unpack as many numbers at a time


class Gptq(Format):
    """A GPTQ checkpoint: one width, one group size and one kind of zero points for all rounded layers of the blocks.

    Of symmetric grids it is of version 1, which more readers understand, of others of version 2: GPTQModel takes zero
    points minus one of a program that it does not know only where they mean nothing, and minus one of 0 would come back
    as the largest code, or as none, depending on the reader.
    """

    name = "gptq"
    title = "GPTQ checkpoint"
    carries = Carries(weights=(WeightType("qweight", bits=(2, 3, 4, 8)),), wrappers=True)

    def problems(self, needs: Needs) -> list[str]:
        return [*super().problems(needs), *_one_kind(needs), *_in_blocks(needs), *_whole_words(needs)]

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """As in `Format`. Raises InputError, before anything is written, for outputs that do not fill whole words."""
        _check_outputs(store)
        kinds: dict[tuple[int, int, bool], None] = {}
        zeros: dict[str, Tensor] = {}
        negative = NegativeScales()

        def encode(op: LinearOp, weight: QuantizedWeight) -> dict[str, Tensor]:
            kinds[_kind(weight.grid)] = None
            negative.look(weight)
            zeros[op.module] = weight.params.zero.squeeze(-1).T.to(torch.uint8)
            return _arrays(op.module, weight)

        write_tensors(store, folder, encode)
        ((bits, group_size, symmetric),) = kinds
        second = not symmetric
        less = 0 if second else 1
        packed = {f"{name}.qzeros": _pack(zero - less, bits).T for name, zero in zeros.items()}
        folder.add(original_names(store, packed))
        folder.merge()
        config = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2" if second else "gptq",
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
            config |= _exceptions(rounded_modules(store), skipped)
        dtype = store.dtype
        write_rest(store, folder, dtype, config)
        return {
            "bits": bits,
            "group_size": group_size,
            "symmetric": symmetric,
            "checkpoint_format": config["checkpoint_format"],
            "zero_points": "as they are" if second else "minus one",
            "dtype": dtype_name(dtype),
            "layers_left_alone": skipped,
            **negative.facts(),
        }


def _kind(grid: Grid) -> tuple[int, int, bool]:
    """What must be the same for all layers: bits, group size, whether symmetric."""
    if not isinstance(grid, IntegerGrid):
        raise InputError(f"a GPTQ checkpoint cannot hold the grid {grid.grid}")
    return grid.bits, grid.group_size, grid.symmetric


def _arrays(module: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """What is stored for a layer, all but its zero points."""
    inputs, groups = weight.codes.shape[1], weight.params.scale.shape[1]
    return {
        f"{module}.qweight": _pack(weight.codes, weight.grid.bits),
        f"{module}.scales": weight.params.scale.squeeze(-1).T.half(),
        f"{module}.g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // groups),
    }


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes below 2^bits, shape (rows, n) with n a multiple of 32, each row packed down a column of 32-bit words:
    shape (n * bits / 32, rows).
    """
    rows, length = codes.shape
    runs = codes.T.reshape(length // _WORD, _WORD, rows)  # 32 numbers fill as many words as they have bits
    words = torch.zeros(length // _WORD, bits, rows, dtype=torch.int64)
    for i in range(_WORD):
        number = runs[:, i].long()
        word, start = divmod(i * bits, _WORD)
        words[:, word] |= (number << start) & 0xFFFFFFFF
        if start + bits > _WORD:
            words[:, word + 1] |= number >> (_WORD - start)
    return (words - ((words >> 31) << 32)).to(torch.int32).reshape(-1, rows)  # as the signed words of the same bits


def _one_kind(needs: Needs) -> Iterable[str]:
    grids = dict.fromkeys(_kind(one.grid) for one in needs.layers if isinstance(one.grid, IntegerGrid))
    if len(grids) > 1:
        found = ", ".join(
            f"{bits}-bit {'symmetric' if symmetric else 'asymmetric'} in groups of {size}"
            for bits, size, symmetric in grids
        )
        yield (
            f"a {Gptq.title} has one width, group size and kind of zero points for all layers, these have {found}; "
            "leave overrides and allocate out"
        )


def _in_blocks(needs: Needs) -> Iterable[str]:
    architecture = described(needs.model_type)
    if architecture is None:
        return
    outside = [one.name for one in needs.layers if not one.name.startswith(f"{architecture.blocks}.")]
    if outside:
        yield (
            f"readers of a {Gptq.title} look for rounded layers in the blocks alone, {', '.join(outside)} is around "
            "them; add it to weights.ignore"
        )


def _whole_words(needs: Needs) -> Iterable[str]:
    odd = next((one for one in needs.layers if one.columns % _WORD), None)
    if odd is not None:
        yield f"a {Gptq.title} packs {_WORD} inputs at a time, {odd.name} has {odd.columns}; add it to weights.ignore"


def _check_outputs(store: PackedStore) -> None:
    """Raises InputError when a layer's outputs do not fill whole words."""
    for name, entry in store.description["tensors"].items():
        rows = matrix_shape(store.shapes[name], bool(entry.get("transposed")))[0]
        if rows % _WORD:
            raise InputError(
                f"a {Gptq.title} packs {_WORD} outputs at a time, {name} has {rows}; add it to weights.ignore"
            )


def _skipped(store: PackedStore) -> list[str]:
    """The linear layers of the blocks that are not rounded."""
    rounded, blocks = set(rounded_modules(store)), f"{store.graph.architecture.blocks}."
    return [name for name in linear_modules(store) if name.startswith(blocks) and name not in rounded]


def _exceptions(rounded: list[str], skipped: list[str]) -> dict[str, Any]:
    """How readers are told that not all layers of the blocks are rounded: transformers by those that are, gptqmodel by
    patterns of those that are not, vLLM and auto-round by either.
    """
    return {
        "modules_in_block_to_quantize": [rounded],
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in skipped},
    }
