"""The store of a GGUF model, in one file or in several parts, read tensor by tensor as llama.cpp runs it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.graph.model_graph import Shape
from gyroquant.models.stores.base import WeightStore, checked_skeleton, finite
from gyroquant.models.stores.gguf.config import architecture_of, read_config
from gyroquant.models.stores.gguf.file import GgufFile, is_later_part
from gyroquant.models.stores.gguf.tensors import TensorPlan
from gyroquant.models.stores.gguf.tokenizer import read_tokenizer


class GgufStore(WeightStore):
    """A GGUF model, from the path of its file or of any of its parts. Tensors are dequantized to fp32 one at a time.

    Raises InputError for a tensor or a setting that cannot be read and may change the model, and names it.
    """

    def __init__(self, path: Path):
        self.path, self.label = path, str(path)
        self._file = GgufFile(path)
        architecture = architecture_of(self._file)
        self._file.check_types()
        try:
            self.config = read_config(self._file, architecture)
        except (TypeError, ValueError, ArithmeticError) as error:  # settings of a wrong type
            raise InputError(f"{path} cannot be read as a GGUF model: {error}; fetch it again") from error
        self._skeleton: Any = checked_skeleton(self.config, self.label)
        self._plan = TensorPlan(self._file, architecture, self.config, self.shapes)

    @cached_property
    def tied(self) -> Mapping[str, str]:
        return dict(self._skeleton.all_tied_weights_keys)

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: tuple(t.shape) for name, t in self._skeleton.state_dict().items() if name not in self.tied}

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def bits_per_weight(self) -> float:
        tensors = self._file.tensors.values()
        return 8 * sum(entry.bytes for entry in tensors) / sum(entry.numbers for entry in tensors)

    def stored_sizes(self) -> dict[str, int]:
        used = self._plan.tensors()
        others = {name: entry.bytes for name, entry in self._file.tensors.items() if name not in used}
        sizes: dict[str, int] = {}
        for tensor, name in used.items():
            sizes[name] = sizes.get(name, 0) + self._file.tensors[tensor].bytes
        return sizes | others

    def skeleton(self) -> Any:
        return self._skeleton

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: finite(self._plan.read(name), name, self.label) for name in names}

    def load(self) -> Any:
        """The whole model in fp32, as a model of transformers in evaluation mode."""
        model = checked_skeleton(self.config, self.label)
        model.load_state_dict(self.read(self.shapes), strict=False, assign=True)
        model.tie_weights()
        return model.eval()

    def tokenizer(self) -> Any:
        return read_tokenizer(self._file, self.label)


def find_gguf(folder: Path) -> Path:
    """The path of the GGUF model in a folder; of its first part if it has several. Raises InputError unless there is
    exactly one model.
    """
    files = [path for path in sorted(folder.glob("*.gguf")) if not is_later_part(path)]
    if not files:
        files = sorted(folder.glob("*.gguf"))[:1]  # only later parts: the reader names the missing ones
    if len(files) != 1:
        remedy = "give the path of one of its GGUF files" if files else "give a folder of a model, or a GGUF file"
        raise InputError(f"{folder} has no config.json; {remedy}")
    return files[0]
