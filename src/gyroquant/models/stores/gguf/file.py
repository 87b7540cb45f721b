"""The contents of a GGUF model, in one file or in several parts: metadata, and tensors as fp32 values, one at a time.

Parts are named NAME-00001-of-00003.gguf. Their metadata number them: split.no, from 0, and split.count. llama.cpp's
gguf-split and its converter write them so. Only the first part holds the metadata of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gyroquant.errors import InputError
from gyroquant.models.stores.gguf.check import Header, TensorEntry, check_claims, read_header
from gyroquant.models.stores.gguf.ik_types import IK_TYPES, decode_ik

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_CHUNK = 1 << 22  # numbers that are decoded at once
_LOOKED_UP = "token_embd.weight"  # the tensor whose rows are looked up
_Decoder = Callable[[np.ndarray], np.ndarray]
_KINDS = {int(kind): kind.name for kind in gguf.GGMLQuantizationType} | {41: "Q1_0", 42: "Q2_0"}
_KINDS |= {kind.id: name for name, kind in IK_TYPES.items()}


class GgufFile:
    """A GGUF model, from the path of its file or of any of its parts.

    Raises InputError, with the reason, for a header that is wrong or cut short, for sizes that no tensor has, and for
    parts that are missing or do not belong together.
    """

    def __init__(self, path: Path):
        headers = _read_parts(path)
        self.path, self.metadata = headers[0].path, headers[0].metadata
        self.tensors: dict[str, TensorEntry] = {}
        for header in headers:
            for name, entry in header.tensors.items():
                if name in self.tensors:
                    raise InputError(f"{name} is in {self.tensors[name].path} and in {header.path}: fetch both again")
                self.tensors[name] = entry
        stated = self.metadata.get("split.tensors.count")
        if len(headers) > 1 and stated is not None and stated != len(self.tensors):
            raise InputError(
                f"{path}: its parts hold {len(self.tensors)} tensors, but they state {stated}: fetch them again"
            )
        check_claims(self.metadata, [entry.shape for entry in self.tensors.values()], self.path)
        self.architecture: str = self.metadata["general.architecture"]

    def settings(self) -> dict[str, Any]:
        """The metadata of the architecture, without its name as a prefix."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}

    def check_types(self) -> None:
        """Raises InputError for the first tensor of a type that cannot be decoded."""
        for name, entry in self.tensors.items():
            if entry.type not in _DECODERS:
                raise InputError(
                    f"{self.path}: {name} is of the type {kind_name(entry.type)}, which cannot be decoded; "
                    f"use one of these types: {', '.join(kind_name(kind) for kind in sorted(_DECODERS))}"
                )

    def values(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor, or the slice `rows` of its first axis, as fp32 values in its shape."""
        entry = self.tensors[name]
        decode = _PRODUCTS.get(entry.type, _DECODERS[entry.type]) if name != _LOOKED_UP else _DECODERS[entry.type]
        if len(entry.shape) == 1:  # a slice may cut blocks: decode all of them
            return _decoded(decode, entry, entry.start, 1, entry.bytes).reshape(-1)[rows]
        first, last, _ = rows.indices(entry.shape[0])
        lines = (last - first) * prod(entry.shape[1:-1])
        width = entry.bytes // prod(entry.shape[:-1])
        start = entry.start + first * prod(entry.shape[1:-1]) * width
        return _decoded(decode, entry, start, lines, width).reshape(last - first, *entry.shape[1:])


def _decoded(decode: _Decoder, entry: TensorEntry, start: int, lines: int, width: int) -> np.ndarray:
    """`lines` lines of `width` bytes each, from byte `start` on, as fp32 values of shape (lines, numbers)."""
    out = np.empty((lines, entry.shape[-1]), np.float32)
    step = max(1, _CHUNK // entry.shape[-1])
    with entry.path.open("rb") as file:
        file.seek(start)
        for at in range(0, lines, step):
            count = min(step, lines - at)
            raw = np.fromfile(file, np.uint8, count * width).reshape(count, width)
            out[at : at + count] = decode(raw).reshape(count, -1)
    return out


def kind_name(kind: int) -> str:
    """The name of a tensor type in ggml."""
    return _KINDS.get(kind, f"number {kind}")


def is_later_part(path: Path) -> bool:
    """Whether the name of a file marks it as a part of a model other than the first."""
    match = _PART.fullmatch(path.name)
    return match is not None and int(match["number"]) > 1


def _read_parts(path: Path) -> list[Header]:
    """The headers of all parts of a model, in their order."""
    given = read_header(path)
    count = given.metadata.get("split.count", 1)
    if not isinstance(count, int) or count < 2:
        return [given]
    match = _PART.fullmatch(path.name)
    number = given.metadata.get("split.no")
    if match is None or int(match["count"]) != count or int(match["number"]) - 1 != number:
        raise InputError(
            f"{path} is a part of a model (split.no is {number}, split.count is {count}), but its name does not "
            f"match: give all parts their original names (NAME-00001-of-{count:05}.gguf, ...)"
        )
    names = [f"{match['stem']}-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(f"{path} is one of {count} parts, but {', '.join(missing[:3])}{more} is missing: fetch it too")
    headers = [given if name == path.name else read_header(path.parent / name) for name in names]
    for i, header in enumerate(headers):
        stated = header.metadata.get("split.no"), header.metadata.get("split.count")
        if stated != (i, count):
            raise InputError(
                f"{header.path} states that it is part {stated[0]} of {stated[1]} (split.no, split.count), not {i} of "
                f"{count}: the parts do not belong together, fetch them again"
            )
    return headers


def _plain(dtype: str) -> _Decoder:
    return lambda raw: raw.view(dtype).astype(np.float32)


def _small_codes(raw: np.ndarray, bits: int, shift: int, step: int) -> np.ndarray:
    """Decodes blocks of an fp16 scale and codes of `bits` bits, lowest bits first: scale * (step * code + shift)."""
    blocks = raw.reshape(-1, 18)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (blocks[:, 2:, None] >> shifts & ((1 << bits) - 1)).reshape(len(blocks), -1)
    return scale * (step * codes.astype(np.float32) + shift)


def _block_decoder(kind: gguf.GGMLQuantizationType) -> _Decoder:
    return lambda raw: gguf.dequantize(raw, kind)


def _ik_decoder(name: str, factor: float = 1.0) -> _Decoder:
    return lambda raw: decode_ik(raw, name, factor)


def _decodes(kind: gguf.GGMLQuantizationType) -> bool:
    """Whether the gguf package decodes a type of blocks. The package has no list of them, so this tries one block."""
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


_BLOCKS = [kind for kind in gguf.GGMLQuantizationType if gguf.GGML_QUANT_SIZES[kind][0] > 1]
_DECODERS: Mapping[int, _Decoder] = {
    int(gguf.GGMLQuantizationType.F32): _plain("<f4"),
    int(gguf.GGMLQuantizationType.F16): _plain("<f2"),
    int(gguf.GGMLQuantizationType.BF16): lambda raw: (raw.view("<u2").astype("<u4") << 16).view("<f4"),
    **{int(kind): _block_decoder(kind) for kind in _BLOCKS if _decodes(kind)},
    41: lambda raw: _small_codes(raw, 1, -1, 2),  # Q1_0 and Q2_0 are newer than the package's decoders
    42: lambda raw: _small_codes(raw, 2, -1, 1),
    **{kind.id: _ik_decoder(name) for name, kind in IK_TYPES.items()},
}
# Of types whose products with matrices have other numbers than a decoded row
_PRODUCTS = {kind.id: _ik_decoder(name, kind.factor) for name, kind in IK_TYPES.items() if kind.factor != 1}
