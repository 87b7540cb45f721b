"""Our own saved format: packed codes and scales in safetensors, described by `quantization_config` in config.json.

A rounded parameter P is stored as these tensors:

- P_codes and P_scales, always.
- P_multiples: the multiples of the scales of super-blocks, if it has any.
- P_choices: which of two kinds of numbers each group has, one bit each, if the grid has two kinds; or the place of each
  row's width, if rows have different numbers of bits.
- P_codebooks: the codebooks whose entries its codes choose, if the grid has some.
- P_zeros: the zero points, if it has any.
- P_global: the tensor scale, if it has one.
- P_basis: the scales of the basis in which it was rounded, if there is one.
- P_left and P_right: the factors of its low-rank branch, if it has one.

In an archive some of these arrays are Huffman codes; see `gyroquant.models.stores.huffman`.

The configuration also describes the online operations: maps, rounding of activations and of the KV cache. Their tensors
are stored with the weights, under names that start with `gyroquant_map.`. `PackedDescription` builds the description.
`check_version` checks it before it is used.

Without gyroquant, transformers would skip the unknown quantization and leave random numbers in every rounded weight.
`transformers_weights` in config.json prevents this: it holds `IMPORT_FIRST` in place of the name of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from gyroquant.errors import InputError, MapError
from gyroquant.grids import Grid, HalfScaleGrid, QuantizedWeight, grid_from
from gyroquant.maps import Map, dump
from gyroquant.maps.base import MAX_ORDER
from gyroquant.models.execution.low_rank import LowRankBranch
from gyroquant.models.execution.online import CacheQuantizer, InputQuantizer, OnlineMap, OnlineOp
from gyroquant.models.graph.model_graph import LinearOp
from gyroquant.models.graph.sites import Point

METHOD = "gyroquant"
# Version 2: a basis changes what codes stand for; readers of version 1 would ignore it.
# Version 3: an integer, fp4 or fp8 weight has a tensor scale; readers of version 2 would ignore it.
# Version 4: some tokens of the KV cache stay exact; readers of version 3 would round them.
# Version 5: a layer has a low-rank branch; readers of version 4 would leave it out.
# Version 6: an archive; readers of version 5 would take its Huffman codes for packed codes and scales.
FORMAT_VERSIONS = (1, 2, 3, 4, 5, 6)
ARCHIVE_VERSION = 6
CODED = "huffman"
"""The key of a parameter's description that says which of its arrays are Huffman codes, and how to read them."""
PARTS = ("codes", "scales", "multiples", "choices", "codebooks", "zeros", "global", "basis", "left", "right")
MAPS = "gyroquant_map."
IMPORT_FIRST = "gyroquant packed these weights, run `import gyroquant` before you open them"

_Index = Annotated[int, Field(ge=0, strict=True)]
_KEEP = ConfigDict(extra="ignore")


class _Basis(BaseModel):
    model_config = _KEEP
    order: Annotated[int, Field(ge=1, le=MAX_ORDER, strict=True)]


class _Coded(BaseModel):
    model_config = ConfigDict(extra="forbid")
    bits: Annotated[int, Field(ge=1, le=8, strict=True)]
    dtype: Literal["uint8", "int8", "float16", "float32"]
    shape: list[_Index]


class _Tensor(BaseModel):
    model_config = _KEEP
    grid: _Index
    transposed: bool = False
    basis: _Basis | None = None
    tensor_scale: bool = False
    low_rank: Annotated[int, Field(ge=1, strict=True)] | None = None
    huffman: dict[str, _Coded] | None = None


class _Place(BaseModel):
    model_config = _KEEP
    point: Point
    module: str


class _Online(_Place):
    map: _Index


class _Input(_Place):
    grid: _Index


class _Cache(BaseModel):
    model_config = _KEEP
    module: str
    keys: _Index
    values: _Index
    key_mean: str | None
    first_tokens: _Index = 0
    last_tokens: _Index = 0


class _Schema(BaseModel):
    model_config = _KEEP
    grids: list[dict[str, Any]]
    tensors: dict[str, _Tensor]
    maps: list[dict[str, Any]]
    online: list[_Online]
    inputs: list[_Input]
    cache: list[_Cache]


