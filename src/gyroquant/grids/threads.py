"""Compiled searches in several threads. Each one works on some of the vectors."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

WORTH_A_THREAD = 1 << 24  # numbers times candidates, some milliseconds of work: to wake a thread takes a tenth of one


def in_parts(work: Callable[[slice], None], count: int, threads: int) -> None:
    """Calls `work` with slices that cover range(count) without overlaps, each in a thread of its own.

    With several threads, it is first called with an empty slice, so that what it calls is compiled only once.
    """
    threads = min(threads, count)
    if threads < 2:
        work(slice(0, count))
        return
    work(slice(0, 0))
    parts = [slice(i * count // threads, (i + 1) * count // threads) for i in range(threads)]
    others = [_pool(threads - 1).submit(work, part) for part in parts[1:]]
    work(parts[0])
    for other in others:
        other.result()


_POOLS: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    """So many threads that are kept: a solver asks for a column at a time. A forked process has to make its own."""
    key = os.getpid(), threads
    if key not in _POOLS:
        _POOLS[key] = ThreadPoolExecutor(threads)
    return _POOLS[key]
