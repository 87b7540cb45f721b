"""The bits that a checkpoint of an external tool stores for rounded layers, and the bytes for everything else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gyroquant.benchmark.external_tools.base import ExternalToolError
from gyroquant.models.graph.model_graph import ModelGraph
from gyroquant.models.stores.source import open_model
from gyroquant.models.stores.weight_bytes import add_up

_BITS = {
    **dict.fromkeys(("F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}
WIDE = {"F32": 2, "F64": 6}  # bytes per entry beyond 16 bits
_IN_BLOCK = re.compile(r"\.\d+\..+\.weight$")
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")  # routers of mixtures of experts: no tool rounds them


class _Header(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype]


def true_bits(files: Path, original: Path) -> float:
    """Bits per weight that the safetensors files in `files` store for the linear layers in the blocks of `original`.

    Counts every tensor under a layer's name (codes, scales, zero points, orders, transforms) except its bias. A layer
    that a tool did not round counts with all its bits, so that no tool gains by leaving one out. Both arguments are
    folders. Only headers are read. Raises ExternalToolError if a layer is missing or a file cannot be read.
    """
    stored, weights = _headers(files), layer_weights(original)
    total = 0
    for module in weights:
        bits = [header.bits for name, header in stored.items() if name.startswith(module + ".") and not _bias(name)]
        if not bits:
            raise ExternalToolError(f"{files} stores nothing for the layer {module}")
        total += sum(bits)
    return total / sum(weights.values())


def wide_bytes(files: Path, original: Path) -> int:
    """Bytes that the safetensors files in `files` take beyond 16 bits per entry, for tensors that are not rounded.

    These are the floating-point tensors that are not part of a rounded linear layer in the blocks of `original`:
    embedding, head, norms, biases, and weights that were not rounded. Raises ExternalToolError as `true_bits` does.
    """
    return sum(_too_wide(files, original).values())


def _too_wide(files: Path, original: Path) -> dict[str, int]:
    """The bytes beyond 16 bits per entry of every tensor that `wide_bytes` counts, by name."""
    modules = layer_weights(original)
    plain = {f"{module}.{part}" for module in modules for part in ("weight", "bias")}  # rounded layers have codes here
    rounded = tuple(f"{module}." for module in modules)
    wide = {name: header for name, header in _headers(files).items() if header.dtype in WIDE}
    return {
        name: math.prod(header.shape) * WIDE[header.dtype]
        for name, header in wide.items()
        if name in plain or not name.startswith(rounded)
    }


def bytes_by_part(files: Path, original: Path) -> dict[str, int]:
    """Bytes of the tensors in the safetensors files in `files`, by part of the model `original`, and their `total`.

    What a tool does to embeddings and head by default counts as it is in the files. Plain floating-point numbers count
    at most 16 bits each, because their width depends on the input. Both arguments are folders.
    """
    too_wide = _too_wide(files, original)
    sizes = {name: header.bits // 8 - too_wide.get(name, 0) for name, header in _headers(files).items()}
    return grouped(sizes, open_model(original).graph)


def grouped(sizes: Mapping[str, int], graph: ModelGraph, prefix: str = "") -> dict[str, int]:
    """Bytes by part of a model and their `total`, from the bytes of tensors by name.

    A tensor belongs to the layer or table whose module begins its name (after `prefix`), unless it is a bias.
    """
    weights = {op.weight.removesuffix(".weight"): op.weight for op in (*graph.linears, *graph.tables)}

    def owner(name: str) -> str:
        name = name.removeprefix(prefix)
        parts = name.split(".")
        modules = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
        return next((weights[module] for module in modules if module in weights and not _bias(name)), name)

    return add_up(graph, [(owner(name), size) for name, size in sizes.items()])


def layer_weights(original: Path) -> dict[str, int]:
    """The number of weights of each linear layer in the blocks of a model's folder, by the name of its module."""
    headers = _headers(original)
    names = (name for name, header in headers.items() if _IN_BLOCK.search(name) and len(header.shape) == 2)
    modules = (name.removesuffix(".weight") for name in names)
    weights = {module: math.prod(headers[module + ".weight"].shape) for module in modules if not _ROUTER.search(module)}
    if not weights:
        raise ExternalToolError(f"{original} has no linear layers in blocks, judged by the names of its parameters")
    return weights


def _bias(name: str) -> bool:
    return name.endswith(".bias")


def _headers(folder: Path) -> dict[str, _Header]:
    files = sorted(folder.rglob("*.safetensors"))
    if not files:
        raise ExternalToolError(f"{folder} holds no safetensors file")
    return {name: header for path in files for name, header in _read(path).items()}


def _read(path: Path) -> dict[str, _Header]:
    # not safe_open: it does not have the number of bits of each dtype, and it opens the data too
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        headers = {name: _Header(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExternalToolError(f"{path} is not a safetensors file: {error}") from error
    for name, header in headers.items():
        if header.dtype not in _BITS:
            raise ExternalToolError(f"{path}: {name} has the unknown type {header.dtype}")
    return headers


__all__ = ["WIDE", "bytes_by_part", "grouped", "layer_weights", "true_bits", "wide_bytes"]
