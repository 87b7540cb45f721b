"""Shared code of the formats that are Hugging Face checkpoints: they write tensors group by group under their original
names, then the configuration and the tokenizer. Also lists the linear layers as loaders see them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from gyroquant.errors import InputError, UnsupportedModelError
from gyroquant.formats.base import Format, requirements_of
from gyroquant.formats.config import write_config
from gyroquant.formats.native.writer import copy_companions
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import QuantizedWeight, stored_bits
from gyroquant.models.deriving.tiny import tiny_model, tiny_tokens
from gyroquant.models.execution.messages import quiet
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.stores.packed import PackedStore

TRANSFORMERS_USAGE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```"""
"""How transformers opens a checkpoint, for the model card."""
_WORD = 32  # bits of a word of packed codes, and codes that are packed at once
Encode = Callable[[LinearOp, QuantizedWeight], dict[str, Tensor]]


def write_tensors(store: PackedStore, folder: OutputFolder, encode: Encode) -> None:
    """Writes every parameter of a model, block by block. `encode` returns the tensors of a rounded parameter; others
    are written as they are stored. Stacked experts are written separately, and all names are those of the original
    checkpoint.
    """
    rounded = store.description["tensors"]
    for names in store.graph.params:
        tensors = store.read([name for name in names if name not in rounded])
        for name in names:
            if name in rounded:
                tensors |= encode(store.graph.op(name), store.quantized(name))
        folder.add(original_names(store, tensors))
    for name in store.graph.carried:
        folder.add(original_names(store, store.read([name])))


class DecodedTables:
    """The rounded embeddings and heads that a checkpoint holds as plain numbers, in the dtype of the model.

    It counts their bytes and their deviation while they are written.
    """

    def __init__(self, format_: Format, store: PackedStore):
        self._reasons, self._dtype = format_.decoded(requirements_of(store)), store.dtype
        self._facts: dict[str, str] = {}
        self._deviation = 0.0

    def __contains__(self, op: LinearOp) -> bool:
        return op.weight in self._reasons

    def tensors(self, op: LinearOp, weight: QuantizedWeight) -> dict[str, Tensor]:
        """The tensor of one of them. Raises InputError if the dtype cannot hold it."""
        exact = op.to_param(weight.dequantize())
        written = exact.to(self._dtype)
        if not bool(written.isfinite().all()):
            raise InputError(f"{op.weight} is too large for {self._dtype}; save the model in bfloat16 or float32")
        self._deviation = max(self._deviation, deviation(written, exact))
        sizes = written.numel() * written.itemsize, stored_bits(weight.pack()) // 8
        self._facts[op.weight] = (
            f"as {dtype_name(self._dtype)}, {sizes[0]} bytes in place of {sizes[1]}: {self._reasons[op.weight]}"
        )
        return {op.weight: written}

    def facts(self) -> dict[str, Any]:
        """What was decoded, with bytes and reasons, and the largest deviation. Empty if nothing was decoded."""
        return {"decoded": self._facts, "deviation": self._deviation} if self._facts else {}


def deviation(written: Tensor, exact: Tensor) -> float:
    """The largest error of a written weight relative to the largest weight."""
    return float((written.float() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def original_names(store: PackedStore, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names, and in the layout, of the original checkpoint."""
    return dict(revert_weight_conversion(store.skeleton(), tensors))


def write_rest(
    store: PackedStore,
    folder: OutputFolder,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes the configuration and, if the model has them, the generation settings and the tokenizer.

    dtype: the dtype that loaders use by default.
    quantization: the `quantization_config`. None: the configuration has none.
    more: other entries of config.json.
    """
    config = deepcopy(store.config)
    del config.quantization_config
    config.architectures = [type(store.skeleton()).__name__]
    config.dtype = dtype
    if quantization is not None:
        config.quantization_config = quantization
    write_config(config, folder.partial, **(more or {}))
    write_companions(store, folder)


def write_companions(store: PackedStore, folder: OutputFolder) -> None:
    """Writes the generation settings, the tokenizer and the processor's settings, if the model has them."""
    store.write_generation_config(folder.partial)
    with suppress(InputError):
        store.tokenizer().save_pretrained(folder.partial)
    copy_companions(store, folder.partial)


def linear_modules(store: PackedStore) -> list[str]:
    """Every module that loaders treat as a linear layer, in the order of the model."""
    return [name for name, module in store.skeleton().named_modules() if isinstance(module, nn.Linear | Conv1D)]


def weights_are_read(config: Any) -> bool:
    """Whether the code of an architecture reads the weights of linear layers itself, when it runs or when it is loaded.

    A tiny model without these weights shows it.
    """
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            model = tiny_model(config)
    except UnsupportedModelError:
        return False
    plain = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if any(type(module).forward is not nn.Linear.forward for module in plain):
        return True
    for module in plain:
        run = partial(nn.functional.linear, weight=module.weight, bias=module.bias)
        module.forward = run  # type: ignore[method-assign]
    for module in model.modules():
        module._is_hf_initialized = False
    for module in plain:
        del module.weight
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(input_ids=tiny_tokens(model), use_cache=False)
            model.initialize_weights()
    except AttributeError:
        return True
    return False


def assembled_weights(config: Any) -> list[str]:
    """The parameters of an architecture that transformers assembles from several stored ones, in a tiny model."""
    try:
        with torch.random.fork_rng(devices=[]), quiet():
            model = tiny_model(config)
    except UnsupportedModelError:
        return []
    patterns = [
        pattern
        for entry in get_model_conversion_mapping(model)
        if isinstance(entry, WeightConverter) and len(entry.source_patterns) > 1
        for pattern in entry.target_patterns
    ]
    return [name for name in model.state_dict() if any(re.search(pattern, name) for pattern in patterns)]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Packs codes below 2^bits, shape (rows, n), n a multiple of 32. Each row becomes a column of 32-bit words, shape
    (n * bits / 32, rows).
    """
    rows, length = codes.shape
    runs = codes.T.reshape(length // _WORD, _WORD, rows)  # 32 numbers of b bits fill b words
    words = torch.zeros(length // _WORD, bits, rows, dtype=torch.int64)
    for i in range(_WORD):
        number = runs[:, i].long()
        word, start = divmod(i * bits, _WORD)
        words[:, word] |= (number << start) & 0xFFFFFFFF
        if start + bits > _WORD:
            words[:, word + 1] |= number >> (_WORD - start)
    return (words - ((words >> 31) << 32)).to(torch.int32).reshape(-1, rows)  # signed words with the same bits


def rounded_modules(store: PackedStore) -> list[str]:
    """Every module whose weight is rounded, in the order of the model."""
    rounded = store.description["tensors"]
    return [name for name in linear_modules(store) if f"{name}.weight" in rounded]


class NegativeScales:
    """Counts the groups with a negative scale, which symmetric grids use."""

    def __init__(self) -> None:
        self.found = 0

    def look(self, weight: QuantizedWeight) -> None:
        """Adds the count of one weight."""
        self.found += int((weight.params.scale < 0).sum())

    def facts(self) -> dict[str, Any]:
        """The count, as an entry of the manifest. Empty if there are none."""
        return {"negative_scales": self.found} if self.found else {}


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as configurations name it."""
    return str(dtype).removeprefix("torch.")
