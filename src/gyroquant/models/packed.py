"""Our own saved format: packed codes and scales in safetensors, described by `quantization_config` in config.json.

A parameter P that was rounded is stored as P_codes, P_scales and, where there are such, P_zeros (zero points), P_global
(the scale of the whole parameter) and P_basis (the scales of the basis in which it was rounded). What runs with the
model (maps, rounding of activations and of the KV cache) is described in the configuration too; its tensors lie among
the weights under names that start with `gyroquant_map.`.

transformers without gyroquant would skip a quantization that it does not know and leave every rounded weight at random
numbers. `transformers_weights` in config.json stops it: where the name of a file belongs stands `IMPORT_FIRST`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from gyroquant.errors import GyroquantError, InputError
from gyroquant.grids import Basis, Grid, HalfScaleGrid, QuantizedWeight, grid_from
from gyroquant.integrity import check_files
from gyroquant.maps import Map, dump, load
from gyroquant.models.description import check_description, check_places
from gyroquant.models.graph import LinearOp, Shape
from gyroquant.models.online import Attachment, CacheQuantizer, InputQuantizer, OnlineMap
from gyroquant.models.safetensors_files import LazyTensor
from gyroquant.models.sites import Insertion
from gyroquant.models.store import CheckpointStore
from gyroquant.progress import Advance

METHOD = "gyroquant"
# 2 where a basis changes what codes stand for, which readers of 1 would not see; 3 where an integer, fp4 or fp8 weight
# has a scale of the whole parameter, which readers of 2 would not see.
FORMAT_VERSIONS = (1, 2, 3)
PARTS = ("codes", "scales", "zeros", "global", "basis")
MAPS = "gyroquant_map."
IMPORT_FIRST = "gyroquant packed these weights, run `import gyroquant` before you open them"
_STORED_BITS = {"U8": 8, "I8": 8, "F16": 16, "BF16": 16, "I32": 32, "F32": 32, "I64": 64, "F64": 64}


def as_matrix(weight: Tensor, op: LinearOp) -> Tensor:
    """A weight as rows of inputs, shape (out, in): stacked experts one below the other, Conv1D turned round."""
    if op.entry.transposed:
        weight = weight.transpose(-1, -2)
    return weight.reshape(-1, op.in_features)


def from_matrix(matrix: Tensor, shape: Shape, transposed: bool) -> Tensor:
    """The inverse of `as_matrix` for a parameter of this shape."""
    if not transposed:
        return matrix.reshape(shape)
    return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2).contiguous()


def matrix_shape(shape: Shape, transposed: bool) -> tuple[int, int]:
    """The shape of `as_matrix` for a parameter of this shape."""
    columns = shape[-2] if transposed else shape[-1]
    return int(torch.Size(shape).numel()) // columns, columns


class Description:
    """The `quantization_config` of a saved model, built tensor by tensor."""

    def __init__(self) -> None:
        self._grids: list[dict[str, Any]] = []
        self._tensors: dict[str, dict[str, Any]] = {}
        self._maps: list[Map] = []
        self._online: list[dict[str, Any]] = []
        self._inputs: list[dict[str, Any]] = []
        self._cache: list[dict[str, Any]] = []

    def _grid(self, grid: Grid) -> int:
        return self._numbered(grid.model_dump(mode="json"))  # without what it may know of a weight, which is in arrays

    def _numbered(self, spec: dict[str, Any]) -> int:
        if spec not in self._grids:
            self._grids.append(spec)
        return self._grids.index(spec)

    @staticmethod
    def entry(op: LinearOp, weight: QuantizedWeight) -> dict[str, Any]:
        """What there is to note of a rounded parameter, its grid as data."""
        entry: dict[str, Any] = {"grid": weight.grid.model_dump(mode="json")}
        if op.entry.transposed:
            entry["transposed"] = True
        if weight.basis is not None:
            entry["basis"] = weight.basis.describe()
        if isinstance(weight.grid, HalfScaleGrid) and weight.grid.tensor_scale is not None:
            entry["tensor_scale"] = True
        return entry

    def add_tensor(self, name: str, entry: Mapping[str, Any]) -> None:
        """Notes a rounded parameter by its `entry`."""
        self._tensors[name] = {**entry, "grid": self._numbered(entry["grid"])}

    def add_online(self, one: Attachment) -> dict[str, Tensor]:
        """Notes what runs with the model; returns the arrays to store for it, none for a map that was noted before."""
        if isinstance(one, InputQuantizer):
            place = {"point": one.insertion.point, "module": one.module}
            self._inputs.append(place | {"grid": self._grid(one.grid)})
            return {}
        if isinstance(one, CacheQuantizer):
            entry: dict[str, Any] = {"module": one.module}
            entry |= {"keys": self._grid(one.keys), "values": self._grid(one.values)}
            arrays = {} if one.key_mean is None else {f"{MAPS}{one.module}.key_mean": one.key_mean}
            self._cache.append(entry | {"key_mean": next(iter(arrays), None)})
            return arrays
        return self._add_map(one)

    def _add_map(self, one: OnlineMap) -> dict[str, Tensor]:
        arrays: dict[str, Tensor] = {}
        number = next((i for i, m in enumerate(self._maps) if _same(m, one.map)), None)
        if number is None:
            number = len(self._maps)
            self._maps.append(one.map)
            dump(one.map, arrays, f"{MAPS}{number}")
        self._online.append({"point": one.insertion.point, "module": one.module, "map": number})
        return arrays

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "format_version": self._version(),
            "grids": list(self._grids),
            "tensors": self._tensors,
            "maps": [dump(m, {}, f"{MAPS}{i}") for i, m in enumerate(self._maps)],
            "online": self._online,
            "inputs": self._inputs,
            "cache": self._cache,
        }

    def _version(self) -> int:
        """The oldest version whose readers understand it all."""
        for part, version in (("tensor_scale", 3), ("basis", 2)):
            if any(part in entry for entry in self._tensors.values()):
                return version
        return 1


def _same(a: Map, b: Map) -> bool:
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    if dump(a, ours) != dump(b, theirs):
        return False
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def check_version(description: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a folder of a version that this one does not understand, or with a damaged description."""
    version = description.get("format_version")
    if version not in FORMAT_VERSIONS:
        known = f"{FORMAT_VERSIONS[0]} to {FORMAT_VERSIONS[-1]}"
        raise InputError(f"{where} has format version {version}, this gyroquant reads versions {known}")
    check_description(description, where)


