"""Files that are there whole or not at all, whatever happens while they are written, and one writer at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gyroquant.errors import InputError

_CHUNK = 1 << 20
_UMASK = os.umask(0)  # which can be asked for only by setting it
os.umask(_UMASK)


def sync(path: Path) -> None:
    """Has the system put a file, or the names in a folder, on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders, and keeps their names by itself
    number = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def sync_tree(folder: Path) -> None:
    """Has the system put everything in a folder on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder and those that it lies in, their names on the disk; returns the new ones, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)
    return missing


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with the mode that other files get. Raises OSError for what goes wrong on the disk."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # how safetensors tells of a full disk
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(0o666 & ~_UMASK)


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file under another name, sees it on the disk, and only then gives it its own name."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def put_json(path: Path, data: Any) -> None:
    """Writes JSON as `put` does."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    put(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def put_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file as `put` does."""
    put(path, lambda partial: save_tensors(tensors, partial, metadata))


def file_digest(path: Path, note: Callable[[], None] = lambda: None) -> str:
    """sha256 of a file, read a megabyte at a time; `note` is called after each."""
    digest, room = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(room)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
            note()
    return digest.hexdigest()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the right to write `out`, a folder or a file. The system takes it back from a process that dies.

    May be held more than once by the same thread. Folders that are made for it go when nothing is in them behind it.
    Raises InputError when another process holds it.
    """
    path = out.absolute().with_name(f".{out.name}.lock")
    made = make_folder(path.parent)
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another run writes {out}: wait for it, or choose another name") from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # Windows deletes no file that is open
                path.unlink()
        lock.release()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
