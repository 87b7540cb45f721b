"""Stores of weights: a folder of safetensors, a GGUF file, or a model in memory, read a few tensors at a time.

Every store uses the parameter names of the current transformers, whatever the names in the file. For example, a file
may list experts one by one where the model stacks them. Stores read only safetensors and GGUF files, never pickles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from gyroquant.errors import InputError
from gyroquant.models.deriving.derive import Derivation, derived
from gyroquant.models.execution.online import OnlineOp
from gyroquant.models.execution.runner import build_skeleton
from gyroquant.models.graph.model_graph import ModelGraph, Shape, build_graph
from gyroquant.models.graph.spec import described
from gyroquant.models.stores.config_loading import load_config, read_json
from gyroquant.models.stores.names import left_out, trainer_names, trainer_patterns
from gyroquant.models.stores.safetensors_files import DTYPES, LazyTensor, safetensors_index
from gyroquant.models.stores.tokenizers import load_tokenizer as load_tokenizer

# Old checkpoints store these tensors, but the model has no such parameters: it computes them.
_COMPUTED = (
    *("rotary_emb.inv_freq", "position_ids", "attn.bias", "attn.masked_bias"),
    *("attention.bias", "attention.masked_bias"),
)


_GENERATION = "generation_config.json"
# Numeric settings in this file. transformers does not check their types before it generates.
_NUMBERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams", "max_length", "max_new_tokens")


class WeightStore(ABC):
    """A model's configuration and its parameters, read on demand in the dtype in which they are stored."""

    label: str
    config: Any
    online: tuple[OnlineOp, ...] = ()
    notes: tuple[str, ...] = ()
    """Notes for the user on how the model was read: what was left out, what contradicts the configuration."""
    source_quantization: Mapping[str, Any] | None = None
    """How another program quantized the weights, or None; see `gyroquant.models.stores.prequantized`."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every stored parameter, by name."""

    @property
    @abstractmethod
    def tied(self) -> Mapping[str, str]:
        """Parameters that are not stored, each with the name of the stored parameter that holds its values."""

    @abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters of these names. No tensor keeps a file open."""

    @abstractmethod
    def skeleton(self) -> Any:
        """The model whose blocks are run. It may have no weights."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of most of the stored weights."""

    @property
    def read_dtype(self) -> torch.dtype:
        """The dtype of most weights after reading."""
        return self.dtype

    def bits_per_weight(self) -> float:
        """Stored bits per weight. For a rounded model: all stored bits of its rounded weights over their number."""
        return float(self.dtype.itemsize * 8)

    def effective_bits_per_weight(self) -> float | None:
        """As `bits_per_weight`, with the entropy of the codes in place of their stored bits. Reads the codes.

        None for a model whose codes gyroquant did not write.
        """
        return None

    @property
    def weights(self) -> int:
        """The number of weights. A head that gyroquant untied is the embedding a second time, and does not count."""
        return sum(prod(shape) for shape in self.shapes.values())

    def stored_sizes(self) -> dict[str, int]:
        """The stored bytes of every parameter, by name. Tensors that belong to no parameter have their own names."""
        return {name: prod(shape) * self.dtype.itemsize for name, shape in self.shapes.items()}

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises InputError if it does not have one."""
        raise InputError(f"{self.label} has no tokenizer")

    def generation_config(self) -> Any:
        """The model's settings for generation, or None."""
        return getattr(self.skeleton(), "generation_config", None)

    @property
    def text_config(self) -> Any:
        """The configuration of the decoder. In a model that also takes images, it is a part of `config`."""
        return self.config.get_text_config(decoder=True)

    def write_generation_config(self, folder: Path) -> None:
        """Writes the settings for generation into a folder, if there are any.

        They are written unchanged: transformers refuses to write some that contradict each other. They change how text
        is sampled, not the model.
        """
        settings = self.generation_config()
        if settings is not None:
            settings.to_json_file(folder / _GENERATION)

    @cached_property
    def graph(self) -> ModelGraph:
        model = self.skeleton()
        buffers = [name for name in persistent_buffers(model) if name in self.shapes]
        derivation = self.derivation
        architecture = None if derivation is None else derivation.architecture
        decoder = decoder_name(model)
        return build_graph(self.config, self.shapes, self.tied, architecture, decoder=decoder, buffers=buffers)

    @cached_property
    def derivation(self) -> Derivation | None:
        """The derived description of the decoder. None if a hand-written one describes it."""
        if described(self.text_config.model_type) is not None:
            return None
        return derived(self.text_config, self._builder())

    def _builder(self) -> Callable[[Any], Any] | None:
        """A function that builds a model like this one from a configuration. None: that of transformers."""
        return None


