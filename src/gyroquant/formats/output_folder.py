"""The output folder. It is built under another name, and moved to its own name only when it is complete."""

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

from gyroquant.errors import InputError
from gyroquant.formats.shards import merge, merge_torch, write_piece
from gyroquant.system.environment import size
from gyroquant.system.files import locked, sync, sync_tree


def check_destination(out: Path, overwrite: bool = False, keep: Iterable[Path] = ()) -> None:
    """Raises InputError if `out` cannot become an output folder: it is not empty, or it cannot be written.

    With `overwrite`, an existing folder is replaced, unless it contains one of `keep` (what the run reads) or the
    current directory: replacing it would delete these.
    """
    try:
        if out.is_symlink():
            raise InputError(f"{out} is a symbolic link; give the folder that it points to, or another name")
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; give the name of a folder that does not exist yet")
        if out.is_dir() and any(out.iterdir()):
            if not overwrite:
                raise InputError(f"{out} exists and is not empty; choose another name, or replace it with --overwrite")
            for place in (*keep, Path.cwd()):
                for path in (place.resolve(), place.parent.resolve() / place.name):  # a link's target, and the link
                    if path.is_relative_to(out.resolve()):
                        raise InputError(f"{out} holds {place}, which replacing it would delete; choose another name")
    except OSError as error:
        raise InputError(f"{str(out)[:200]} cannot be written: {error.strerror}; choose another name") from error
    check_writable(out.absolute().parent, out)


def check_writable(folder: Path, what: Path | None = None) -> None:
    """Raises InputError if `folder` is not a writable folder and cannot be created as one.

    `what` is the path that the message names. Default: `folder`.
    """
    what = folder if what is None else what
    try:
        existing = _existing(folder)
    except OSError as error:
        raise InputError(f"{str(what)[:200]} cannot be written: {error.strerror}; choose another name") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{what} cannot be written: {existing} is not a writable folder")


def _existing(place: Path) -> Path:
    """A path, or the innermost of its parents that exists."""
    place = place.absolute()
    return next(path for path in (place, *place.parents) if path.exists())


def left_behind(out: Path) -> int:
    """Bytes that an earlier run left next to `out`. The next run continues from them or removes them."""
    total = 0
    for state in ("journal", "partial"):
        with suppress(OSError):  # another run may delete files at the same time
            for path in out.absolute().with_name(f".{out.name}.{state}").rglob("*"):
                total += path.stat().st_size if path.is_file() else 0
    return total


def check_room(out: Path, needed: int) -> None:
    """Raises InputError if the disk of `out` has fewer than `needed` bytes free."""
    check_rooms([(out, needed)])


def check_rooms(needs: Iterable[tuple[Path, int]]) -> None:
    """Raises InputError if a disk has fewer bytes free than all the paths on it need together."""
    disks: dict[int, list[tuple[Path, int]]] = {}
    for place, needed in needs:
        disks.setdefault(_existing(place).stat().st_dev, []).append((place, needed))
    for on_disk in disks.values():
        needed, free = sum(count for _, count in on_disk), shutil.disk_usage(_existing(on_disk[0][0])).free
        if free < needed:
            places = " and ".join(str(place) for place, _ in on_disk)
            verb, disk = ("needs", "its disk") if len(on_disk) == 1 else ("need", "their disk")
            raise InputError(
                f"{places} {verb} about {size(needed)}, but {disk} has {size(free)} free; choose another disk"
            )


def recover(out: Path) -> None:
    """Restores the old folder if a process was killed after it moved that away and before it moved the new one in."""
    old = out.absolute().with_name(f".{out.name}.old")
    if old.exists() and not out.exists():
        old.rename(out)


class OutputFolder:
    """A context in which pieces of weights are written. `commit` moves the folder to its name. Leaving the context
    without `commit` removes everything. The next process that writes the same folder cleans up after a killed one.
    """

    def __init__(self, out: Path, overwrite: bool = False):
        check_destination(out, overwrite)
        self.out, self.overwrite = out.absolute(), overwrite
        self.partial, self._old = (self.out.with_name(f".{self.out.name}.{state}") for state in ("partial", "old"))
        self._pieces: list[Path] = []
        self._external: set[Path] = set()
        self._lock = ExitStack()

    def __enter__(self) -> OutputFolder:
        self._lock.enter_context(locked(self.out))
        try:
            recover(self.out)
            shutil.rmtree(self._old, ignore_errors=True)
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
        except BaseException:
            self._lock.close()
            raise
        return self

    def add_piece(self, piece: Path) -> None:
        """Adds a piece that is a file outside the folder. That file is not deleted."""
        self._pieces.append(piece)
        self._external.add(piece)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Writes tensors to a new piece. They do not have to stay in memory."""
        path = self.partial / f"piece-{len(self._pieces):05d}"
        write_piece(path, tensors)
        self._pieces.append(path)

    def json(self, name: str, data: Any) -> None:
        """Writes a JSON file into the folder."""
        (self.partial / name).write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def merge(self) -> None:
        """Joins the pieces into the folder's safetensors files."""
        merge(self._pieces, self.partial, keep=self._external)
        self._pieces = []

    def torch_file(self, name: str, aliases: Mapping[str, str]) -> None:
        """Joins the pieces into one file for `torch.load`. `aliases` maps extra names to the tensors they repeat."""
        merge_torch(self._pieces, self.partial / name, aliases)
        self._pieces = []

    def commit(self) -> None:
        """Moves the folder to its name, after all of it is on the disk.

        Raises FileExistsError if something has appeared under that name during the run and would be lost.
        """
        folder = self.out.is_dir() and not self.out.is_symlink()
        replaced = folder and self.overwrite
        if not replaced and (any(self.out.iterdir()) if folder else os.path.lexists(self.out)):
            why = "was created during the run; move it away and run the same command again"
            raise FileExistsError(errno.EEXIST, why, str(self.out))
        sync_tree(self.partial)
        if replaced:
            self.out.rename(self._old)
        elif folder:
            self.out.rmdir()  # fails if something has been written into it since
        self.partial.rename(self.out)
        sync(self.out.parent)
        shutil.rmtree(self._old, ignore_errors=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            if self.partial.exists():
                shutil.rmtree(self.partial, ignore_errors=True)
