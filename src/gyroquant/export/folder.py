"""The output folder: built under another name, put in place whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from gyroquant.errors import InputError
from gyroquant.export.shards import merge, merge_torch, write_piece
from gyroquant.files import locked, sync, sync_tree


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
    all. What a process that was killed has left is mended by the next one that makes the same folder.
    """

    def __init__(self, out: Path, overwrite: bool = False):
        check_destination(out, overwrite)
        self.out = out.absolute()
        self.partial, self._old = (self.out.with_name(f".{self.out.name}.{state}") for state in ("partial", "old"))
        self._pieces: list[Path] = []
        self._taken: set[Path] = set()
        self._held = ExitStack()

    def __enter__(self) -> OutputFolder:
        self._held.enter_context(locked(self.out))
        try:
            if self._old.exists() and not self.out.exists():  # killed between the two renamings of a replacement
                self._old.rename(self.out)
            shutil.rmtree(self._old, ignore_errors=True)
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except BaseException:
            self._held.close()
            raise
        return self

    def take(self, piece: Path) -> None:
        """Counts a piece that lies elsewhere among those of the folder, and leaves it where it is."""
        self._pieces.append(piece)
        self._taken.add(piece)

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
        merge(self._pieces, self.partial, keep=self._taken)
        self._pieces = []

    def torch_file(self, name: str, aliases: Mapping[str, str]) -> None:
        """Puts the pieces together as one file of torch, in which each of `aliases` is another tensor once more."""
        merge_torch(self._pieces, self.partial / name, aliases)
        self._pieces = []

    def commit(self) -> None:
        """Puts the folder in place under its name, once all of it is on the disk."""
        sync_tree(self.partial)
        if self.out.exists():
            self.out.rename(self._old)
        self.partial.rename(self.out)
        sync(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            if self.partial.exists():
                shutil.rmtree(self.partial, ignore_errors=True)
