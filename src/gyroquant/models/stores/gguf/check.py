"""Strict checks of a GGUF file's header, so that the readers of other libraries only receive valid files.

Every count is compared with the size of the file before anything is read. No allocation is larger than the file, and no
loop has more steps than the file has bytes for. Layout: github.com/ggml-org/ggml, docs/gguf.md; little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from gguf import GGML_QUANT_SIZES

from gyroquant.errors import InputError
from gyroquant.models.stores.config_loading import check_sizes, remedy
from gyroquant.models.stores.gguf.ik_types import IK_TYPES

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_NAME = 65535  # bytes of a key, by the specification; also used for names of tensors, which are far shorter
_MAX_DIMENSIONS = 4  # of a tensor, the maximum of ggml
_MIN_ENTRY, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # bytes
_SIZES = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}  # weights and bytes of a block
_SIZES[42] = 64, 18  # Q2_0: in llama.cpp, but not in the package gguf 0.19
_SIZES |= {kind.id: (256, kind.size) for kind in IK_TYPES.values()}
_ROW_BYTES = {kind.id: kind.row for kind in IK_TYPES.values()}  # before the blocks of a row


class _Damage(Exception):  # noqa: N818 - becomes an InputError that names the file
    pass


@dataclass(frozen=True)
class StringArray:
    """An array of strings in the metadata. Only their number is kept."""

    count: int


class TensorEntry(NamedTuple):
    """A tensor as the header states it.

    path: the file that holds it.
    shape: slowest axis first, as in PyTorch.
    type: the number of its ggml type.
    start: the offset of its first byte in the file.
    bytes: its size in the file.
    """

    path: Path
    shape: tuple[int, ...]
    type: int
    start: int
    bytes: int

    @property
    def numbers(self) -> int:
        return prod(self.shape)


@dataclass
class Header:
    """The metadata and the tensors of one file, by name."""

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)


def check_gguf(path: Path) -> None:
    """Raises InputError, with the reason, for a file whose header is wrong, contradicts itself or is cut short, and
    for a model that claims sizes which its tensors do not have.
    """
    header = read_header(path)
    check_claims(header.metadata, [entry.shape for entry in header.tensors.values()], path)


def check_claims(metadata: dict[str, Any], shapes: list[tuple[int, ...]], path: Path) -> None:
    """Raises InputError for a model without an architecture or without tensors, and if its metadata claim sizes that
    no tensor has.
    """
    if not isinstance(metadata.get("general.architecture"), str):
        raise _unreadable(path, "it names no architecture (general.architecture)")
    if not shapes:
        raise _unreadable(path, "it holds no tensors")
    prefix = f"{metadata['general.architecture']}."
    claimed = {
        key.removeprefix(prefix): value
        for key, value in metadata.items()
        if key.startswith(prefix) and not isinstance(value, StringArray)
    }
    check_sizes(claimed, shapes, str(path))


def _unreadable(path: Path, why: object) -> InputError:
    return InputError(f"{path} cannot be read as a GGUF model: {why}; {remedy(path, 'gguf')}")


def read_strings(path: Path, keys: Collection[str]) -> dict[str, list[str]]:
    """The arrays of strings under these keys, as far as the file has them. Raises InputError as `read_header` does."""
    metadata = read_header(path, keys).metadata
    return {key: metadata[key] for key in keys if isinstance(metadata.get(key), list)}


def read_header(path: Path, strings: Collection[str] = ()) -> Header:
    """The header of one file, which may be a part of a model.

    Arrays of strings are read only under the keys `strings`, and counted otherwise. Raises InputError for a header that
    is wrong, contradicts itself or is cut short.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Bytes(data, strings), path)
    except (_Damage, OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise _unreadable(path, error) from error


class _Bytes:
    """A file's bytes, read value by value and never beyond the end. `at` is the offset of the next byte."""

    def __init__(self, data: mmap.mmap, strings: Collection[str] = ()):
        self.data, self.at, self.size, self._strings = data, 0, len(data), strings

    def need(self, count: int, item: str) -> None:
        if count > self.size - self.at:
            raise _Damage(
                f"cut short: {item} at byte {self.at} takes {count} bytes, but {self.size - self.at} are left"
            )

    def take(self, kind: str, item: str) -> Any:
        size = struct.calcsize("<" + kind)
        self.need(size, item)
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += size
        return value

    def string(self, item: str, longest: int | None = None) -> str:
        length = self.take("Q", item)
        if longest is not None and length > longest:
            raise _Damage(f"{item} at byte {self.at} has {length} bytes, more than the {longest} that are allowed")
        self.need(length, item)
        self.at += length
        try:
            return bytes(self.data[self.at - length : self.at]).decode("utf-8")
        except UnicodeDecodeError as error:
            raise _Damage(f"{item} at byte {self.at - length} is not UTF-8") from error

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind], key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self._array(key)
        raise _Damage(f"{key} is of the unknown type {kind}")

    def _array(self, key: str) -> list[Any] | StringArray:
        """The numbers of an array, or its strings if their key was requested; otherwise the count of its strings."""
        kind, count = self.take("I", key), self.take("Q", key)
        if kind in _SCALARS:
            size = struct.calcsize(_SCALARS[kind])
            self.need(count * size, f"{key}, an array of {count},")
            numbers = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.data, self.at)
            self.at += count * size
            return list(numbers)
        if kind != _STRING:
            raise _Damage(f"{key} is an array of the type {kind}, which models do not have")
        self.need(count * 8, f"{key}, an array of {count} strings,")
        if key in self._strings:
            return [self.string(f"a string of {key}") for _ in range(count)]
        for _ in range(count):
            length = self.take("Q", key)
            self.need(length, f"a string of {key}")
            self.at += length
        return StringArray(count)


