"""Reading a GGUF file tensor by tensor, with the names and layouts that transformers gives them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from torch import Tensor
from transformers import AutoConfig
from transformers.integrations.gguf.reader import GgufHeader, TensorInfo
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

from gyroquant.errors import InputError
from gyroquant.models.gguf_check import check_gguf
from gyroquant.models.graph import Shape
from gyroquant.models.store import WeightStore, checked_skeleton, finite, load_tokenizer


class _Names:
    """As much of a model as the mapping of names needs; a whole one would be mapped again for each module."""

    def __init__(self, model: Any):
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> list[Any]:
        return []


class GgufStore(WeightStore):
    """A GGUF file; its tensors are dequantized to fp32 one at a time."""

    def __init__(self, path: Path):
        self.path, self.label = path, str(path)
        check_gguf(path)
        try:
            self._header = GgufHeader.from_file(str(path))
            self.config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        except Exception as error:  # the readers raise whatever they do not know in many ways
            raise InputError(f"{path} cannot be read as a GGUF model: {error}") from error
        self._skeleton: Any = checked_skeleton(self.config, self.label)
        processor = TENSOR_PROCESSORS.get(self._header.architecture, TensorProcessor)
        self._processor = processor(config=self.config.to_dict())
        self._names = get_gguf_hf_weights_map(_Names(self._skeleton), self._processor)
        self._sources: dict[str, list[TensorInfo]] = defaultdict(list)
        for info in self._header.tensors:
            stacked = info.name.endswith("_exps.weight")  # mapped without a suffix, as bare parameters have none
            target = self._names.get(info.name.removesuffix(".weight") if stacked else info.name)
            if target:
                self._sources[target].append(info)
        missing = sorted(set(self.shapes) - set(self._sources))
        if missing:
            raise InputError(f"{path} lacks {', '.join(missing[:4])} of {type(self._skeleton).__name__}")
        for name, shape in self.shapes.items():
            found = sum(prod(info.shape) for info in self._sources[name])
            if found != prod(shape):
                raise InputError(f"{path}: {name} has {found} weights, but its metadata make it {shape}")

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
        return 8 * sum(t.nbytes for t in self._header.tensors) / sum(prod(t.shape) for t in self._header.tensors)

    def skeleton(self) -> Any:
        return self._skeleton

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._one(name) for name in names}

    def _one(self, name: str) -> Tensor:
        made: dict[str, dict[str, Any]] = {"tensors": {}}
        for info in self._sources[name]:
            result = self._processor.process(
                weights=self._values(info), name=info.name, tensor_key_mapping=self._names, parsed_parameters=made
            )
            if result.name is not None:
                made["tensors"][name] = torch.from_numpy(np.ascontiguousarray(result.weights))
        tensor: Tensor = made["tensors"][name].float()
        if tuple(tensor.shape) != self.shapes[name]:
            raise InputError(f"{self.label}: {name} has shape {tuple(tensor.shape)}, expected {self.shapes[name]}")
        return finite(tensor, name, self.label)

    def _values(self, info: TensorInfo) -> np.ndarray:
        """One tensor of the file as fp32 values."""
        start = self._header.data_start + info.offset
        raw = np.fromfile(self.path, dtype=np.uint8, count=info.nbytes, offset=start)
        kind = GGMLQuantizationType(info.ggml_type)
        rows = raw.reshape(*info.shape[:-1], -1)
        if kind == GGMLQuantizationType.F32:
            return rows.view(np.float32)
        return dequantize(rows.view(np.float16) if kind == GGMLQuantizationType.F16 else rows, kind)

    def tokenizer(self) -> Any:
        return load_tokenizer(self.path.parent, self.label, gguf_file=self.path.name)
