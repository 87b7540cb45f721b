"""The store of a folder that gyroquant saved: it decodes packed codes and scales as they are read.

`packed_description` describes how they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gyroquant.errors import GyroquantError, InputError
from gyroquant.grids import Basis, LowRankFactors, QuantizedWeight, code_bits, grid_from, stored_bits
from gyroquant.maps import load
from gyroquant.models.execution.exact_tokens import ExactTokens
from gyroquant.models.execution.low_rank import LowRankBranch
from gyroquant.models.execution.online import CacheQuantizer, InputQuantizer, OnlineMap, OnlineOp
from gyroquant.models.graph.model_graph import Shape
from gyroquant.models.graph.sites import HookPoint
from gyroquant.models.stores.base import CheckpointStore
from gyroquant.models.stores.huffman import restored
from gyroquant.models.stores.packed_description import CODED, MAPS, PARTS, check_places, check_version
from gyroquant.models.stores.safetensors_files import LazyTensor
from gyroquant.models.stores.weight_bytes import part_of
from gyroquant.system.checksums import check_files
from gyroquant.system.progress import Advance

_STORED_BITS = {"U8": 8, "I8": 8, "F16": 16, "BF16": 16, "I32": 32, "F32": 32, "I64": 64, "F64": 64}


def _to_param(matrix: Tensor, shape: Shape, transposed: bool) -> Tensor:
    """As `LinearOp.to_param`, without a LinearOp: from the shape of the parameter, and whether it is transposed."""
    if not transposed:
        return matrix.reshape(shape)
    return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()


def _matrix_shape(shape: Shape, transposed: bool) -> tuple[int, int]:
    """As `LinearOp.matrix_shape`, from the same two facts."""
    columns = shape[-2] if transposed else shape[-1]
    return prod(shape) // columns, columns


def unpack(description: Mapping[str, Any], name: str, arrays: dict[str, Tensor], shape: Shape) -> QuantizedWeight:
    """A stored parameter as codes and scales, in the shape of `LinearOp.to_matrix`.

    Raises InputError if the stored arrays do not fit the description.
    """
    try:
        return _unpack(description, name, arrays, shape)
    except (GyroquantError, KeyError, TypeError, ValueError, RuntimeError) as error:
        why = f"its array of {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{name} is not stored as its description states: {why}; copy the folder again") from error


def _unpack(description: Mapping[str, Any], name: str, arrays: dict[str, Tensor], shape: Shape) -> QuantizedWeight:
    entry = description["tensors"][name]
    arrays = restored(entry.get(CODED, {}), arrays)
    if entry.get("tensor_scale") and "global" not in arrays:
        raise KeyError("global")
    grid, basis = grid_from(description["grids"][entry["grid"]]).with_stored_scale(arrays), None
    transposed = bool(entry.get("transposed"))
    rows, columns = _matrix_shape(shape, transposed)
    if entry.get("basis") is not None:
        basis = Basis.unpack(entry["basis"], arrays, columns)
        columns = basis.order
    codes, params = grid.unpack(arrays, (rows, columns))
    rank = entry.get("low_rank")
    factors = None if rank is None else LowRankFactors.unpack(rank, arrays, _matrix_shape(shape, transposed))
    return QuantizedWeight(grid, codes, params, basis, factors)


def decode(description: Mapping[str, Any], name: str, arrays: dict[str, Tensor], shape: Shape) -> Tensor:
    """A stored parameter as fp32 numbers, of shape `shape`. Raises InputError if it decodes to NaN or infinity.

    The low-rank branch of the layer is not in it: that is one of the `attachments`.
    """
    transposed = bool(description["tensors"][name].get("transposed"))
    weight = _to_param(unpack(description, name, arrays, shape).dequantize(), shape, transposed)
    if not bool(weight.isfinite().all()):
        raise InputError(f"{name} decodes to values that are not finite (NaN or infinity): copy the folder again")
    return weight


def attachments(description: Mapping[str, Any], files: Sequence[Path]) -> tuple[OnlineOp, ...]:
    """The online operations of a saved model. Their tensors are read from its safetensors files.

    Raises MapError or InputError if a map is damaged or an array is missing.
    """
    arrays: dict[str, Tensor] = {}
    with_branch = {name: entry["low_rank"] for name, entry in description["tensors"].items() if "low_rank" in entry}
    factors = {f"{name}_{part}" for name in with_branch for part in ("left", "right")}
    for path in files:
        with safe_open(path, framework="pt") as file:
            wanted = [key for key in file.keys() if key.startswith(MAPS) or key in factors]
            arrays |= {key: file.get_tensor(key).clone() for key in wanted}
    maps = [load(spec, arrays) for spec in description["maps"]]
    grids = [grid_from(spec) for spec in description["grids"]]
    online = [OnlineMap(_hook_point(entry), maps[entry["map"]]) for entry in description["online"]]
    inputs = [InputQuantizer(_hook_point(entry), grids[entry["grid"]]) for entry in description["inputs"]]
    missing = [entry["key_mean"] for entry in description["cache"] if entry["key_mean"] not in {None, *arrays}]
    if missing:
        raise InputError(f"the array {missing[0]!r} of a rounded KV cache is missing: copy the folder again")
    cache = [
        CacheQuantizer(
            entry["module"],
            grids[entry["keys"]],
            grids[entry["values"]],
            None if entry["key_mean"] is None else arrays[entry["key_mean"]],
            ExactTokens(entry.get("first_tokens", 0), entry.get("last_tokens", 0)),
        )
        for entry in description["cache"]
    ]
    return (*online, *inputs, *cache, *(_branch(name, rank, arrays) for name, rank in with_branch.items()))


def _branch(name: str, rank: int, arrays: Mapping[str, Tensor]) -> LowRankBranch:
    """The low-rank branch of a parameter. Raises InputError if an array is missing or the two do not fit each other."""
    parts = {part: arrays[f"{name}_{part}"] for part in ("left", "right") if f"{name}_{part}" in arrays}
    shape = len(parts.get("left", ())), parts["right"].shape[-1] if "right" in parts else 0
    try:
        factors = LowRankFactors.unpack(rank, parts, shape)
    except InputError as error:
        raise InputError(f"{name}: {error}: copy the folder again") from error
    return LowRankBranch(HookPoint("input", name.rpartition(".")[0]), factors)


def _hook_point(entry: Mapping[str, Any]) -> HookPoint:
    return HookPoint(entry["point"], entry["module"])


class _Packed:
    """A rounded parameter among the tensors of a folder. Indexing decodes it."""

    def __init__(self, store: PackedStore, name: str, parts: dict[str, LazyTensor], shape: Shape):
        self.store, self.name, self.parts, self.shape = store, name, parts, shape

    @property
    def arrays(self) -> dict[str, Tensor]:
        self.store.read_one()
        return {part: tensor[...] for part, tensor in self.parts.items()}

    def __getitem__(self, _: Any) -> Tensor:
        return decode(self.store.description, self.name, self.arrays, self.shape)


class PackedStore(CheckpointStore):
    """A folder that gyroquant wrote. Rounded parameters are decoded as they are read.

    `read_one` is called for each of them, so that a caller that reads a whole model can report progress.
    """

    read_one: Advance = staticmethod(lambda: None)

    @property
    def description(self) -> dict[str, Any]:
        config = self.config.quantization_config
        return dict(config if isinstance(config, dict) else config.to_dict())

    def _index(self) -> Mapping[str, Any]:
        check_version(self.description, self.label)
        odd = [name for name, tensor in self._stored.items() if tensor.dtype not in _STORED_BITS]
        if odd:
            dtype = self._stored[odd[0]].dtype
            raise InputError(
                f"{self.label}: {odd[0]} is stored as {dtype}, which gyroquant never writes: copy the folder again"
            )
        check_files(self.folder, {tensor.path.name for tensor in self._stored.values()})
        plain = {name: t for name, t in self._stored.items() if not name.startswith(MAPS)}
        shapes = {name: tuple(t.shape) for name, t in self._skeleton.state_dict().items()}
        packed: dict[str, Any] = {}
        for name in self.description["tensors"]:
            parts = {part: plain.pop(f"{name}_{part}") for part in PARTS if f"{name}_{part}" in plain}
            if name not in shapes or "codes" not in parts or "scales" not in parts:
                raise InputError(f"{self.label}: the codes or scales of {name} are missing: copy the folder again")
            packed[name] = _Packed(self, name, parts, shapes[name])
        return packed | plain

    @property
    def dtype(self) -> torch.dtype:
        return self.config.dtype or torch.float32

    @cached_property
    def online(self) -> tuple[OnlineOp, ...]:  # type: ignore[override]
        try:
            online = attachments(self.description, sorted({tensor.path for tensor in self._stored.values()}))
        except GyroquantError as error:
            raise InputError(f"{self.label}: {error}") from error
        check_places(self._skeleton, online, self.label)
        return online

    def quantized(self, name: str) -> QuantizedWeight:
        """The codes and scales of a rounded parameter, from `unpack`. Raises KeyError for any other parameter."""
        if name not in self.description["tensors"]:
            raise KeyError(name)
        return unpack(self.description, name, self._tensors[name].arrays, self.shapes[name])

    def stored_arrays(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Everything that is stored, read one by one: the name of a parameter, and its arrays.

        Those of a rounded parameter are as its grid packs them, by part, also in an archive. Any other tensor is alone,
        under its name in the file.
        """
        rounded, parts = self.description["tensors"], set[str]()
        for name, entry in rounded.items():
            packed = self._tensors[name]
            parts |= {tensor.key for tensor in packed.parts.values()}
            yield name, restored(entry.get(CODED, {}), packed.arrays)
        for key, tensor in self._stored.items():
            if key not in parts:
                yield key, {key: tensor[...]}

    def bits_in_file(self, name: str) -> int:
        """The bits that the arrays of a rounded parameter take in the files."""
        return sum(tensor.stored_bits for tensor in self._tensors[name].parts.values())

    @cached_property
    def counted(self) -> set[str]:
        """The rounded parameters that `bits_per_weight` counts: the layers, or if there are none, the tables."""
        every = self.description["tensors"]
        return {name for name in every if part_of(self.graph, name) == "layers"} or set(every)

    def bits_per_weight(self) -> float:
        names = self.counted
        bits = sum(
            prod(tensor.shape) * _STORED_BITS[tensor.dtype]
            for name, tensor in self._stored.items()
            if name.startswith(MAPS) or name.rpartition("_")[0] in names
        )
        return bits / sum(prod(self.shapes[name]) for name in names)

    def effective_bits_per_weight(self) -> float:
        saved = 0.0
        for name in sorted(self.counted):
            arrays = self._tensors[name].arrays
            weight = unpack(self.description, name, arrays, self.shapes[name])
            saved += stored_bits({"codes": arrays["codes"]}) - code_bits(weight, arrays)
        return self.bits_per_weight() - saved / sum(prod(self.shapes[name]) for name in self.counted)