def _read(file: _Bytes, path: Path) -> Header:
    file.need(24, "the header")
    if file.data[:4] != b"GGUF":
        raise _Damage("it does not start with GGUF")
    file.at = 4
    version, tensors, keys = file.take("I", "the version"), file.take("Q", "a count"), file.take("Q", "a count")
    if version not in _VERSIONS:
        raise _Damage(f"it has version {version}, only 2 and 3, little-endian, are read")
    header = Header(path)
    file.need(keys * _MIN_ENTRY, f"metadata of {keys} keys")
    for _ in range(keys):
        key = file.string("a key", _MAX_NAME)
        if key in header.metadata:
            raise _Damage(f"the header has the key {key} twice")
        header.metadata[key] = file.value(file.take("I", key), key)
    alignment = header.metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Damage(f"general.alignment is {alignment!r}, not a power of two")
    file.need(tensors * _MIN_TENSOR, f"a table of {tensors} tensors")
    for _ in range(tensors):
        _read_tensor(file, header, alignment)
    start = -(-file.at // alignment) * alignment
    header.tensors = {name: entry._replace(start=start + entry.start) for name, entry in header.tensors.items()}
    _check_offsets(header, start, file.size)
    return header


def _read_tensor(file: _Bytes, header: Header, alignment: int) -> None:
    name = file.string("the name of a tensor", _MAX_NAME)
    if name in header.tensors:
        raise _Damage(f"the header has the tensor {name} twice")
    dimensions = file.take("I", name)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise _Damage(f"{name} has {dimensions} dimensions, not 1 to {_MAX_DIMENSIONS}")
    shape = tuple(file.take("Q", name) for _ in range(dimensions))
    kind, offset = file.take("I", name), file.take("Q", name)
    if kind not in _SIZES:
        raise _Damage(f"{name} is of the type {kind}, which the installed package gguf does not support")
    block, size = _SIZES[kind]
    count = 1
    for size_of_axis in shape:
        count *= size_of_axis
    if count < 1 or shape[0] % block:
        raise _Damage(f"{name} has dimensions {shape}, which blocks of {block} do not fill")
    if offset % alignment:
        raise _Damage(f"{name} starts at {offset}, which is not a multiple of {alignment}")
    bytes_of_rows = count // shape[0] * _ROW_BYTES.get(kind, 0)
    header.tensors[name] = TensorEntry(header.path, shape[::-1], kind, offset, count // block * size + bytes_of_rows)


def _check_offsets(header: Header, start: int, size: int) -> None:
    """Raises _Damage for a tensor that ends after the end of the file, and for tensors that overlap."""
    end, previous = start, ""
    for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].start):
        if entry.start + entry.bytes > size:
            raise _Damage(f"cut short: {name} ends at byte {entry.start + entry.bytes}, but the file has {size}")
        if entry.start < end:
            raise _Damage(f"{name} and {previous} overlap")
        end, previous = entry.start + entry.bytes, name
