"""Decodes GGUF files to fp32 with llama.cpp's own code: ggml has a decoder for each of its types."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gyroquant.errors import InputError
from gyroquant.formats.gguf.header import stored_settings
from gyroquant.formats.gguf.llama_cpp import shared_library
from gyroquant.models.stores.gguf.check import TensorEntry
from gyroquant.models.stores.gguf.file import GgufFile

_F32 = 0
_AS_THEY_ARE = {_F32, *range(24, 29)}  # fp32, integers and fp64
_LAST = 42  # Q2_0, the newest type that is read. ggml has no check for numbers that it does not know
_CHUNK = 1 << 22  # numbers that are decoded at once
_Decoder = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)


class _Traits(ctypes.Structure):
    """ggml_type_traits. Four functions of ggml state the same facts, and they are compared."""

    _fields_ = [
        ("name", c_char_p),
        ("block", c_int64),
        ("interleaved", c_int64),
        ("bytes", c_size_t),
        ("quantized", c_bool),
        ("decode", _Decoder),
    ]


_FUNCTIONS: dict[str, Any] = {  # each has one argument, the number of a type
    "ggml_blck_size": c_int64,
    "ggml_get_type_traits": ctypes.POINTER(_Traits),
    "ggml_is_quantized": c_bool,
    "ggml_type_name": c_char_p,
    "ggml_type_size": c_size_t,
}


def write_decoded(path: Path, target: Path) -> None:
    """Writes the model of a GGUF file, which may be the first of several parts, with all its numbers in fp32.

    llama.cpp decodes them. The metadata and the tensors of integers are copied. Raises InputError if llama.cpp is not
    installed or does not have a type of the file.
    """
    file = GgufFile(path)
    settings = [entry for key, entry in stored_settings(path).items() if not key.startswith("split.")]
    alignment = int(file.metadata.get("general.alignment", 32))
    tensors = list(file.tensors.items())
    with target.open("wb") as out:
        out.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(settings)) + b"".join(settings))
        at = 0
        for name, entry in tensors:
            kind, size = _decoded_size(entry)
            shape = struct.pack(f"<I{len(entry.shape)}Q", len(entry.shape), *reversed(entry.shape))
            out.write(_text(name) + shape + struct.pack("<IQ", kind, at))
            at += -(-size // alignment) * alignment
        for name, entry in tensors:
            out.write(bytes(-out.tell() % alignment))
            for values in _decoded(name, entry):
                out.write(values.data)


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _decoded_size(entry: TensorEntry) -> tuple[int, int]:
    """The type and the bytes of a tensor after decoding."""
    return (entry.type, entry.bytes) if entry.type in _AS_THEY_ARE else (_F32, 4 * prod(entry.shape))


def _decoded(name: str, entry: TensorEntry) -> Iterator[np.ndarray]:
    """The numbers of a tensor in fp32, part by part; the bytes of a type that is not decoded."""
    with entry.path.open("rb") as file:
        file.seek(entry.start)
        if entry.type in _AS_THEY_ARE:
            yield from _parts(file, entry.bytes, 4 * _CHUNK)
            return
        traits = _traits(name, entry.type)
        for raw in _parts(file, entry.bytes, _CHUNK // traits.block * traits.bytes):
            values = np.empty(raw.size // traits.bytes * traits.block, np.float32)
            traits.decode(raw.ctypes.data, values.ctypes.data, values.size)
            yield values


def _parts(file: Any, size: int, step: int) -> Iterator[np.ndarray]:
    for at in range(0, size, step):
        yield np.fromfile(file, np.uint8, min(step, size - at))


def _traits(name: str, kind: int) -> Any:
    """What ggml states about a type. Raises InputError if it has no such type, no decoder, or another layout."""
    library = _ggml()
    if not 0 <= kind <= _LAST or library.ggml_type_size(kind) == 0:
        raise InputError(f"{name} is of a type that the installed llama.cpp does not have (number {kind})")
    known, traits = library.ggml_type_name(kind), library.ggml_get_type_traits(kind).contents
    facts = library.ggml_blck_size(kind), library.ggml_type_size(kind), library.ggml_is_quantized(kind)
    if (traits.block, traits.bytes, traits.quantized) != facts or traits.name != known:
        raise InputError(
            "the installed llama.cpp describes its types in another layout than gyroquant knows: "
            'install the version that fits, pip install "gyroquant[llama-cpp]"'
        )
    if not traits.decode:
        raise InputError(f"llama.cpp does not decode the type of {name}, {known.decode()}")
    return traits


@cache
def _ggml() -> Any:
    """The library with ggml's functions, with their types declared. Raises InputError as `binding`."""
    library = shared_library()
    for name, result in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, [c_int32]
    return library
