"""Writes tensors in pieces, then joins the pieces into safetensors files, or into one file for `torch.load`, without
reading them into memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gyroquant.system.files import save_tensors

_MAX_SHARD = 5 * 10**9
_COPY = 1 << 24
_DTYPES = {"I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def write_piece(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes one piece, such as the tensors of a block, as a safetensors file."""
    save_tensors(tensors, path)


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    (length,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _plan(pieces: Iterable[Path], max_bytes: int) -> list[list[tuple[Path, dict[str, Any], int, int]]]:
    """Pieces grouped into shards. A piece is (path, header, offset of its data, bytes of data)."""
    shards: list[list[tuple[Path, dict[str, Any], int, int]]] = [[]]
    size = 0
    for path in pieces:
        with path.open("rb") as file:
            header, start = _header(file)
        length = path.stat().st_size - start
        if shards[-1] and size + length > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append((path, header, start, length))
        size += length
    return shards


def merge(
    pieces: Iterable[Path], folder: Path, max_bytes: int = _MAX_SHARD, keep: Container[Path] = frozenset()
) -> None:
    """Joins pieces into `model.safetensors`, or into numbered shards of at most `max_bytes` with an index. Deletes each
    piece as soon as it is copied, except those in `keep`.
    """
    shards = _plan(pieces, max_bytes)
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    weight_map: dict[str, str] = {}
    for name, parts in zip(names, shards, strict=True):
        joined: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for _, header, _, length in parts:
            for key, entry in header.items():
                start, stop = entry["data_offsets"]
                joined[key] = entry | {"data_offsets": [start + offset, stop + offset]}
                weight_map[key] = name
            offset += length
        text = json.dumps(joined, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            for path, _, start, _ in parts:
                _append(out, path, start)
                if path not in keep:
                    path.unlink()
    if len(shards) > 1:
        total = sum(length for parts in shards for *_, length in parts)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _append(out: BinaryIO, path: Path, start: int) -> None:
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(_COPY):
            out.write(data)


def merge_torch(pieces: Iterable[Path], path: Path, aliases: Mapping[str, str]) -> None:
    """Joins pieces into a dictionary that `torch.load` reads, with the tensors in their order. Deletes the pieces.

    Every tensor has its own memory, except `aliases`, which map an extra name to the tensor that it shares.
    """
    pieces, tensors = list(pieces), dict[str, Tensor]()
    for piece in pieces:
        with piece.open("rb") as file:
            header, start = _header(file)
        for name, entry in header.items():
            tensors[name] = _mapped(piece, start, entry)
    torch.save(tensors | {alias: tensors[name] for alias, name in aliases.items()}, path)
    del tensors
    for piece in pieces:
        piece.unlink()


def _mapped(path: Path, start: int, entry: Mapping[str, Any]) -> Tensor:
    """A tensor that is mapped from a file and read on access."""
    first, last = entry["data_offsets"]
    data = np.memmap(path, np.uint8, "c", start + first, (last - first,))
    return torch.from_numpy(data).view(_DTYPES[entry["dtype"]]).view(entry["shape"])
