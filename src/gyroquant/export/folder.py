"""The output folder: built under another name, put in place whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from gyroquant.environment import size
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
                for found in (place.resolve(), place.parent.resolve() / place.name):  # what a link leads to, and itself
                    if found.is_relative_to(out.resolve()):
                        raise InputError(f"{out} holds {place}, which replacing it would delete; choose another name")
    except OSError as error:
        raise InputError(f"{str(out)[:200]} cannot be written: {error.strerror}; choose another name") from error
    check_writable(out.absolute().parent, out)


def check_writable(folder: Path, what: Path | None = None) -> None:
    """Raises InputError when `folder` is no writable folder and cannot be made one; `what` is to be written there."""
    what = folder if what is None else what
    try:
        existing = _existing(folder)
    except OSError as error:
        raise InputError(f"{str(what)[:200]} cannot be written: {error.strerror}; choose another name") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{what} cannot be written: {existing} is not a writable folder")


def _existing(place: Path) -> Path:
    """A place, or the innermost of the folders above it that is there."""
    place = place.absolute()
    return next(one for one in (place, *place.parents) if one.exists())


def left_behind(out: Path) -> int:
    """Bytes beside `out` that a run before has left there, and the next one goes on from or removes."""
    total = 0
    for state in ("journal", "partial"):
        with suppress(OSError):  # of files that a run which is still going on deletes
            for path in out.absolute().with_name(f".{out.name}.{state}").rglob("*"):
                total += path.stat().st_size if path.is_file() else 0
    return total


def check_room(out: Path, needed: int) -> None:
    """Raises InputError when the disk of `out` has fewer than `needed` bytes free."""
    check_rooms([(out, needed)])


def check_rooms(needs: Iterable[tuple[Path, int]]) -> None:
    """Raises InputError when a disk has fewer bytes free than all the places on it need together."""
    disks: dict[int, list[tuple[Path, int]]] = {}
    for place, needed in needs:
        disks.setdefault(_existing(place).stat().st_dev, []).append((place, needed))
    for found in disks.values():
        needed, free = sum(one for _, one in found), shutil.disk_usage(_existing(found[0][0])).free
        if free < needed:
            places = " and ".join(str(place) for place, _ in found)
            some, disk = ("needs", "its disk") if len(found) == 1 else ("need", "their disk")
            raise InputError(
                f"{places} {some} about {size(needed)}, but {disk} has {size(free)} free; choose another disk"
            )


def mend(out: Path) -> None:
    """Puts back what a process has moved out of the way, that was killed before it put its own in the place."""
    old = out.absolute().with_name(f".{out.name}.old")
    if old.exists() and not out.exists():
        old.rename(out)


class OutputFolder:
    """A context in which pieces of weights are written; `commit` puts the folder in place, leaving without it removes
    all. What a process that was killed has left is mended by the next one that makes the same folder.
    """

    def __init__(self, out: Path, overwrite: bool = False):
        check_destination(out, overwrite)
        self.out, self.overwrite = out.absolute(), overwrite
        self.partial, self._old = (self.out.with_name(f".{self.out.name}.{state}") for state in ("partial", "old"))
        self._pieces: list[Path] = []
        self._taken: set[Path] = set()
        self._held = ExitStack()

    def __enter__(self) -> OutputFolder:
        self._held.enter_context(locked(self.out))
        try:
            mend(self.out)
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
        """Puts the folder in place under its name, once all of it is on the disk.

        Raises FileExistsError when something is there that was not, and would be lost.
        """
        folder = self.out.is_dir() and not self.out.is_symlink()
        replaced = folder and self.overwrite
        if not replaced and (any(self.out.iterdir()) if folder else os.path.lexists(self.out)):
            why = "came to be during the run; move it away and give the same command again"
            raise FileExistsError(errno.EEXIST, why, str(self.out))
        sync_tree(self.partial)
        if replaced:
            self.out.rename(self._old)
        elif folder:
            self.out.rmdir()  # which fails where something has got into it since
        self.partial.rename(self.out)
        sync(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._held:
            if self.partial.exists():
                shutil.rmtree(self.partial, ignore_errors=True)
