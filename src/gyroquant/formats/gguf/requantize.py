"""GGUF files in types that cannot hold our codes: llama.cpp rounds the decoded weights again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import prod
from typing import Any

from gyroquant.errors import InputError
from gyroquant.formats.base import Format
from gyroquant.formats.gguf.header import GGUF_FILE, stored_tensors
from gyroquant.formats.gguf.quantizer import file_types, quantizer_version, rewrite
from gyroquant.formats.gguf.tensors import tensor_pieces
from gyroquant.formats.gguf.writer import Gguf, plain_type, write_file
from gyroquant.formats.output_folder import OutputFolder, check_room
from gyroquant.models.stores.packed import PackedStore

_PLAIN = "plain.gguf"


class RequantizedGguf(Gguf, variant=True):
    """A GGUF file that llama.cpp's quantizer makes from the decoded weights of any grid."""

    capabilities = replace(Gguf.capabilities, weights=(), dense=True)

    def __init__(self, kind: str):
        self.kind = kind

    def write(self, store: PackedStore, folder: OutputFolder) -> dict[str, Any]:
        """As in `Format`. Returns the number of tensors of each type, the true bits per weight of all tensors and of
        those that gyroquant rounded, and notes. Raises InputError with llama.cpp's message if llama.cpp fails.
        """
        check_room(folder.out, sum(8 * prod(shape) for shape in store.shapes.values()))
        plain, path = folder.partial / _PLAIN, folder.partial / GGUF_FILE
        _, described = write_file(store, plain, {name: plain_type(store, name) for name in store.shapes})
        try:
            rewrite(plain, path, self.kind)
        except InputError as error:
            raise InputError(f"{error}; choose another type") from error
        finally:
            plain.unlink()
        stored, pieces = stored_tensors(path), tensor_pieces(store)
        rounded = [stored[piece.tensor] for name in store.description["tensors"] for piece in pieces[name]]
        return {
            "file": GGUF_FILE,
            "requantized": self.kind,
            "quantizer": quantizer_version(),
            "types": dict(Counter(tensor.kind for tensor in stored.values()).most_common()),
            "types_of_rounded": dict(Counter(tensor.kind for tensor in rounded).most_common()),
            "bits_per_rounded_weight": 8 * sum(t.bytes for t in rounded) / sum(t.numbers for t in rounded),
            "bits_per_weight": 8 * path.stat().st_size / sum(tensor.numbers for tensor in stored.values()),
            **described,
        }


def requantized(chosen: Format, kind: str) -> Format:
    """A format whose weights llama.cpp rounds again to one of its types. Raises InputError for a format other than
    GGUF, for an unknown type, and if llama.cpp is not installed.
    """
    if not isinstance(chosen, Gguf):
        raise InputError(
            f"--requantize is for the format gguf; {chosen.name} holds our codes as they are or not at all"
        )
    types = file_types()
    if kind.upper() not in types:
        raise InputError(f"llama.cpp has no type {kind!r}; use one of {', '.join(sorted(types))}")
    return RequantizedGguf(kind.upper())
