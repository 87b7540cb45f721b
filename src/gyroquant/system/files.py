"""Writes files atomically: after an interruption a file is complete or absent. Also locks for one writer at a time."""

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
_UMASK = os.umask(0)  # the system returns the mask only when it is set
os.umask(_UMASK)


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders, and flushes their names itself
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes everything in a folder to the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync(path)


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder and its parents, and flushes their names. Returns the new folders, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync(path.parent)
    return missing


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with the permissions of the umask. Raises OSError if the disk is full or fails."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, None if metadata is None else dict(metadata))
    except SafetensorError as error:  # safetensors reports a full disk in this form
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(0o666 & ~_UMASK)


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` make a file under a temporary name, flushes it to the disk, and then renames it to `path`."""
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
    """Writes a JSON file with `put`."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    put(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def put_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with `put`."""
    put(path, lambda partial: save_tensors(tensors, partial, metadata))


def file_digest(path: Path, note: Callable[[], None] = lambda: None) -> str:
    """The sha256 of a file. It is read in pieces of a megabyte; `note` is called after each."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
            note()
    return digest.hexdigest()


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds the lock for writing `out`, a folder or a file. The system releases the lock if the process dies.

    A thread may hold it more than once. Folders that were made for the lock are removed afterwards if they are empty.
    Raises InputError if another process holds the lock.
    """
    path = out.absolute().with_name(f".{out.name}.lock")
    new_folders = make_folder(path.parent)
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"another run writes {out}: wait for it, or choose another name") from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # Windows cannot delete an open file
                path.unlink()
        lock.release()
        for folder in new_folders:
            with suppress(OSError):
                folder.rmdir()
