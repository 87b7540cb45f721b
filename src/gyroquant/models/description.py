"""The `quantization_config` of a saved model, checked before anything is made of it; see `gyroquant.models.packed`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from gyroquant.errors import InputError, MapError
from gyroquant.grids import grid_from
from gyroquant.maps.base import MAX_ORDER
from gyroquant.models.online import Attachment, CacheQuantizer, InputQuantizer
from gyroquant.models.sites import Point

_Index = Annotated[int, Field(ge=0, strict=True)]
_KEEP = ConfigDict(extra="ignore")


class _Basis(BaseModel):
    model_config = _KEEP
    order: Annotated[int, Field(ge=1, le=MAX_ORDER, strict=True)]


class _Tensor(BaseModel):
    model_config = _KEEP
    grid: _Index
    transposed: bool = False
    basis: _Basis | None = None
    tensor_scale: bool = False


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


class _Description(BaseModel):
    model_config = _KEEP
    grids: list[dict[str, Any]]
    tensors: dict[str, _Tensor]
    maps: list[dict[str, Any]]
    online: list[_Online]
    inputs: list[_Input]
    cache: list[_Cache]


def check_description(description: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a description with sections missing or of a wrong kind, or that points nowhere."""
    try:
        found = _Description(**description)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{where}: quantization_config.{place} is damaged: {first['msg']}; copy the folder again"
        ) from error
    for number, spec in enumerate(found.grids):
        try:
            grid_from(spec)
        except InputError as error:
            raise InputError(f"{where}: quantization_config.grids.{number} is damaged: {error}") from error
    grids = [(f"tensors.{name}", one.grid) for name, one in found.tensors.items()]
    grids += [("inputs", one.grid) for one in found.inputs]
    grids += [("cache", number) for one in found.cache for number in (one.keys, one.values)]
    maps = [("online", one.map) for one in found.online]
    for what, used, there in (("grid", grids, len(found.grids)), ("map", maps, len(found.maps))):
        for place, number in used:
            if number >= there:
                raise InputError(f"{where}: quantization_config.{place} has {what} {number}, and there are {there}")


_WIDTHS = {"input": "in_features", "output": "out_features", "qk": "head_dim"}  # attributes of modules


def check_places(model: nn.Module, online: Iterable[Attachment], where: str) -> None:
    """Raises InputError where what runs with a model has no place in it, or does not fit there."""
    for one in online:
        try:
            module = model.get_submodule(one.module)
        except AttributeError as error:
            raise InputError(f"{where}: something runs at {one.module}, which the model has not") from error
        point = "qk" if isinstance(one, CacheQuantizer) else one.insertion.point
        width = getattr(module, _WIDTHS.get(point, ""), None)
        if isinstance(one, CacheQuantizer):
            shape = None if one.key_mean is None else tuple(one.key_mean.shape)
            if shape is not None and (len(shape) != 2 or width not in (None, shape[1])):
                raise InputError(
                    f"{where}: the mean of the keys of {one.module} has shape {shape}: copy the folder again"
                )
        elif width is not None:
            if isinstance(one, InputQuantizer):
                one.grid.group_of(width, one.module)
            elif one.map.n != width:
                raise MapError(
                    f"{where}: the map at {one.module} has order {one.map.n}, and {width} numbers flow there"
                )
