"""Where weights come from: a folder of safetensors, a GGUF file, or a model in memory, read a few tensors at a time.

Every store presents a model under the parameter names that transformers uses for it today, whatever the names in the
file (experts may be listed there and stacked here). Only safetensors and GGUF files are read, never pickles.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from gyroquant.errors import InputError
from gyroquant.models.graph import ModelGraph, Shape, build_graph
from gyroquant.models.online import Attachment
from gyroquant.models.runner import build_skeleton

# Names that old checkpoints store although no parameter of that name exists: they are computed, not learned.
_COMPUTED = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias")


class WeightStore(ABC):
    """A model's configuration and its parameters, read on demand in the dtype in which they are stored."""

    label: str
    config: Any
    online: tuple[Attachment, ...] = ()

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, Shape]:
        """Every stored parameter and its shape."""

    @property
    @abstractmethod
    def tied(self) -> Mapping[str, str]:
        """Parameters that are not stored, and the ones that they share their values with."""

    @abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters of these names, as new tensors that hold no file open."""

    @abstractmethod
    def skeleton(self) -> Any:
        """A model to run blocks of, with or without weights of its own."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of most of the stored weights."""

    def bits_per_weight(self) -> float:
        """Stored bits per weight; for a rounded model, per rounded weight with everything that goes with it."""
        return float(self.dtype.itemsize * 8)

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises InputError when it has none."""
        raise InputError(f"{self.label} has no tokenizer")

    def generation_config(self) -> Any:
        """The settings that the model generates text with, or None."""
        return getattr(self.skeleton(), "generation_config", None)

    @cached_property
    def graph(self) -> ModelGraph:
        return build_graph(self.config, self.shapes, self.tied)


class ModuleStore(WeightStore):
    """A transformers model in memory."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.config, self.label = model, model.config, type(model).__name__
        self._params = dict(model.named_parameters())
        everything = dict(model.named_parameters(remove_duplicate=False))
        stored = {id(parameter): name for name, parameter in self._params.items()}
        self._tied = {name: stored[id(p)] for name, p in everything.items() if name not in self._params}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return {name: tuple(parameter.shape) for name, parameter in self._params.items()}

    @property
    def tied(self) -> Mapping[str, str]:
        return self._tied

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._params[name].detach() for name in names}

    def skeleton(self) -> Any:
        return self.model


class LazyTensor:
    """A tensor in a safetensors file; reads it when indexed, and leaves neither file nor mapping open."""

    def __init__(self, path: Path, key: str, shape: Shape, dtype: str):
        self.path, self.key, self.shape, self.dtype = path, key, shape, dtype

    def __getitem__(self, _: Any) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.key).clone()

    def get_shape(self) -> Shape:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def safetensors_index(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of a folder's safetensors files. Raises InputError for missing, damaged or contradictory files."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index} is not a valid index of weights: {error}") from error
    elif (folder / "model.safetensors").exists():  # others beside it hold other things, learned rotations for one
        files = ["model.safetensors"]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no .safetensors weights; only safetensors and GGUF files are read")
    found: dict[str, LazyTensor] = {}
    for name in files:
        path = folder / name
        if Path(name).name != name:
            raise InputError(f"{index} names {name!r}, which lies outside the model's folder")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    part = file.get_slice(key)
                    found[key] = LazyTensor(path, key, tuple(part.get_shape()), part.get_dtype())
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
    return found


class CheckpointStore(WeightStore):
    """A folder as transformers saves it: config.json and safetensors."""

    def __init__(self, folder: Path, config: Any = None):
        self.folder, self.label = folder, str(folder)
        try:
            self.config = config or AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder} has no usable config.json: {error}") from error
        self._tensors = self._index()
        self._shapes, self._groups = self._match()

    def _index(self) -> Mapping[str, Any]:
        return safetensors_index(self.folder)

    @cached_property
    def _skeleton(self) -> Any:
        return build_skeleton(self.config)

    def skeleton(self) -> Any:
        return self._skeleton

    def _mapping(self) -> list[Any]:
        """How names in the file become names in the model."""
        return get_model_conversion_mapping(self._skeleton)

    def _match(self) -> tuple[dict[str, Shape], dict[str, Callable[[], dict[str, Tensor]]]]:
        """The model's parameters and, for each, a function that reads the group of tensors which it is made from."""
        model = self._skeleton
        wanted = {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in self.tied}
        mapping = self._mapping()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        transforms: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        unexpected: list[str] = []
        for key in sorted(self._tensors, key=_natural):
            target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
            if target not in wanted and key in wanted:
                target, pattern = key, None
            if target in wanted:
                transform = None if pattern is None else by_pattern[pattern]
                transforms.setdefault(target, (transform, []))[1].append((key, pattern or key))
            elif target not in self.tied and not key.endswith(_COMPUTED):
                unexpected.append(key)
        if unexpected:
            raise InputError(f"{self.label} stores {', '.join(unexpected[:4])}, which {type(model).__name__} has not")
        groups: dict[str, Callable[[], dict[str, Tensor]]] = {}
        for target, (transform, sources) in transforms.items():
            read = self._reader(target, transform, sources)
            targets = (
                [target]
                if transform is None
                else [target.replace(transform.target_patterns[0], other, 1) for other in transform.target_patterns]
            )
            groups |= dict.fromkeys(targets, read)
        missing = sorted(set(wanted) - set(groups))
        if missing:
            raise InputError(
                f"{self.label} lacks {', '.join(missing[:4])} of {type(model).__name__}; is a shard missing?"
            )
        return wanted, groups

    def _reader(self, target: str, transform: Any, sources: list[tuple[str, str]]) -> Callable[[], dict[str, Tensor]]:
        def read() -> dict[str, Tensor]:
            if transform is None:
                return {target: self._tensors[sources[0][0]][...]}
            job = deepcopy(transform)
            for key, pattern in sources:
                job.add_tensor(target, key, pattern, lambda key=key: self._tensors[key][...])
            made = job.convert(target, model=self._skeleton, config=self.config)
            return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

        return read

    @cached_property
    def tied(self) -> Mapping[str, str]:
        return dict(self._skeleton.all_tied_weights_keys)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    @property
    def dtype(self) -> torch.dtype:
        sizes: dict[str, int] = {}
        for tensor in self._tensors.values():
            sizes[tensor.get_dtype()] = sizes.get(tensor.get_dtype(), 0) + int(torch.Size(tensor.get_shape()).numel())
        return _DTYPES.get(max(sizes, key=sizes.__getitem__), torch.float32)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name in names:
            if name not in out:
                made = self._groups[name]()
                out |= made
        return {name: self._checked(name, out[name]) for name in names}

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) != self._shapes[name]:
            raise InputError(
                f"{self.label}: {name} has shape {tuple(tensor.shape)}, but config.json makes it {self._shapes[name]}"
            )
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{self.label}: {name} holds values that are not finite (NaN or infinite)")
        return tensor

    def generation_config(self) -> Any:
        try:
            return GenerationConfig.from_pretrained(self.folder)
        except (OSError, ValueError):  # a folder need not have one
            return super().generation_config()

    def tokenizer(self) -> Any:
        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for a missing tokenizer
            raise InputError(f"{self.label} has no usable tokenizer: {error}") from error


def _natural(name: str) -> list[tuple[int, Any]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
