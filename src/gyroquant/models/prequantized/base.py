"""What every format of quantized weights has: a check of its settings, and parameters that decode themselves."""

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
from gyroquant.models.graph import Shape
from gyroquant.models.safetensors_files import LazyTensor
from gyroquant.models.store import CheckpointStore

Stored = dict[str, LazyTensor]
Arrays = dict[str, Tensor]

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64}
_BITS |= {"F4": 4, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64}
_FLOATS = ("F64", "F32", "F16", "BF16")
# Scales that only say how a runtime rounds activations or its KV cache; the weights do not depend on them.
_RUNNING = re.compile(
    r"(?:^|[._])((?:input|output|activation|act|prob_output|qscale_act|q|k|v|kv)_"
    r"(?:global_)?(?:scale|zero_point)|qscale_act)$"
)


@dataclass
class Decoded:
    """A parameter that is stored as codes; decodes itself when indexed, to fp32 of its own shape.

    `rule` makes it from the arrays of `parts`. `bits` are those of a code, `group` how many weights share a scale: a
    number along a row (-1: all of it), or rows and columns of a block (-1, -1: of the whole matrix).
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
            made = self.rule({part: tensor[...] for part, tensor in self.parts.items()})
        except (GyroquantError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{self.label}: {self.name} cannot be decoded: {error}; fetch it again") from error
        if tuple(made.shape) != tuple(self.shape):
            raise InputError(f"{self.label}: {self.name} decodes to shape {tuple(made.shape)}, not {self.shape}")
        return made.float()

    def get_shape(self) -> Shape:
        return self.shape

    def get_dtype(self) -> str:
        return "F32"

    @property
    def stored_bits(self) -> int:
        return sum(prod(tensor.shape) * _BITS.get(tensor.dtype, 32) for tensor in self.parts.values())


class Format(ABC):
    """How weights are stored by a program. Subclasses register themselves under the `methods` that config.json calls
    them by; a file each.
    """

    kinds: ClassVar[dict[str, type[Format]]] = {}
    methods: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        for method in cls.methods:
            Format.kinds[method] = cls

    def __init__(self, settings: Mapping[str, Any], label: str):
        self.settings, self.label = settings, label
        self.method = method_of(settings)
        self.notes: list[str] = []
        """What the original does, by its settings, besides having these weights: nothing of it is carried over."""
        self.check()

    @property
    def layout(self) -> str | None:
        """Which of its layouts it is, for people."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Raises InputError, by `refusal`, for settings that cannot be decoded, and fills the `notes`."""

    @abstractmethod
    def take(self, stored: Stored, modules: Modules) -> Iterator[Decoded]:
        """Takes what is stored of quantized parameters out of `stored` and gives the parameters."""

    def setting(self, name: str, kind: type, default: Any = None) -> Any:
        """A setting. Raises InputError where it is not of this kind."""
        value = self.settings.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise InputError(f"{self.label}: quantization_config says {name} is {value!r}: mend it, or fetch it again")
        return value

    def refusal(self, why: str) -> InputError:
        return InputError(
            f"{self.label} is already quantized ({self.method}), {why}; start from the model in full precision"
        )

    def part(self, stored: Stored, key: str) -> LazyTensor:
        """Takes one tensor. Raises InputError when it is missing."""
        if key not in stored:
            raise InputError(f"{self.label} lacks {key}: a shard may be missing, fetch it again")
        return stored.pop(key)

    def decoded(
        self, name: str, shape: Shape, parts: Stored, rule: Callable[[Arrays], Tensor], bits: int, group: Any
    ) -> Decoded:
        return Decoded(name, shape, parts, rule, bits, group, self.label)