def unpack(description: Mapping[str, Any], name: str, arrays: dict[str, Tensor], shape: Shape) -> QuantizedWeight:
    """A stored parameter as codes and scales, in the shape of `as_matrix`.

    Raises InputError where what is stored is not what the description says.
    """
    try:
        return _unpacked(description, name, arrays, shape)
    except (GyroquantError, KeyError, TypeError, ValueError, RuntimeError) as error:
        why = f"its array of {error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{name} is not stored as its description says: {why}; copy the folder again") from error


def _unpacked(description: Mapping[str, Any], name: str, arrays: dict[str, Tensor], shape: Shape) -> QuantizedWeight:
    entry = description["tensors"][name]
    if entry.get("tensor_scale") and "global" not in arrays:
        raise KeyError("global")
    grid, basis = grid_from(description["grids"][entry["grid"]]).bound_by(arrays), None
    rows, columns = matrix_shape(shape, bool(entry.get("transposed")))
    if entry.get("basis") is not None:
        basis = Basis.unpack(entry["basis"], arrays, columns)
        columns = basis.order
    codes, params = grid.unpack(arrays, (rows, columns))
    return QuantizedWeight(grid, codes, params, basis)


def decode(description: Mapping[str, Any], name: str, arrays: dict[str, Tensor], shape: Shape) -> Tensor:
    """A stored parameter as numbers, in its own shape, fp32."""
    transposed = bool(description["tensors"][name].get("transposed"))
    weight = from_matrix(unpack(description, name, arrays, shape).dequantize(), shape, transposed)
    if not bool(weight.isfinite().all()):
        raise InputError(f"{name} decodes to values that are not finite (NaN or infinite): copy the folder again")
    return weight


