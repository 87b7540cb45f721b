"""Turning rounded blocks into files: packed codes for ourselves, or plain dense weights that any loader opens."""

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
from gyroquant.export.config import write_config
from gyroquant.export.folder import OutputFolder
from gyroquant.grids import QuantizedWeight, stored_bits
from gyroquant.models.graph import LinearOp
from gyroquant.models.online import Attachment
from gyroquant.models.packed import IMPORT_FIRST, Description, from_matrix
from gyroquant.models.store import WeightStore, untie

Rounded = Sequence[tuple[LinearOp, QuantizedWeight]]
_AT_ONCE = 32  # parameters that are carried in one piece
_COMPANIONS = (  # what the processor of a model that also takes images or sound is made from
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("image_processor_config.json", "feature_extractor_config.json"),
)
_SAVED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def saved_dtype(name: str, source: torch.dtype) -> torch.dtype:
    """The dtype of stored parameters that are not rounded; `auto` keeps 16-bit ones and makes others float16."""
    if name == "auto":
        return source if source in (torch.float16, torch.bfloat16) else torch.float16
    if name not in _SAVED:
        raise InputError(f"the dtype to save in is auto, {', '.join(_SAVED)}, not {name!r}")
    return _SAVED[name]


def copy_companions(store: WeightStore, folder: Path) -> None:
    """Copies the settings of a processor, which stand beside the configuration where a model has them."""
    source = Path(store.label)
    for name in _COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


@dataclass
class Piece:
    """A group of parameters as it is stored: arrays, and `notes`, plain data, on what they are and how many bits."""

    arrays: dict[str, Tensor]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    stored_bits: dict[str, int] = field(default_factory=dict)
    rounded_weights: int = 0
    other_bits: int = 0

    @property
    def notes(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "arrays"}

    def count(self, op: LinearOp, arrays: Mapping[str, Tensor]) -> None:
        """Counts what is stored for a rounded parameter, by the parts of its arrays' names."""
        self.rounded_weights += int(torch.Size(op.shape).numel())
        for name, array in arrays.items():
            part = name.rpartition("_")[2]
            self.stored_bits[part] = self.stored_bits.get(part, 0) + stored_bits({name: array})


class Writer(ABC):
    """Writes a model group by group and counts what it writes."""

    def __init__(self, folder: OutputFolder | None, store: WeightStore, dtype: torch.dtype):
        self._folder, self.store, self.dtype = folder, store, dtype
        self._rounded_weights = 0
        self._parts: dict[str, int] = {}
        self._plain_bits = 0

    @property
    def folder(self) -> OutputFolder:
        """Where it is written; a writer without a folder only makes pieces."""
        assert self._folder is not None
        return self._folder

    @abstractmethod
    def piece(self, plain: dict[str, Tensor], rounded: Rounded = ()) -> Piece:
        """The parameters of one group as they are stored: those stored as they are, and rounded ones."""

    def take(self, file: Path, notes: Mapping[str, Any]) -> None:
        """Takes a piece that was written, by its notes, among those of the folder."""
        self.folder.take(file)
        self._rounded_weights += notes["rounded_weights"]
        self._plain_bits += notes["other_bits"]
        for part, bits in notes["stored_bits"].items():
            self._parts[part] = self._parts.get(part, 0) + bits

    @abstractmethod
    def online(self, attachments: Iterable[Attachment]) -> None:
        """Writes what runs with the model."""

    def _config(self, untied: list[str]) -> Any:
        config = deepcopy(self.store.config)
        config.architectures = [type(self.store.skeleton()).__name__]
        config.dtype = self.dtype
        if untied:
            untie(config)
        return config

    def carry(self) -> None:
        """Writes what the decoder of a larger model runs without, unchanged and in the dtype in which it is stored."""
        names = self.store.graph.carried
        for start in range(0, len(names), _AT_ONCE):
            piece = self.piece(self.store.read(names[start : start + _AT_ONCE]))
            self._plain_bits += piece.other_bits
            self.folder.add(piece.arrays)

    def _beside(self) -> dict[str, Any]:
        """What config.json says besides the configuration."""
        return {}

    def finish(self, tokenizer: Any, untied: list[str]) -> None:
        """Writes configuration and tokenizer."""
        write_config(self._config(untied), self.folder.partial, **self._beside())
        self.store.write_generation_config(self.folder.partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(self.folder.partial)
        copy_companions(self.store, self.folder.partial)

    def bits(self) -> dict[str, Any]:
        """What was really stored. `per_weight` is bits per rounded weight, online maps and padding included."""
        rounded = sum(self._parts.values())
        original = sum(torch.Size(shape).numel() for shape in self.store.shapes.values())
        return {
            "per_weight": rounded / self._rounded_weights,
            "rounded_weights": self._rounded_weights,
            "stored_bits": dict(self._parts),
            "other_bits": self._plain_bits,
            "whole_model_per_weight": (rounded + self._plain_bits) / original,
        }


class PackedWriter(Writer):
    """Codes and scales as `gyroquant.models.packed` describes them."""

    def __init__(self, folder: OutputFolder | None, store: WeightStore, dtype: torch.dtype):
        super().__init__(folder, store, dtype)
        self.description = Description()

    def piece(self, plain: dict[str, Tensor], rounded: Rounded = ()) -> Piece:
        piece = Piece(dict(plain), other_bits=stored_bits(plain))
        for op, weight in rounded:
            arrays = {f"{op.weight}_{part}": array for part, array in weight.pack().items()}
            piece.entries[op.weight] = self.description.entry(op, weight)
            piece.count(op, arrays)
            piece.arrays |= arrays
        return piece

    def take(self, file: Path, notes: Mapping[str, Any]) -> None:
        super().take(file, notes)
        for name, entry in notes["entries"].items():
            self.description.add_tensor(name, entry)

    def online(self, attachments: Iterable[Attachment]) -> None:
        arrays: dict[str, Tensor] = {}
        for one in attachments:
            arrays |= self.description.add_online(one)
        if arrays:
            self._parts["maps"] = stored_bits(arrays)
            self.folder.add(arrays)

    def _config(self, untied: list[str]) -> Any:
        config = super()._config(untied)
        config.quantization_config = self.description.to_dict()
        return config

    def _beside(self) -> dict[str, Any]:
        return {"transformers_weights": IMPORT_FIRST}  # transformers itself never saves this


class DenseWriter(Writer):
    """Rounded weights written out as plain numbers under the names of the original checkpoint."""

    def piece(self, plain: dict[str, Tensor], rounded: Rounded = ()) -> Piece:
        piece, tensors = Piece({}, other_bits=stored_bits(plain)), dict(plain)
        for op, weight in rounded:
            dense = from_matrix(weight.dequantize(), op.shape, op.entry.transposed).to(self.dtype)
            if not bool(dense.isfinite().all()):
                raise InputError(
                    f"{op.weight} is too large for {self.dtype}; choose another with --save-dtype bfloat16 or float32"
                )
            piece.count(op, {f"{op.weight}_dense": dense})
            tensors[op.weight] = dense
        piece.arrays = revert_weight_conversion(self.store.skeleton(), tensors)
        return piece

    def online(self, attachments: Iterable[Attachment]) -> None:
        assert not list(attachments), "checked before any work"
