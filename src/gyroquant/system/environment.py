"""The machine: its devices and memory, and the versions and settings that a result depends on."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gyroquant.errors import InputError
from gyroquant.system.version import gyroquant_version

_M_MMAP_THRESHOLD = -3
_M_TRIM_THRESHOLD = -1
_LARGE = 4 << 20
_TRIM = 128 << 10  # the default of glibc
_reusing: list[bool] = []  # whether `reused_memory` is at work
_NEVER = 1 << 30  # more than any block that tuning allocates


def usable_device(name: str) -> torch.device:
    """The device of that name. Raises InputError if torch does not support it or the machine does not have it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"the device {name!r} cannot be used here: {reason[:200]}; leave it out, or take cpu"
        ) from error
    return device


def versions() -> dict[str, Any]:
    """Versions and settings that a 2-bit result depends on."""
    return {
        "gyroquant": gyroquant_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "numpy": version("numpy"),
        "platform": platform.platform(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def size(count: float) -> str:
    """A number of bytes as text, such as 1.20 GB, 345 MB, 6.7 kB or 890 bytes."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            digits = 2 if unit == "GB" else 0 if count >= 10 * one else 1
            return f"{count / one:.{digits}f} {unit}"
    return f"{count:.0f} bytes"


def peak_memory_bytes() -> int:
    """The largest resident memory of this process so far, in bytes; 0 if the system does not report it.

    On Linux it is read from /proc, because `getrusage` also counts the parent process before exec.
    """
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) * 1024
    try:
        import resource
    except ImportError:  # pragma: no cover - Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def forget_peak() -> bool:
    """Resets `peak_memory_bytes`, so that it counts from now on. Returns whether that worked; it does only on Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_memory_bytes() -> int:
    """The current resident memory of this process, in bytes; the largest so far if the system reports only that."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_memory_bytes()


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still get.

    This is the available memory of the machine, limited by the control groups of the process (of a container or a batch
    system). Without /proc it is all memory of the machine.
    """
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    meminfo = re.search(r"MemAvailable:\s+(\d+) kB", text) or re.search(r"MemTotal:\s+(\d+) kB", text)
    machine = [int(meminfo[1]) * 1024] if meminfo else []
    return min([*machine, *_left_by_groups(root)], default=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _left_by_groups(root: Path) -> Iterator[int]:
    """The bytes left in each control group of this process, version 1 or 2. Cached files count as free."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        inside = base / path.lstrip("/")
        for place in (inside, *inside.parents):
            try:
                limit, used = ((place / name).read_text().strip() for name in names)
                cached = re.search(
                    r"^(?:total_)?inactive_file (\d+)$", (place / "memory.stat").read_text(), re.MULTILINE
                )
                if limit != "max":
                    yield max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))
            except (OSError, ValueError):  # the root group has no limit; in a container the path may not exist
                pass
            if place == base:
                break


def steady_memory() -> bool:
    """Makes the allocator return large blocks of memory to the system when they are freed, until the process ends.

    By default, glibc raises the size above which it does so, up to 32 MB. Smaller blocks then leave holes in the heap,
    which grows by a tenth or more until the last block of a model. Returns whether it worked; it does only with glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE))


@contextmanager
def reused_memory() -> Iterator[None]:
    """Keeps freed memory in the process for the next allocation, and returns it to the system at the end.

    For loops that allocate the same large blocks again and again. Under `steady_memory`, the system clears all their
    pages anew in every iteration, which can take a quarter of the time of a step. Works only with glibc. Inside another
    such context it changes nothing.

    The heap may keep holes, without memory. A later block can lie in one, and its memory is then returned at the end of
    the next such context only.
    """
    if _reusing or platform.libc_ver()[0] != "glibc":
        yield
        return
    _reusing.append(True)
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _NEVER)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        _reusing.clear()
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.malloc_trim(0)


def native_bfloat16(device: torch.device) -> bool:
    """Whether the processor has instructions for bfloat16 matrix products, which make bfloat16 faster than fp32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    if device.type != "cpu":
        return False
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
