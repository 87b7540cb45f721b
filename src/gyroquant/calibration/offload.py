"""Tensors in files, of which only a few rows are in memory at a time."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_ADVICE = {name: getattr(mmap, f"MADV_{name}", None) for name in ("WILLNEED", "DONTNEED")}


class Spilled:
    """A tensor in a file of its own in `folder`, memory-mapped.

    `ahead` asks the system to read rows that are needed next, `behind` to release rows that are no longer needed. On a
    system without such requests (Windows), the system decides.

    The file has no name, so the system removes it when this object is deleted or the process ends, however it ends. On
    Linux, `path` leads to the file, for this process only; on other systems it is None. Raises OSError if the disk has
    no room for the whole tensor.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype):
        folder.mkdir(parents=True, exist_ok=True)
        rows, size = shape[0], prod(shape[1:]) * dtype.itemsize
        self._row = size
        file = tempfile.TemporaryFile(prefix=".gyroquant-", suffix=".bin", dir=folder)  # noqa: SIM115
        weakref.finalize(self, file.close)
        _reserve(file.fileno(), rows * size, folder)
        self._bytes = np.memmap(file, np.uint8, "r+", shape=(rows * size,))
        self.path = _path_of(file.fileno())
        self.tensor: Tensor = torch.from_numpy(self._bytes).view(dtype).view(shape)

    def ahead(self, start: int, stop: int) -> None:
        """Requests rows start to stop, which are needed next."""
        self._advise("WILLNEED", start, min(stop, len(self.tensor)))

    def behind(self, start: int, stop: int) -> None:
        """Releases rows start to stop, which are not needed soon. What was written to them goes to the file."""
        self._advise("DONTNEED", start, stop)

    def _advise(self, request: str, start: int, stop: int) -> None:
        advice, mapped = _ADVICE[request], getattr(self._bytes, "_mmap", None)
        first = -(-start * self._row // mmap.PAGESIZE) * mmap.PAGESIZE
        length = min(stop * self._row, len(self._bytes)) - first
        if advice is not None and mapped is not None and length > 0:
            mapped.madvise(advice, first, length)


def _reserve(number: int, size: int, folder: Path) -> None:
    """Reserves disk room in `folder` for an open file. Without it, a full disk would end the process by a signal."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(number, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system cannot reserve room
            raise OSError(error.errno, os.strerror(error.errno or 0), str(folder)) from error


def _path_of(number: int) -> Path | None:
    """A path to a file that this process has open under this number, even if the file has no name. None without one."""
    path = Path(f"/proc/self/fd/{number}")
    try:
        path.open("r+b").close()
    except OSError:
        return None
    return path
