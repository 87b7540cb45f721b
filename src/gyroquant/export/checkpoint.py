"""What formats in transformers' own shape share: tensors written group by group under their original names, the
configuration, the tokenizer, and what loaders will make of the linear layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

import gyroquant.models.architectures  # noqa: F401  (registers the described architectures)
from gyroquant.errors import InputError
from gyroquant.export.config import write_config
from gyroquant.export.folder import OutputFolder
from gyroquant.export.writer import copy_companions
from gyroquant.grids import QuantizedWeight
from gyroquant.models.graph import LinearOp
from gyroquant.models.packed import PackedStore
from gyroquant.models.spec import Architecture, Linear, architectures

Encode = Callable[[LinearOp, QuantizedWeight], dict[str, Tensor]]


def write_tensors(store: PackedStore, folder: OutputFolder, encode: Encode) -> None:
    """Writes every parameter of a model block by block: rounded ones as what `encode` makes of them, others as they are
    stored. Experts that are stacked here are listed again, and names are those of the original checkpoint.
    """
    rounded = store.description["tensors"]
    ops = {op.weight: op for group in (*store.graph.blocks, store.graph.outer) for op in group.linears}
    numbers = range(len(store.graph.blocks))
    for names in (*(store.graph.block_params(i) for i in numbers), store.graph.outer_params()):
        tensors = store.read([name for name in names if name not in rounded])
        for name in names:
            if name in rounded:
                tensors |= encode(ops[name], store.quantized(name))
        folder.add(original_names(store, tensors))
    for name in store.graph.carried:
        folder.add(original_names(store, store.read([name])))


def original_names(store: PackedStore, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as the original checkpoint names and lists them."""
    return dict(revert_weight_conversion(store.skeleton(), tensors))


def write_rest(
    store: PackedStore, folder: OutputFolder, dtype: torch.dtype, quantization: dict[str, Any] | None = None
) -> None:
    """Writes the configuration, with this `quantization_config` if any and the dtype that loaders choose by default,
    and, where the model has them, the settings of generation and the tokenizer.
    """
    config = deepcopy(store.config)
    del config.quantization_config
    config.architectures = [type(store.skeleton()).__name__]
    config.dtype = dtype
    if quantization is not None:
        config.quantization_config = quantization
    write_config(config, folder.partial)
    write_companions(store, folder)


def write_companions(store: PackedStore, folder: OutputFolder) -> None:
    """Writes the settings of generation and the tokenizer, where a model has them."""
    store.write_generation_config(folder.partial)
    with suppress(InputError):
        store.tokenizer().save_pretrained(folder.partial)
    copy_companions(store, folder.partial)


def linear_modules(store: PackedStore) -> list[str]:
    """Every module that loaders take for a linear layer, in the order of the model."""
    return [name for name, module in store.skeleton().named_modules() if isinstance(module, nn.Linear | Conv1D)]


def rounded_modules(store: PackedStore) -> list[str]:
    """Every module whose weight is rounded, in the order of the model."""
    rounded = store.description["tensors"]
    return [name for name in linear_modules(store) if f"{name}.weight" in rounded]


def described(model_type: str) -> Architecture | None:
    """The description of a model type, or None."""
    return next((one for one in architectures() if model_type in one.model_types), None)


def linears_of(architecture: Architecture) -> Iterable[Linear]:
    """Every linear layer that a description mentions, alternatives included."""
    for part in (*architecture.block, *architecture.outer):
        groups = part if isinstance(part, tuple) else ((part,),)
        yield from (entry for group in groups for entry in group if isinstance(entry, Linear))


class NegativeScales:
    """Counts the groups whose scale is negative, which symmetric grids make use of."""

    def __init__(self) -> None:
        self.found = 0

    def look(self, weight: QuantizedWeight) -> None:
        """Counts those of one weight."""
        self.found += int((weight.params.scale < 0).sum())

    def facts(self) -> dict[str, Any]:
        """What to say of them: nothing where there are none."""
        return {"negative_scales": self.found} if self.found else {}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as configurations name it."""
    return str(dtype).removeprefix("torch.")
