"""The base class of formats of quantized weights, their parameters, and the store that decodes them."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from gyroquant.errors import GyroquantError, InputError
from gyroquant.models.graph.model_graph import Shape
from gyroquant.models.stores.base import CheckpointStore
from gyroquant.models.stores.safetensors_files import LazyTensor
from gyroquant.registry import Registry

Stored = dict[str, LazyTensor]
Arrays = dict[str, Tensor]

_FLOATS = ("F64", "F32", "F16", "BF16")
# Scales with which a runtime rounds activations or its KV cache. The weights do not depend on them.
_RUNTIME_SCALES = re.compile(
    r"(?:^|[._])((?:input|output|activation|act|prob_output|qscale_act|q|k|v|kv)_"
    r"(?:global_)?(?:scale|zero_point)|qscale_act)$"
)


@dataclass
class Decoded:
    """A parameter that is stored as codes. Indexing decodes it to fp32, in the shape `shape`.

    name: the name of the parameter.
    shape: its shape after decoding.
    parts: the stored tensors.
    rule: makes the parameter from the arrays of `parts`.
    bits: the width of a code.
    group: the weights that share a scale: a number along a row (-1: the whole row), or rows and columns of a block
        (-1, -1: the whole matrix).
    label: the model, for messages.
    """

    name: str
    shape: Shape
    parts: Stored
    rule: Callable[[Arrays], Tensor]
    bits: int
    group: int | tuple[int, int]
    label: str = ""

    def __getitem__(self, _: Any) -> Tensor:
        try:
            weight = self.rule({part: tensor[...] for part, tensor in self.parts.items()})
        except (GyroquantError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.label}: {self.name} cannot be decoded: {error}; fetch it again") from error
        if tuple(weight.shape) != tuple(self.shape):
            raise InputError(
                f"{self.label}: {self.name} decodes to shape {tuple(weight.shape)}, not {self.shape}; fetch it again"
            )
        return weight.float()

    def get_shape(self) -> Shape:
        return self.shape

    def get_dtype(self) -> str:
        return "F32"

    @property
    def stored_bits(self) -> int:
        return sum(tensor.stored_bits for tensor in self.parts.values())


class PrequantizedFormat(ABC):
    """How a program stores quantized weights. Each format is one module.

    A subclass is registered under its `methods`: the values of `quant_method` in config.json.
    """

    registry: ClassVar[Registry[type[PrequantizedFormat]]] = Registry(
        "prequantized format", "gyroquant.models.stores.prequantized"
    )
    methods: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        for method in cls.methods:
            PrequantizedFormat.registry.add(method, cls)

    def __init__(self, settings: Mapping[str, Any], label: str):
        self.settings, self.label = settings, label
        self.method = method_of(settings)
        self.notes: list[str] = []
        """What else the original does by its settings, such as rounding of activations. None of it is carried over."""
        self.check()

    @property
    def layout(self) -> str | None:
        """The name of the layout, for reports; None if the format has only one."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Raises InputError, made by `refusal`, for settings that cannot be decoded. Fills `notes`."""

    @abstractmethod
    def take(self, stored: Stored, modules: Modules) -> Iterator[Decoded]:
        """Removes the tensors of quantized parameters from `stored` and yields these parameters."""

    def setting(self, name: str, kind: type, default: Any = None) -> Any:
        """A setting, or `default` if it is missing. Raises InputError if it is not of the type `kind`."""
        value = self.settings.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(
                f"{self.label}: quantization_config states {name} is {value!r}: correct it, or fetch the folder again"
            )
        return value

    def refusal(self, why: str) -> InputError:
        """The InputError for a model that cannot be decoded. `why` follows "NAME is already quantized (METHOD), "."""
        return InputError(
            f"{self.label} is already quantized ({self.method}), {why}; start from the model in full precision"
        )

    def part(self, stored: Stored, key: str) -> LazyTensor:
        """Removes one tensor from `stored` and returns it. Raises InputError if it is missing."""
        if key not in stored:
            raise InputError(f"{self.label} lacks {key}: fetch the shard that holds it")
        return stored.pop(key)

    def decoded(
        self, name: str, shape: Shape, parts: Stored, rule: Callable[[Arrays], Tensor], bits: int, group: Any
    ) -> Decoded:
        return Decoded(name, shape, parts, rule, bits, group, self.label)


