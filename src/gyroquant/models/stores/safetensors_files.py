"""Tensors in the safetensors files of a folder. They are read one at a time, never from a file outside the folder."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.models.graph.model_graph import Shape
from gyroquant.models.stores.config_loading import read_json, remedy


class LazyTensor:
    """A tensor in a safetensors file. Indexing reads it, and leaves neither the file nor a memory mapping open."""

    def __init__(self, path: Path, key: str, shape: Shape, dtype: str):
        self.path, self.key, self.shape, self.dtype = path, key, shape, dtype

    def __getitem__(self, _: Any) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.key).clone()

    def get_shape(self) -> Shape:
        return self.shape

    def get_dtype(self) -> str:
        return self.dtype

    @property
    def parts(self) -> dict[str, LazyTensor]:
        """The stored tensors that it is made of: itself. One that is stored as codes has several."""
        return {"": self}

    @property
    def stored_bits(self) -> int:
        """The bits that it takes in the file."""
        return prod(self.shape) * _BITS.get(self.dtype, 32)


_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64}
_BITS |= {"F4": 4, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64}
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def safetensors_index(folder: Path) -> dict[str, LazyTensor]:
    """Every tensor of a folder's safetensors files, by name. Raises InputError for missing, damaged or contradictory
    files.
    """
    index, places = folder / "model.safetensors.index.json", dict[str, str]()
    if index.exists():
        places = _weight_map(index)
        files = sorted(set(places.values()))
    elif (folder / "model.safetensors").exists():  # other files may hold learned rotations, for example
        files = ["model.safetensors"]
    else:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which could run code: save the model as safetensors" if pickles else ""
        raise InputError(f"{folder} holds no .safetensors weights; only safetensors and GGUF files are read{hint}")
    tensors: dict[str, LazyTensor] = {}
    for name in files:
        for key, tensor in _tensors_of(folder / name).items():
            if key in tensors:
                raise InputError(
                    f"{key} is in {tensors[key].path} and in {folder / name}: remove the file that does not belong to "
                    "the model"
                )
            tensors[key] = tensor
    for key, name in places.items():
        if key not in tensors or tensors[key].path.name != name:
            raise InputError(f"{index} states that {key} lies in {name}, which does not hold it: fetch both again")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The file that an index names for each tensor. Raises InputError unless each is a file in the same folder."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise InputError(
            f"{index} is not a valid index of weights: its weight_map does not name a file for each tensor; fetch it "
            "again"
        )
    for name in sorted(set(places.values())):
        if Path(name).name != name or "\\" in name:
            raise InputError(f"{index} names {name!r}, which lies outside the model's folder; fetch it again")
        if not name.endswith(".safetensors"):
            raise InputError(f"{index} names {name!r}; only safetensors and GGUF files are read")
        if not (index.parent / name).is_file():
            raise InputError(f"{index} names {name}, which is missing: fetch it as well")
    return places


def _tensors_of(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one safetensors file, by name. Raises InputError if it cannot be read."""
    if not path.is_file():  # opening a pipe would block
        raise InputError(f"{path} is not a file; fetch the model again")
    try:
        with safe_open(path, framework="pt") as file:
            parts = {key: file.get_slice(key) for key in file.keys()}
            return {key: LazyTensor(path, key, tuple(p.get_shape()), p.get_dtype()) for key, p in parts.items()}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {error}; {remedy(path, 'safetensors')}") from error
