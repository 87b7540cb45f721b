"""GGUF files in types that do not hold our codes: decoded to plain numbers, and rounded again by llama.cpp."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from typing import Any

from gyroquant.errors import InputError
from gyroquant.export.folder import OutputFolder, check_room
from gyroquant.export.formats import Format
from gyroquant.export.gguf import FILE, Gguf, plain_type, tensor_names, write_file
from gyroquant.export.gguf_header import stored_tensors
from gyroquant.export.llama_cpp import file_types, rewrite
from gyroquant.models.packed import PackedStore

_PLAIN = "plain.gguf"


class RequantizedGguf(Gguf, variant=True):
    """A GGUF file that llama.cpp's quantizer makes of our numbers, whatever grid they lie on."""

    carries = replace(Gguf.carries, weights=(), dense=True)
    packages = (*Gguf.packages, "llama_cpp")
    extra = "llama-cpp"

    def __init__(self, kind: str):
        self.kind = kind

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """As in `Format`. Returns how many tensors llama.cpp made of which type, the true bits per weight of those that
        OUT has rounded and of all, and what there is to note. Raises InputError with what llama.cpp says where it
        refuses.
        """
        check_room(folder.out, sum(8 * prod(shape) for shape in store.shapes.values()))
        plain, path = folder.partial / _PLAIN, folder.partial / FILE
        _, described = write_file(store, plain, {name: plain_type(store, name) for name in store.shapes})
        try:
            rewrite(plain, path, self.kind)
        except InputError as error:
            raise InputError(f"{error}; choose another type") from error
        finally:
            plain.unlink()
        found, names = stored_tensors(path), tensor_names(store)
        rounded = [found[names[name]] for name in store.description["tensors"]]
        return {
            "file": FILE,
            "requantized": self.kind,
            "types": dict(Counter(one.kind for one in found.values()).most_common()),
            "types_of_rounded": dict(Counter(one.kind for one in rounded).most_common()),
            "bits_per_rounded_weight": 8 * sum(one.bytes for one in rounded) / sum(one.numbers for one in rounded),
            "bits_per_weight": 8 * path.stat().st_size / sum(one.numbers for one in found.values()),
            **described,
        }


def requantized(chosen: Format, kind: str) -> Format:
    """A format with its weights rounded again to one of the types of llama.cpp. Raises InputError for any format but
    GGUF, for a type that there is not, and where llama.cpp is not installed.
    """
    if not isinstance(chosen, Gguf):
        raise InputError(
            f"--requantize is for the format gguf; {chosen.name} holds our codes as they are or not at all"
        )
    types = file_types()
    if kind.upper() not in types:
        raise InputError(f"llama.cpp has no type {kind!r}; it has {', '.join(sorted(types))}")
    return RequantizedGguf(kind.upper())
