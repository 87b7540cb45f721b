"""Tensors that lie in a file and pass through memory a few rows at a time."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_ADVICE = {name: getattr(mmap, f"MADV_{name}", None) for name in ("WILLNEED", "DONTNEED")}


class Spilled:
    """A tensor in a new file, memory-mapped. Rows that are `ahead` are read while others are worked on, rows that are
    `behind` leave memory; where the system takes no advice (Windows), it decides by itself.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        rows, size = shape[0], int(torch.Size(shape[1:]).numel()) * dtype.itemsize
        self._row = size
        self._bytes = np.memmap(path, np.uint8, "w+", shape=(rows * size,))
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