def untie(config: Any) -> None:
    """Sets `tie_word_embeddings` to False in a configuration and in that of its decoder."""
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of a model that are saved with it, by full name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def decoder_name(model: Any) -> str:
    """The full name of the decoder's module; empty if transformers does not give one."""
    decoder = model.get_decoder()
    return next((name for name, module in model.named_modules() if module is decoder), "")


def finite(tensor: Tensor, name: str, label: str) -> Tensor:
    """Returns the tensor. Raises InputError if it holds NaN or infinity."""
    if not tensor.is_meta and not bool(tensor.isfinite().all()):
        raise InputError(
            f"{label}: {name} holds values that are not finite (NaN or infinity): the model is damaged, fetch it again"
        )
    return tensor


class ModuleStore(WeightStore):
    """A transformers model in memory."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.config, self.label = model, model.config, type(model).__name__
        self._params: dict[str, Tensor] = dict(model.named_parameters())
        everything = dict(model.named_parameters(remove_duplicate=False))
        stored = {id(parameter): name for name, parameter in self._params.items()}
        self._tied = {name: stored[id(p)] for name, p in everything.items() if name not in self._params}
        self._params |= persistent_buffers(model)

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
        return {name: finite(self._params[name].detach(), name, self.label) for name in names}

    def skeleton(self) -> Any:
        return self.model

    def _builder(self) -> Callable[[Any], Any] | None:
        kind = type(self.model)
        return None if kind.__module__.startswith("transformers.") else kind._from_config


class CheckpointStore(WeightStore):
    """A folder as transformers saves it: config.json and safetensors.

    The stored weights decide about ties. If head and embedding are both stored and differ, they are not tied, whatever
    the configuration states.
    """

    def __init__(self, folder: Path):
        self.folder, self.label = folder, str(folder)
        self._stored = safetensors_index(folder)
        self.config = load_config(folder, [tensor.shape for tensor in self._stored.values()])
        self._notes: list[str] = []
        self._tensors = self._index()
        self.key_mapping: dict[str, str] = {}
        self._targets: dict[str, str] = {}
        self._shapes, self._groups = self._match()

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self._notes)

    def _index(self) -> Mapping[str, Any]:
        """The stored tensors by their names in the file. A quantized one is decoded when it is read."""
        return self._stored

    @cached_property
    def _skeleton(self) -> Any:
        return checked_skeleton(self.config, self.label)

    def skeleton(self) -> Any:
        return self._skeleton

    def _mapping(self) -> list[Any]:
        """The rules that turn names in the file into names in the model."""
        return get_model_conversion_mapping(self._skeleton)

    def _match(self) -> tuple[dict[str, Shape], dict[str, Callable[[], dict[str, Tensor]]]]:
        """The shapes of the model's parameters, and for each parameter a function that reads it.

        A function reads one group of stored tensors and returns every parameter that is made from this group.
        """
        model = self._skeleton
        known = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        renames = trainer_names(self._tensors, known)
        mapping = self._mapping()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        transforms: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
        unexpected: list[str] = []
        for key in sorted(self._tensors, key=_natural_order):
            name = renames.get(key, key)
            target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
            if target not in known and name in known:
                target, pattern = name, None
            if target in known:
                self._targets[key] = target
                transform = None if pattern is None else by_pattern[pattern]
                transforms.setdefault(target, (transform, []))[1].append((key, pattern or key))
            elif not name.endswith(_COMPUTED):
                unexpected.append(name)
        self._notes += left_out(unexpected, model, self.label)
        if renames:
            self._notes.append(
                f"names with a trainer's wrapper ({next(iter(renames))}, ...) were read without the wrapper"
            )
            self.key_mapping = trainer_patterns(renames)
        self._settle_ties(transforms)
        expected = {name: shape for name, shape in known.items() if name not in self.tied}
        groups: dict[str, Callable[[], dict[str, Tensor]]] = {}
        for target, (transform, sources) in transforms.items():
            read = self._reader(target, transform, sources)
            shape = expected[target] if transform is None else None
            self._check_source(target, shape, [key for key, _ in sources])
            targets = (
                [target]
                if transform is None
                else [target.replace(transform.target_patterns[0], other, 1) for other in transform.target_patterns]
            )
            groups |= dict.fromkeys(targets, read)
        self._check_missing(sorted(set(expected) - set(groups)), groups)
        return expected, groups

    def _settle_ties(self, transforms: dict[str, Any]) -> None:
        """Compares the ties of the configuration with the stored tensors.

        A tied parameter may be stored under either name. If both are stored and differ, they are separate parameters.
        """
        for alias, name in self.tied.items():
            if alias not in transforms:
                continue
            stored = transforms[alias]
            if name not in transforms:
                transforms[name] = transforms.pop(alias)
            elif self._equal_values(stored, transforms[name]):
                del transforms[alias]
            else:
                self._notes.append(
                    f"config.json ties {alias} to {name}, but {alias} is stored and differs from {name}: it is read as "
                    "it is stored. Set tie_word_embeddings to false in config.json"
                )
        differ = [alias for alias in self.tied if alias in transforms]
        if differ:
            untie(self.config)
            del self._skeleton  # the next access builds it without the tie

    def _equal_values(self, first: Any, second: Any) -> bool:
        """Whether two stored parameters hold the same numbers."""
        (_, [(key, _), *_]), (_, [(other_key, _), *_]) = first, second
        a, b = self._tensors[key], self._tensors[other_key]
        return a.shape == b.shape and bool(torch.equal(a[...], b[...]))

    def _check_missing(self, missing: list[str], groups: dict[str, Callable[[], dict[str, Tensor]]]) -> None:
        """Raises InputError for missing parameters. A missing persistent buffer keeps its initial value."""
        buffers = persistent_buffers(self._skeleton)
        for name in [name for name in missing if name in buffers]:
            missing.remove(name)
            groups[name] = lambda name=name: {name: buffers[name]}  # type: ignore[misc]
            self._notes.append(f"{name} is not stored: it keeps the initial value that transformers gives it")
        if not missing:
            return
        kind = type(self._skeleton).__name__
        head = self._skeleton.get_output_embeddings()
        names = {id(module): name for name, module in self._skeleton.named_modules()}
        if missing == [f"{names.get(id(head))}.weight"]:
            raise InputError(
                f"{self.label} lacks {missing[0]} of {kind}, and config.json does not tie the head to the embedding: "
                "fetch the shard that holds it; if the model is tied, set tie_word_embeddings to true"
            )
        raise InputError(f"{self.label} lacks {', '.join(missing[:4])} of {kind}: fetch the shard that holds them")

    def _check_source(self, target: str, shape: Shape | None, keys: list[str]) -> None:
        """Raises InputError for tensors that are not floating point, and for a tensor with another shape.

        `shape` is None if the parameter is converted from several tensors. Buffers may have any dtype.
        """
        buffers = persistent_buffers(self._skeleton)
        for key in keys:
            tensor = self._tensors[key]
            if isinstance(tensor, LazyTensor) and tensor.dtype not in DTYPES and target not in buffers:
                raise InputError(
                    f"{self.label}: {key} is stored as {tensor.dtype}; start from the model in 16 or 32 bits"
                )
            if shape is not None and tuple(tensor.shape) != shape:
                raise self._shape_error(target, tuple(tensor.shape), shape)

    def _shape_error(self, name: str, found: Shape, expected: Shape) -> InputError:
        return InputError(f"{self.label}: {name} has shape {found}, but config.json makes it {expected}")

    def _reader(self, target: str, transform: Any, sources: list[tuple[str, str]]) -> Callable[[], dict[str, Tensor]]:
        def read() -> dict[str, Tensor]:
            if transform is None:
                return {target: self._tensors[sources[0][0]][...]}
            job = deepcopy(transform)
            for key, pattern in sources:
                job.add_tensor(target, key, pattern, lambda key=key: self._tensors[key][...])
            converted = job.convert(target, model=self._skeleton, config=self.config)
            return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

        return read

    @property
    def tied(self) -> Mapping[str, str]:
        return dict(self._skeleton.all_tied_weights_keys)

    @property
    def shapes(self) -> Mapping[str, Shape]:
        return self._shapes

    @property
    def dtype(self) -> torch.dtype:
        sizes: dict[str, int] = {}
        for tensor in self._tensors.values():
            sizes[tensor.get_dtype()] = sizes.get(tensor.get_dtype(), 0) + prod(tensor.get_shape())
        return DTYPES.get(max(sizes, key=sizes.__getitem__), torch.float32)

    @property
    def weights(self) -> int:
        manifest = self.folder / "gyroquant.json"
        untied = read_json(manifest).get("untied") if manifest.exists() else None
        left_out = untied if isinstance(untied, list) else ()
        return sum(prod(shape) for name, shape in self.shapes.items() if name not in left_out)

    def stored_sizes(self) -> dict[str, int]:
        bits: dict[str, int] = {}
        others = dict(self._stored)
        for key, tensor in self._tensors.items():
            target = self._targets.get(key, key)
            for part in tensor.parts.values():
                if others.pop(part.key, None) is not None:  # several parameters may be made of one tensor
                    bits[target] = bits.get(target, 0) + part.stored_bits
        for key, tensor in others.items():
            bits[key] = bits.get(key, 0) + tensor.stored_bits
        return {name: -(-count // 8) for name, count in bits.items()}

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name in names:
            if name not in out:
                out |= self._groups[name]()
        return {name: self._checked(name, out[name]) for name in names}

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if tuple(tensor.shape) != self._shapes[name]:
            raise self._shape_error(name, tuple(tensor.shape), self._shapes[name])
        return finite(tensor, name, self.label)

    def generation_config(self) -> Any:
        path = self.folder / _GENERATION
        if not path.exists():  # the file is optional
            return super().generation_config()
        stored = read_json(path)
        for name in _NUMBERS:
            if not isinstance(stored.get(name), (int, float, type(None))):
                raise InputError(f"{path} cannot be used: {name} is {stored[name]!r:.40}, not a number; correct it")
        try:
            return GenerationConfig.from_pretrained(self.folder)
        except Exception as error:  # settings of a wrong type raise many kinds
            raise InputError(f"{path} cannot be used: {error}; correct it or remove it") from error

    def write_generation_config(self, folder: Path) -> None:
        path = self.folder / _GENERATION
        if path.exists():
            (folder / _GENERATION).write_bytes(path.read_bytes())
        else:
            super().write_generation_config(folder)

    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder, self.label)


def checked_skeleton(config: Any, label: str) -> Any:
    """As `build_skeleton`. Raises InputError if no model can be built from the configuration."""
    try:
        return build_skeleton(config)
    except InputError as error:
        raise InputError(f"{label}: {error}") from error
    except Exception as error:  # layers check their sizes and raise many kinds
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise InputError(f"{label}: its configuration describes no model that can be built ({why})") from error


def _natural_order(name: str) -> list[tuple[int, Any]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
