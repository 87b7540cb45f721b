"""The output folder: built under another name, put in place whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.export.shards import merge, merge_torch, write_piece


def check_destination(out: Path, overwrite: bool = False, keep: Iterable[Path] = ()) -> None:
    """Raises InputError when `out` cannot become an output folder: it holds something, or cannot be written.

    `keep` is what the run reads, and the folder that it runs in is kept as well: replacing one that holds any of these
    would delete it.
    """
    try:
        if out.is_symlink():
            raise InputError(f"{out} is a symbolic link; give the folder that it leads to, or another name")
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; give the name of a folder that does not exist yet")
        if out.is_dir() and any(out.iterdir()):
            if not overwrite:
                raise InputError(f"{out} exists and is not empty; choose another name, or replace it with --overwrite")
            for place in (*keep, Path.cwd()):
                if place.resolve().is_relative_to(out.resolve()):
                    raise InputError(f"{out} holds {place}, which replacing it would delete; choose another name")
        parent = out.absolute().parent
        existing = next(place for place in (parent, *parent.parents) if place.exists())
    except OSError as error:
        raise InputError(f"{str(out)[:200]} cannot be written: {error.strerror}; choose another name") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{out} cannot be written: {existing} is not a writable folder")


def check_room(out: Path, needed: int) -> None:
    """Raises InputError when the disk of `out` has fewer than `needed` bytes free."""
    parent = out.absolute().parent
    existing = next(place for place in (parent, *parent.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{out} needs about {needed / 1e6:.0f} MB, but its disk has {free / 1e6:.0f} MB free; choose another disk"
        )


class OutputFolder:
    """A context in which pieces of weights are written; `commit` puts the folder in place, leaving without it removes
    all.
    """

    def __init__(self, out: Path, overwrite: bool = False):
        check_destination(out, overwrite)
        self.out = out.absolute()
        self.partial = self.out.with_name(f".{self.out.name}.partial-{uuid.uuid4().hex[:8]}")
        self._pieces: list[Path] = []

    def __enter__(self) -> OutputFolder:
        self.partial.mkdir(parents=True)
        return self

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Writes some tensors; they need not stay in memory."""
        path = self.partial / f"piece-{len(self._pieces):05d}"
        write_piece(path, tensors)
        self._pieces.append(path)

    def json(self, name: str, data: Any) -> None:
        """Writes a JSON file into the folder."""
        (self.partial / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def merge(self) -> None:
        """Puts the pieces together as the folder's safetensors files."""
        merge(self._pieces, self.partial)
        self._pieces = []

    def torch_file(self, name: str, aliases: Mapping[str, str]) -> None:
        """Puts the pieces together as one file of torch, in which each of `aliases` is another tensor once more."""
        merge_torch(self._pieces, self.partial / name, aliases)
        self._pieces = []

    def commit(self) -> None:
        """Puts the folder in place under its name."""
        if self.out.exists():
            old = self.out.with_name(f".{self.out.name}.old-{uuid.uuid4().hex[:8]}")
            self.out.rename(old)
            self.partial.rename(self.out)
            shutil.rmtree(old)
        else:
            self.partial.rename(self.out)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.partial.exists():
            shutil.rmtree(self.partial, ignore_errors=True)