class PackedDescription:
    """The `quantization_config` of a saved model, built tensor by tensor. `to_dict` returns it as plain data."""

    def __init__(self) -> None:
        self._grids: list[dict[str, Any]] = []
        self._tensors: dict[str, dict[str, Any]] = {}
        self._maps: list[Map] = []
        self._online: list[dict[str, Any]] = []
        self._inputs: list[dict[str, Any]] = []
        self._cache: list[dict[str, Any]] = []

    def _grid(self, grid: Grid) -> int:
        return self._numbered(
            grid.model_dump(mode="json")
        )  # without numbers that belong to one weight: arrays hold these

    def _numbered(self, spec: dict[str, Any]) -> int:
        if spec not in self._grids:
            self._grids.append(spec)
        return self._grids.index(spec)

    @staticmethod
    def entry(op: LinearOp, weight: QuantizedWeight) -> dict[str, Any]:
        """The description of one rounded parameter, with its grid as data."""
        entry: dict[str, Any] = {"grid": weight.grid.model_dump(mode="json")}
        if op.entry.transposed:
            entry["transposed"] = True
        if weight.basis is not None:
            entry["basis"] = weight.basis.describe()
        if isinstance(weight.grid, HalfScaleGrid) and weight.grid.tensor_scale is not None:
            entry["tensor_scale"] = True
        if weight.low_rank is not None:
            entry["low_rank"] = weight.low_rank.rank
        return entry

    def add_tensor(self, name: str, entry: Mapping[str, Any]) -> None:
        """Adds a rounded parameter. `entry` is its description, from `PackedDescription.entry`."""
        self._tensors[name] = {**entry, "grid": self._numbered(entry["grid"])}

    def add_online(self, op: OnlineOp) -> dict[str, Tensor]:
        """Adds an online operation. Returns the arrays to store for it: none if its map was added before.

        Low-rank branches are part of their layers: `add_tensor` adds them.
        """
        assert not isinstance(op, LowRankBranch), "a low-rank branch is stored with its layer"
        if isinstance(op, InputQuantizer):
            place = {"point": op.hook_point.point, "module": op.module}
            self._inputs.append(place | {"grid": self._grid(op.grid)})
            return {}
        if isinstance(op, CacheQuantizer):
            entry: dict[str, Any] = {"module": op.module}
            entry |= {"keys": self._grid(op.keys), "values": self._grid(op.values)}
            arrays = {} if op.key_mean is None else {f"{MAPS}{op.module}.key_mean": op.key_mean}
            entry["key_mean"] = next(iter(arrays), None)
            if op.exact:
                entry |= {"first_tokens": op.exact.first, "last_tokens": op.exact.last}
            self._cache.append(entry)
            return arrays
        return self._add_map(op)

    def _add_map(self, op: OnlineMap) -> dict[str, Tensor]:
        arrays: dict[str, Tensor] = {}
        number = next((i for i, m in enumerate(self._maps) if _same(m, op.map)), None)
        if number is None:
            number = len(self._maps)
            self._maps.append(op.map)
            dump(op.map, arrays, f"{MAPS}{number}")
        self._online.append({"point": op.hook_point.point, "module": op.module, "map": number})
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
        """The oldest format version that can express this description."""
        if any("low_rank" in entry for entry in self._tensors.values()):
            return 5
        if any("last_tokens" in entry for entry in self._cache):
            return 4
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
    """Raises InputError if this gyroquant does not read the format version, or if the description is damaged."""
    version = description.get("format_version")
    if version not in FORMAT_VERSIONS:
        known = f"{FORMAT_VERSIONS[0]} to {FORMAT_VERSIONS[-1]}"
        raise InputError(
            f"{where} has format version {version}, but this gyroquant reads versions {known}; install a newer "
            "gyroquant, or copy the folder again if its config.json is damaged"
        )
    _check_schema(description, where)


def _check_schema(description: Mapping[str, Any], where: str) -> None:
    """Raises InputError if a section is missing or of a wrong type, or refers to a missing grid or map."""
    try:
        schema = _Schema(**description)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{where}: quantization_config.{place} is damaged: {first['msg']}; copy the folder again"
        ) from error
    for number, spec in enumerate(schema.grids):
        try:
            grid_from(spec)
        except InputError as error:
            raise InputError(
                f"{where}: quantization_config.grids.{number} is damaged: {error}; copy the folder again"
            ) from error
    grids = [(f"tensors.{name}", entry.grid) for name, entry in schema.tensors.items()]
    grids += [("inputs", entry.grid) for entry in schema.inputs]
    grids += [("cache", number) for entry in schema.cache for number in (entry.keys, entry.values)]
    maps = [("online", entry.map) for entry in schema.online]
    for kind, used, count in (("grid", grids, len(schema.grids)), ("map", maps, len(schema.maps))):
        for place, number in used:
            if number >= count:
                raise InputError(
                    f"{where}: quantization_config.{place} has {kind} {number}, and there are {count}; "
                    "copy the folder again"
                )


_WIDTHS = {"input": "in_features", "output": "out_features", "qk": "head_dim"}  # attributes of modules


def _owner(model: nn.Module, op: OnlineOp) -> Any:
    """The module of an online operation, or its parameter. Raises AttributeError if the model lacks it."""
    if not isinstance(op, CacheQuantizer) and op.hook_point.point == "parameter":
        return model.get_parameter(op.module)
    return model.get_submodule(op.module)


def check_places(model: nn.Module, online: Iterable[OnlineOp], where: str) -> None:
    """Raises InputError or MapError if the module of an online operation is missing or has another width."""
    for op in online:
        try:
            module = _owner(model, op)
        except AttributeError as error:
            raise InputError(
                f"{where}: an online operation runs at {op.module}, which the model lacks: copy the folder again"
            ) from error
        if isinstance(op, LowRankBranch):
            _check_branch(module, op, where)
            continue
        point = "qk" if isinstance(op, CacheQuantizer) else op.hook_point.point
        width = getattr(module, _WIDTHS.get(point, ""), None)
        if isinstance(op, CacheQuantizer):
            shape = None if op.key_mean is None else tuple(op.key_mean.shape)
            if shape is not None and (len(shape) != 2 or width not in (None, shape[1])):
                raise InputError(
                    f"{where}: the mean of the keys of {op.module} has shape {shape}: copy the folder again"
                )
        elif width is not None:
            if isinstance(op, InputQuantizer):
                op.grid.group_of(width, op.module)
            elif op.map.n != width and (point != "qk" or op.map.n % width):
                raise MapError(f"{where}: the map at {op.module} has order {op.map.n}, but the width there is {width}")


def _check_branch(module: Any, op: LowRankBranch, where: str) -> None:
    """Raises InputError if the factors of a branch do not fit the widths of its module."""
    widths = len(op.factors.left), op.factors.right.shape[1]
    expected = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if any(width not in (None, ours) for width, ours in zip(expected, widths, strict=True)):
        raise InputError(
            f"{where}: the low-rank branch at {op.module} has {widths[1]} inputs and {widths[0]} outputs, and the "
            f"module has {expected[1]} and {expected[0]}: copy the folder again"
        )