class Modules:
    """The modules of a model, found by the names that a file gives them."""

    def __init__(self, model: nn.Module):
        self._modules = dict(model.named_modules())
        self._endings: dict[str, list[str]] = {}
        for name in self._modules:
            self._endings.setdefault(name.rpartition(".")[2], []).append(name)
        self.parameters = set(model.state_dict())

    def find(self, name: str) -> nn.Module | None:
        """The module of this name, or of one that only has something else in front."""
        if name in self._modules:
            return self._modules[name]
        found = [
            other
            for other in self._endings.get(name.rpartition(".")[2], ())
            if other.endswith(f".{name}") or name.endswith(f".{other}")
        ]
        return self._modules[max(found, key=len)] if found else None

    def turned(self, name: str) -> bool:
        """Whether the weight of this module lies as (inputs, outputs)."""
        return isinstance(self.find(name), Conv1D)


def method_of(settings: Mapping[str, Any]) -> str:
    """What a quantization_config calls its method; bitsandbytes once did without the name."""
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        return "bitsandbytes"
    return str(method)


class PrequantizedStore(CheckpointStore):
    """A folder whose weights another program has quantized; each is decoded as it is read, to fp32."""

    def __init__(self, folder: Path, format: Format):
        self.format = format
        super().__init__(folder)

    def _index(self) -> Mapping[str, Any]:
        _forget(self.config)
        modules, plain = Modules(self._skeleton), dict(self._stored)
        self._decoded = {one.name: one for one in self.format.take(plain, modules)}
        if not self._decoded:
            raise self.format.refusal(
                "as its config.json says, but none of its tensors is: if they are plain numbers, take "
                "quantization_config out of it"
            )
        self._dropped = Counter[str]()
        for key in list(plain):
            running = _RUNNING.search(key)
            if running and key not in modules.parameters:
                self._dropped[running[1]] += 1
                del plain[key]
        self._drop_biases(plain, modules)
        return self._decoded | plain

    def _drop_biases(self, plain: Stored, modules: Modules) -> None:
        """Lets go of biases of zeros that packers have added to layers without any."""
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
        """What is to be told of the original besides: that it is quantized already, and what of it is left out."""
        source = self.source_quantization
        first = f"the original is quantized already ({told(source)}): what that has cost is not measured, nor undone"
        return (*super().notes, first, *(f"the original's quantization: {note}" for note in source["notes"]))

    def bits_per_weight(self) -> float:
        return sum(one.stored_bits for one in self._decoded.values()) / self._weights

    @property
    def _weights(self) -> int:
        return sum(prod(one.shape) for one in self._decoded.values())

    @cached_property
    def source_quantization(self) -> dict[str, Any]:  # type: ignore[override]
        """How the weights were stored: method, layout, bits, group sizes, and what of it is not carried over."""
        groups = {one.group if isinstance(one.group, int) else tuple(one.group) for one in self._decoded.values()}
        dropped = [
            f"{count} x {name}: only rounds activations or the KV cache in another runtime; left out"
            for name, count in sorted(self._dropped.items())
        ]
        return {
            "method": self.format.method,
            "layout": self.format.layout,
            "bits": sorted({one.bits for one in self._decoded.values()}),
            "group_size": [list(group) if isinstance(group, tuple) else group for group in sorted(groups, key=str)],
            "bits_per_weight": self.bits_per_weight(),
            "tensors": len(self._decoded),
            "weights": self._weights,
            "decoded_to": "float32",
            "notes": [*self.format.notes, *dropped],
        }


def _forget(config: Any) -> None:
    """Takes what says how weights are stored out of a configuration, and of those inside it."""
    for name in ("quantization_config", "compression_config"):
        if hasattr(config, name):
            delattr(config, name)
    for inner in list(vars(config).values()):
        if isinstance(inner, PretrainedConfig):
            _forget(inner)


def told(source: Mapping[str, Any]) -> str:
    """One line on what a model was stored as, from its `source_quantization`."""
    bits = " and ".join(map(str, source["bits"]))
    layout = f", {source['layout']}" if source["layout"] not in (None, source["method"]) else ""
    return f"{source['method']}{layout}, {bits} bits ({source['bits_per_weight']:.2f} stored), decoded to fp32"


__all__ = ["Arrays", "Decoded", "Format", "Modules", "PrequantizedStore", "Stored", "method_of", "told"]
