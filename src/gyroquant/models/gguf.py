"""Reading a GGUF file, or one in several parts, tensor by tensor, as the model that llama.cpp runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.gguf_config import architecture_of, read_config
from gyroquant.models.gguf_file import GgufFile, is_later_part
from gyroquant.models.gguf_tensors import TensorPlan
from gyroquant.models.gguf_tokenizer import read_tokenizer
from gyroquant.models.graph import Shape
from gyroquant.models.store import WeightStore, checked_skeleton, finite


class GgufStore(WeightStore):
    """A GGUF file, or all parts of one by the path of any; its tensors are dequantized to fp32 one at a time.

    Raises InputError, by name, for a tensor or a setting that the model would not be the same without.
    """

    def __init__(self, path: Path):
        self.path, self.label = path, str(path)
        self._file = GgufFile(path)
        described = architecture_of(self._file)
        self._file.check_types()
        try:
            self.config = read_config(self._file, described)
        except (TypeError, ValueError, ArithmeticError) as error:  # settings of another kind than they are used as
            raise InputError(f"{path} cannot be read as a GGUF model: {error}; fetch it again") from error
        self._skeleton: Any = checked_skeleton(self.config, self.label)
        self._plan = TensorPlan(self._file, described, self.config, self.shapes)

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

    def skeleton(self) -> Any:
        return self._skeleton

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: finite(self._plan.read(name), name, self.label) for name in names}

    def load(self) -> Any:
        """The whole model in fp32, to be run by transformers."""
        model = checked_skeleton(self.config, self.label)
        model.load_state_dict(self.read(self.shapes), strict=False, assign=True)
        model.tie_weights()
        return model.eval()

    def tokenizer(self) -> Any:
        return read_tokenizer(self._file, self.label)


def find_gguf(folder: Path) -> Path:
    """The GGUF model of a folder, which may be in parts. Raises InputError where there is none, or more than one."""
    files = [path for path in sorted(folder.glob("*.gguf")) if not is_later_part(path)]
    if not files:
        files = sorted(folder.glob("*.gguf"))[:1]  # later parts alone: the missing ones are named
    if len(files) != 1:
        raise InputError(f"{folder} has no config.json" + ("; name one of its GGUF files" if files else ""))
    return files[0]
