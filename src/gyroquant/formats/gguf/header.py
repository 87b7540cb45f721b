"""Reads the metadata and the table of tensors from the header of a GGUF file, by the specification (version 3).

The reader of the gguf package supports fewer types of tensors than llama.cpp writes.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

import gguf

from gyroquant.errors import InputError
from gyroquant.models.stores.gguf.ik_types import IK_TYPES

GGUF_FILE = "model.gguf"
_MAGIC, _VERSION, _STRING, _ARRAY = b"GGUF", 3, 8, 9
_SIZES = (1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8)  # bytes of a metadata value, by the number of its type
_ALIGNMENT = 32
_KINDS = {int(kind): kind.name for kind in gguf.GGMLQuantizationType} | {42: "Q2_0"}
_KINDS |= {kind.id: name for name, kind in IK_TYPES.items()}


class Stored(NamedTuple):
    """A tensor in a file: the name of its type, its count of numbers, and its size in bytes."""

    kind: str
    numbers: int
    bytes: int


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a GGUF file, by name. Raises InputError if the file is not GGUF version 3."""
    with _opened(path) as data:
        return _Header(data).tensors()


def why_not_llama_cpp(path: Path) -> str:
    """Why llama.cpp cannot read a GGUF file, and what can: it has types of ik_llama.cpp. Empty if it has none.

    Also empty for a file that we cannot read: llama.cpp may, and otherwise it says what is wrong.
    """
    try:
        kinds = sorted({tensor.kind for tensor in stored_tensors(path).values()} & IK_TYPES.keys())
    except (InputError, OSError, ValueError, struct.error):
        return ""
    return f"llama.cpp does not read {', '.join(kinds)}: run the file with ik_llama.cpp" if kinds else ""


def stored_settings(path: Path) -> dict[str, bytes]:
    """Every entry of the metadata of a GGUF file by its key, as it is in the file: key, type and value.

    Raises InputError as `stored_tensors`.
    """
    with _opened(path) as data:
        return _Header(data).settings


@contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != _MAGIC or struct.unpack_from("<I", data, 4) != (_VERSION,):
            raise InputError(f"{path} is not a GGUF file of version {_VERSION}")
        yield data


class _Header:
    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 8
        self._count, settings = self._number("Q"), self._number("Q")
        self.settings: dict[str, bytes] = {}
        for _ in range(settings):
            start = self.at
            key = self._string().decode()
            self._skip(self._number("I"))
            self.settings[key] = data[start : self.at]

    def tensors(self) -> dict[str, Stored]:
        """All tensors. The size of each is the distance to the start of the next."""
        table = []
        for _ in range(self._count):
            name = self._string().decode()
            numbers = prod(self._number("Q") for _ in range(self._number("I")))
            kind = self._number("I")
            table.append((self._number("Q"), name, _KINDS.get(kind, f"type {kind}"), numbers))
        table.sort()
        if not table:  # the first part of a model in several files may have only metadata
            return {}
        start = -(-self.at // _ALIGNMENT) * _ALIGNMENT
        ends = [offset for offset, *_ in table[1:]] + [len(self.data) - start]
        return {
            name: Stored(kind, numbers, end - offset)
            for (offset, name, kind, numbers), end in zip(table, ends, strict=True)
        }

    def _number(self, kind: str) -> int:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return int(value)

    def _string(self) -> bytes:
        length = self._number("Q")
        self.at += length
        return self.data[self.at - length : self.at]

    def _skip(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            inner, length = self._number("I"), self._number("Q")
            if inner in (_STRING, _ARRAY):
                for _ in range(length):
                    self._skip(inner)
            else:
                self.at += length * _SIZES[inner]
        else:
            self.at += _SIZES[kind]
