"""Writes rounded blocks to files: as packed codes for gyroquant, or as plain dense weights that every loader opens."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from gyroquant.errors import InputError
from gyroquant.formats.config import write_config
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.grids import code_bits, stored_bits
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.graph.model_graph import TOKENS, LinearOp
from gyroquant.models.graph.rounded_layer import RoundedLayer
from gyroquant.models.stores.base import WeightStore, untie
from gyroquant.models.stores.packed_description import IMPORT_FIRST, PackedDescription
from gyroquant.models.stores.weight_bytes import LOGITS, part_of, whole_model_bits, with_total

_AT_ONCE = 32  # carried parameters in one piece
_COMPANIONS = (  # the settings of the processor of a model that also takes images or sound
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "feature_extractor_config.json"),
)
_SAVED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def saved_dtype(name: str, source: torch.dtype) -> torch.dtype:
    """The dtype in which parameters that are not rounded are stored. `auto`: `source` if it has 16 bits, else float16.

    Raises InputError for an unknown name.
    """
    if name == "auto":
        return source if source in (torch.float16, torch.bfloat16) else torch.float16
    if name not in _SAVED:
        raise InputError(f"dtype {name!r} is not supported for saving; use auto, {', '.join(_SAVED)}")
    return _SAVED[name]


def copy_companions(store: WeightStore, folder: Path) -> None:
    """Copies the settings of the processor, which are next to config.json, if the model has them."""
    source = Path(store.label)
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@dataclass
class Piece:
    """A group of parameters as it is stored.

    arrays: the stored tensors by name.
    entries: the descriptions of rounded parameters, by name.
    stored_bits: the stored bits of rounded parameters, by part (codes, scales, ...).
    code_bits: the bits that the codes of rounded parameters need, by their entropy. 0 if no codes are stored.
    rounded_weights: the number of rounded weights.
    other_bits: the stored bits of parameters that are not rounded.
    bytes: the stored bytes of all parameters, by part of the model.

    `notes` is everything except the arrays, as plain data.
    """

    arrays: dict[str, Tensor]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored_bits: dict[str, int] = field(default_factory=dict)
    code_bits: float = 0.0
    rounded_weights: int = 0
    other_bits: int = 0
    table_weights: int = 0
    table_bits: int = 0
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def notes(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "arrays"}

    def count(self, op: LinearOp, arrays: Mapping[str, Tensor]) -> None:
        """Adds the stored bits of a rounded parameter, by the last part of its arrays' names.

        Tables of embeddings, and heads, are counted separately from layers.
        """
        if op.entry.reads == TOKENS or op.entry.writes == LOGITS:
            self.table_weights += op.numel
            self.table_bits += sum(stored_bits({name: array}) for name, array in arrays.items())
            return
        self.rounded_weights += op.numel
        for name, array in arrays.items():
            part = name.rpartition("_")[2]
            self.stored_bits[part] = self.stored_bits.get(part, 0) + stored_bits({name: array})

    def add_bytes(self, part: str, arrays: Mapping[str, Tensor]) -> None:
        """Adds the bytes of stored arrays to a part of the model."""
        self.bytes[part] = self.bytes.get(part, 0) + stored_bits(dict(arrays)) // 8


class Writer(ABC):
    """Writes a model group by group and counts what it writes."""

    def __init__(self, folder: OutputFolder | None, store: WeightStore, dtype: torch.dtype):
        self._folder, self.store, self.dtype = folder, store, dtype
        self._rounded_weights = 0
        self._parts: dict[str, int] = {}
        self._code_bits = 0.0
        self._plain_bits = 0
        self._table_weights, self._table_bits = 0, 0
        self._bytes: dict[str, int] = {}

    @property
    def folder(self) -> OutputFolder:
        """The output folder. A writer without a folder can only make pieces."""
        assert self._folder is not None
        return self._folder

    @abstractmethod
    def piece(self, plain: dict[str, Tensor], rounded: Sequence[RoundedLayer] = ()) -> Piece:
        """The piece of one group: `plain` parameters as they are, and `rounded` layers."""

    def add_piece(self, file: Path, notes: Mapping[str, Any]) -> None:
        """Adds a piece that was already written to `file`, with its notes, to the folder."""
        self.folder.add_piece(file)
        self._rounded_weights += notes["rounded_weights"]
        self._plain_bits += notes["other_bits"]
        self._table_weights += notes.get("table_weights", 0)
        self._table_bits += notes.get("table_bits", 0)
        self._code_bits += notes.get(
            "code_bits", notes["stored_bits"].get("codes", 0)
        )  # journals of older runs lack it
        for part, bits in notes["stored_bits"].items():
            self._parts[part] = self._parts.get(part, 0) + bits
        self._add_bytes(notes["bytes"])

    def _add_bytes(self, parts: Mapping[str, int]) -> None:
        for part, count in parts.items():
            self._bytes[part] = self._bytes.get(part, 0) + count

    def _begin(self, plain: Mapping[str, Tensor]) -> Piece:
        """A piece that has counted parameters that are not rounded, and holds nothing yet."""
        piece = Piece({}, other_bits=stored_bits(dict(plain)))
        for name, tensor in plain.items():
            piece.add_bytes(part_of(self.store.graph, name), {name: tensor})
        return piece

    def _count(self, piece: Piece, op: LinearOp, arrays: Mapping[str, Tensor]) -> None:
        """Counts the stored arrays of a rounded parameter."""
        piece.count(op, arrays)
        piece.add_bytes(part_of(self.store.graph, op.weight), arrays)

    @abstractmethod
    def online(self, attachments: Iterable[OnlineOp]) -> None:
        """Writes the online operations."""

    def _config(self, untied: list[str]) -> Any:
        config = deepcopy(self.store.config)
        config.architectures = [type(self.store.skeleton()).__name__]
        config.dtype = self.dtype
        if untied:
            untie(config)
        return config

    def carry(self) -> None:
        """Writes the parameters of a larger model outside its decoder, unchanged and in the dtype of the source."""
        names = self.store.graph.carried
        for start in range(0, len(names), _AT_ONCE):
            piece = self.piece(self.store.read(names[start : start + _AT_ONCE]))
            self._plain_bits += piece.other_bits
            self._add_bytes(piece.bytes)
            self.folder.add(piece.arrays)

    def _extra_config(self) -> dict[str, Any]:
        """Entries of config.json in addition to the configuration."""
        return {}

    def finish(self, tokenizer: Any, untied: list[str]) -> None:
        """Writes configuration and tokenizer."""
        write_config(self._config(untied), self.folder.partial, **self._extra_config())
        self.store.write_generation_config(self.folder.partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.folder.partial)
        copy_companions(self.store, self.folder.partial)

    def bits(self) -> dict[str, Any]:
        """The stored bits.

        - per_weight: bits per weight of the rounded layers, with online maps and padding.
        - effective: the same with the entropy of the codes in place of their stored bits. Missing without codes.
        - embeddings: bits per weight of the rounded tables of embeddings and heads.
        - whole_model: bits per weight of everything that is stored, over the weights of the original.
        - bytes: the bytes of everything that is stored, by part of the model, and their total.
        """
        rounded = sum(self._parts.values())
        tables = {"weights": self._table_weights, "per_weight": self._table_bits / max(1, self._table_weights)}
        bytes_ = with_total(self._bytes)
        return {
            "per_weight": rounded / self._rounded_weights if self._rounded_weights else tables["per_weight"],
            **self._effective(rounded),
            "rounded_weights": self._rounded_weights,
            "stored_bits": dict(self._parts),
            "other_bits": self._plain_bits,
            **({"embeddings": tables} if self._table_weights else {}),
            "whole_model": whole_model_bits(bytes_, self.store.weights),
            "bytes": bytes_,
        }

    def _effective(self, rounded: int) -> dict[str, float]:
        if "codes" not in self._parts:
            return {}
        return {"effective": (rounded - self._parts["codes"] + self._code_bits) / self._rounded_weights}


class PackedWriter(Writer):
    """Codes and scales as `gyroquant.models.stores.packed_description` describes them."""

    def __init__(self, folder: OutputFolder | None, store: WeightStore, dtype: torch.dtype):
        super().__init__(folder, store, dtype)
        self.description = PackedDescription()

    def piece(self, plain: dict[str, Tensor], rounded: Sequence[RoundedLayer] = ()) -> Piece:
        piece = self._begin(plain)
        piece.arrays = dict(plain)
        for layer in rounded:
            op, weight, packed = layer.op, layer.weight, layer.weight.pack()
            arrays = {f"{op.weight}_{part}": array for part, array in packed.items()}
            piece.entries[op.weight] = self.description.entry(op, weight)
            self._count(piece, op, arrays)
            if part_of(self.store.graph, op.weight) == "layers":
                piece.code_bits += code_bits(weight, packed)
            piece.arrays |= arrays
        return piece

    def add_piece(self, file: Path, notes: Mapping[str, Any]) -> None:
        super().add_piece(file, notes)
        for name, entry in notes["entries"].items():
            self.description.add_tensor(name, entry)

    def online(self, attachments: Iterable[OnlineOp]) -> None:
        arrays: dict[str, Tensor] = {}
        for op in attachments:
            arrays |= self.description.add_online(op)
        if arrays:
            self._parts["maps"] = stored_bits(arrays)
            self._add_bytes({"layers": stored_bits(arrays) // 8})
            self.folder.add(arrays)

    def _config(self, untied: list[str]) -> Any:
        config = super()._config(untied)
        config.quantization_config = self.description.to_dict()
        return config

    def _extra_config(self) -> dict[str, Any]:
        return {"transformers_weights": IMPORT_FIRST}  # transformers never saves this key


class DenseWriter(Writer):
    """Rounded weights decoded to plain numbers, low-rank branches included, under the original checkpoint's names."""

    def piece(self, plain: dict[str, Tensor], rounded: Sequence[RoundedLayer] = ()) -> Piece:
        piece, tensors = self._begin(plain), dict(plain)
        for layer in rounded:
            op, dense = layer.op, layer.merged.to(self.dtype)
            if not bool(dense.isfinite().all()):
                raise InputError(f"{op.weight} is too large for {self.dtype}; choose --save-dtype bfloat16 or float32")
            self._count(piece, op, {f"{op.weight}_dense": dense})
            tensors[op.weight] = dense
        piece.arrays = revert_weight_conversion(self.store.skeleton(), tensors)
        return piece

    def online(self, attachments: Iterable[OnlineOp]) -> None:
        assert not list(attachments), "checked before any work"
