"""Tensors that lie in a file and pass through memory a few rows at a time."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_ADVICE = {name: getattr(mmap, f"MADV_{name}", None) for name in ("WILLNEED", "DONTNEED")}


class Spilled:
    """A tensor in a file of its own in `folder`, memory-mapped. Rows that are `ahead` are read while others are worked
    on, rows that are `behind` leave memory; where the system takes no advice (Windows), it decides by itself.

    The file has no name, so that the system removes it when this object goes or the process dies, however it dies.
    `path` leads to it all the same where the system has such paths (Linux), for this process alone; elsewhere it is
    None. Raises OSError when the disk has no room for all of the tensor.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype):
        folder.mkdir(parents=True, exist_ok=True)
        rows, size = shape[0], int(torch.Size(shape[1:]).numel()) * dtype.itemsize
        self._row = size
        file = tempfile.TemporaryFile(prefix=".gyroquant-", suffix=".bin", dir=folder)  # noqa: SIM115
        weakref.finalize(self, file.close)
        _reserve(file.fileno(), rows * size, folder)
        self._bytes = np.memmap(file, np.uint8, "r+", shape=(rows * size,))
        self.path = _path_of(file.fileno())
        self.tensor: Tensor = torch.from_numpy(self._bytes).view(dtype).view(shape)

    def ahead(self, start: int, stop: int) -> None:
        """Rows start..stop are needed next."""
        self._advise("WILLNEED", start, min(stop, len(self.tensor)))

    def behind(self, start: int, stop: int) -> None:
        """Rows start..stop are not needed for a while; what was written to them goes to the file."""
        self._advise("DONTNEED", start, stop)

    def _advise(self, what: str, start: int, stop: int) -> None:
        advice, mapped = _ADVICE[what], getattr(self._bytes, "_mmap", None)
        first = -(-start * self._row // mmap.PAGESIZE) * mmap.PAGESIZE
        length = min(stop * self._row, len(self._bytes)) - first
        if advice is not None and mapped is not None and length > 0:
            mapped.madvise(advice, first, length)


def _reserve(number: int, size: int, folder: Path) -> None:
    """Has the disk of `folder` keep room for an open file: where it is lacking later, a signal ends the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(number, 0, size)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that keeps none
            raise OSError(error.errno, os.strerror(error.errno or 0), str(folder)) from error


def _path_of(number: int) -> Path | None:
    """A path to a file that this process has open under this number, whether or not it has a name."""
    path = Path(f"/proc/self/fd/{number}")
    try:
        path.open("r+b").close()
    except OSError:
        return None
    return path