def attachments(description: Mapping[str, Any], files: Sequence[Path]) -> tuple[Attachment, ...]:
    """What runs with a saved model, its tensors read from its safetensors files.

    Raises MapError or InputError for maps that are damaged and arrays that are missing.
    """
    arrays: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            arrays |= {key: file.get_tensor(key).clone() for key in file.keys() if key.startswith(MAPS)}
    maps = [load(spec, arrays) for spec in description["maps"]]
    grids = [grid_from(spec) for spec in description["grids"]]
    online = [OnlineMap(Insertion(one["point"], one["module"]), maps[one["map"]]) for one in description["online"]]
    inputs = [InputQuantizer(Insertion(o["point"], o["module"]), grids[o["grid"]]) for o in description["inputs"]]
    lost = [one["key_mean"] for one in description["cache"] if one["key_mean"] not in {None, *arrays}]
    if lost:
        raise InputError(f"the array {lost[0]!r} of a rounded KV cache is missing: copy the folder again")
    cache = [
        CacheQuantizer(
            one["module"],
            grids[one["keys"]],
            grids[one["values"]],
            None if one["key_mean"] is None else arrays[one["key_mean"]],
        )
        for one in description["cache"]
    ]
    return (*online, *inputs, *cache)


class _Packed:
    """A rounded parameter among the tensors of a folder; decodes itself when indexed."""

    def __init__(self, store: PackedStore, name: str, parts: dict[str, LazyTensor], shape: Shape):
        self.store, self.name, self.parts, self.shape = store, name, parts, shape

    @property
    def arrays(self) -> dict[str, Tensor]:
        self.store.read_one()
        return {part: tensor[...] for part, tensor in self.parts.items()}

    def __getitem__(self, _: Any) -> Tensor:
        return decode(self.store.description, self.name, self.arrays, self.shape)


class PackedStore(CheckpointStore):
    """A folder that gyroquant wrote; rounded parameters are decoded as they are read. `read_one` is called for each of
    them, so that whoever has a whole model read can tell how far it is.
    """

    read_one: Advance = staticmethod(lambda: None)

    @property
    def description(self) -> dict[str, Any]:
        found = self.config.quantization_config
        return dict(found if isinstance(found, dict) else found.to_dict())

    def _index(self) -> Mapping[str, Any]:
        check_version(self.description, self.label)
        odd = [name for name, tensor in self._stored.items() if tensor.dtype not in _STORED_BITS]
        if odd:
            raise InputError(f"{self.label}: {odd[0]} is stored as {self._stored[odd[0]].dtype}, as nothing is here")
        check_files(self.folder, {tensor.path.name for tensor in self._stored.values()})
        plain = {name: t for name, t in self._stored.items() if not name.startswith(MAPS)}
        shapes = {name: tuple(t.shape) for name, t in self._skeleton.state_dict().items()}
        found: dict[str, Any] = {}
        for name in self.description["tensors"]:
            parts = {part: plain.pop(f"{name}_{part}") for part in PARTS if f"{name}_{part}" in plain}
            if name not in shapes or "codes" not in parts or "scales" not in parts:
                raise InputError(f"{self.label}: the codes or scales of {name} are missing; is a file of it missing?")
            found[name] = _Packed(self, name, parts, shapes[name])
        return found | plain

    @property
    def dtype(self) -> torch.dtype:
        return self.config.dtype or torch.float32

    @cached_property
    def online(self) -> tuple[Attachment, ...]:  # type: ignore[override]
        try:
            found = attachments(self.description, sorted({tensor.path for tensor in self._stored.values()}))
        except GyroquantError as error:
            raise InputError(f"{self.label}: {error}") from error
        check_places(self._skeleton, found, self.label)
        return found

    def quantized(self, name: str) -> QuantizedWeight:
        """The codes and scales of a rounded parameter, as `unpack` gives them. Raises KeyError for any other one."""
        if name not in self.description["tensors"]:
            raise KeyError(name)
        return unpack(self.description, name, self._tensors[name].arrays, self.shapes[name])

    def bits_per_weight(self) -> float:
        names = self.description["tensors"]
        bits = sum(
            int(torch.Size(tensor.shape).numel()) * _STORED_BITS[tensor.dtype]
            for name, tensor in self._stored.items()
            if name.startswith(MAPS) or name.rpartition("_")[0] in names
        )
        return bits / sum(int(torch.Size(self.shapes[name]).numel()) for name in names)