class Modules:
    """Finds modules of a model by their names in a file."""

    def __init__(self, model: nn.Module):
        self._modules = dict(model.named_modules())
        self._endings: dict[str, list[str]] = {}
        for name in self._modules:
            self._endings.setdefault(name.rpartition(".")[2], []).append(name)
        self.parameters = set(model.state_dict())

    def find(self, name: str) -> nn.Module | None:
        """The module of this name, or of a name that differs only by a prefix; None if there is none."""
        if name in self._modules:
            return self._modules[name]
        endings = [
            other
            for other in self._endings.get(name.rpartition(".")[2], ())
            if other.endswith(f".{name}") or name.endswith(f".{other}")
        ]
        return self._modules[max(endings, key=len)] if endings else None

    def turned(self, name: str) -> bool:
        """Whether the weight of this module has shape (inputs, outputs)."""
        return isinstance(self.find(name), Conv1D)


def method_of(settings: Mapping[str, Any]) -> str:
    """The method of a quantization_config. Old files of bitsandbytes do not state it."""
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method)


class PrequantizedStore(CheckpointStore):
    """A folder whose weights another program quantized. Each weight is decoded to fp32 when it is read."""

    def __init__(self, folder: Path, format: PrequantizedFormat):
        self.format = format
        super().__init__(folder)

    def _index(self) -> Mapping[str, Any]:
        _remove_quantization(self.config)
        modules, plain = Modules(self._skeleton), dict(self._stored)
        self._decoded = {weight.name: weight for weight in self.format.take(plain, modules)}
        if not self._decoded:
            raise self.format.refusal(
                "as its config.json states, but none of its tensors is quantized: if they are plain numbers, remove "
                "quantization_config from config.json"
            )
        self._dropped = Counter[str]()
        for key in list(plain):
            running = _RUNTIME_SCALES.search(key)
            if running and key not in modules.parameters:
                self._dropped[running[1]] += 1
                del plain[key]
        self._drop_biases(plain, modules)
        return self._decoded | plain

    def _drop_biases(self, plain: Stored, modules: Modules) -> None:
        """Removes zero biases that packers added to layers without a bias. Raises InputError if one is not zero."""
        for name in self._decoded:
            key = f"{name.removesuffix('.weight')}.bias"
            module = modules.find(name.removesuffix(".weight"))
            if key in plain and module is not None and getattr(module, "bias", None) is None:
                if not bool((plain[key][...] == 0).all()):
                    raise InputError(f"{self.label}: {key} is not zero, but its layer has no bias: fetch it again")
                del plain[key]

    @property
    def dtype(self) -> torch.dtype:
        return self.config.dtype or torch.float32

    @property
    def read_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def notes(self) -> tuple[str, ...]:  # type: ignore[override]
        """Also notes that the original is quantized already, and which part of its quantization is not carried over."""
        source = self.source_quantization
        first = f"the original is quantized already ({told(source)}): the error of that is neither measured nor undone"
        return (*super().notes, first, *(f"the original's quantization: {note}" for note in source["notes"]))

    def bits_per_weight(self) -> float:
        return sum(weight.stored_bits for weight in self._decoded.values()) / self._weights

    @property
    def _weights(self) -> int:
        return sum(prod(weight.shape) for weight in self._decoded.values())

    @cached_property
    def source_quantization(self) -> dict[str, Any]:  # type: ignore[override]
        """How the weights were stored: method, layout, bits, group sizes, and the parts that are not carried over."""
        groups = {
            weight.group if isinstance(weight.group, int) else tuple(weight.group) for weight in self._decoded.values()
        }
        dropped = [
            f"{count} x {name}: only used to round activations or the KV cache in another runtime; left out"
            for name, count in sorted(self._dropped.items())
        ]
        return {
            "method": self.format.method,
            "layout": self.format.layout,
            "bits": sorted({weight.bits for weight in self._decoded.values()}),
            "group_size": [list(group) if isinstance(group, tuple) else group for group in sorted(groups, key=str)],
            "bits_per_weight": self.bits_per_weight(),
            "tensors": len(self._decoded),
            "weights": self._weights,
            "decoded_to": "float32",
            "notes": [*self.format.notes, *dropped],
        }


def _remove_quantization(config: Any) -> None:
    """Removes the description of quantized weights from a configuration and from those inside it."""
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    for inner in list(vars(config).values()):
        if isinstance(inner, PretrainedConfig):
            _remove_quantization(inner)


def told(source: Mapping[str, Any]) -> str:
    """One line on how a model was stored, from its `source_quantization`."""
    bits = " and ".join(map(str, source["bits"]))
    layout = f", {source['layout']}" if source["layout"] not in (None, source["method"]) else ""
    return f"{source['method']}{layout}, {bits} bits ({source['bits_per_weight']:.2f} stored), decoded to fp32"


__all__ = ["Arrays", "Decoded", "Modules", "PrequantizedFormat", "PrequantizedStore", "Stored", "method_of", "told"]
