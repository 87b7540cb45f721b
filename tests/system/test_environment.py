"""What the process does to its own memory."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gyroquant.system.environment import (
    available_memory,
    forget_peak,
    peak_memory_bytes,
    resident_memory_bytes,
    size,
)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells of a program's own peak")
def test_the_peak_is_this_programs_own_and_not_that_of_its_parent() -> None:
    large = torch.ones(200 << 20)  # 800 MB, more than importing takes
    code = "from gyroquant.system.environment import peak_memory_bytes; print(peak_memory_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak_memory_bytes() > large.nbytes
    assert 10e6 < child < large.nbytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has this setting")
def test_freed_blocks_go_back_to_the_system() -> None:
    """In a process of its own: other tests leave threads and holes in the heap of this one."""
    code = """
import json, torch
from gyroquant.system.environment import resident_memory_bytes, steady_memory
torch.ones(10)
assert steady_memory()
sizes = [resident_memory_bytes()]
blocks = [torch.ones(5 << 18) for _ in range(20)]  # 5 MB each
sizes.append(resident_memory_bytes())
kept = blocks[-1]
del blocks
sizes.append(resident_memory_bytes())
assert kept.sum() == 5 << 18
print(json.dumps(sizes))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, held, after = json.loads(done.stdout)
    assert held - before > 80e6
    assert after - before < 30e6


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has this setting")
def test_freed_blocks_can_be_reused_until_the_end_of_a_loop() -> None:
    """In a process of its own: the heap of this one has holes where other tests left something."""
    code = """
import json, resource, torch
from gyroquant.system.environment import resident_memory_bytes, reused_memory, steady_memory
steady_memory()
sizes = [resident_memory_bytes()]
with reused_memory():
    torch.ones(25 << 18)  # 26 MB
    with reused_memory():  # one inside another ends nothing
        sizes.append(resident_memory_bytes())
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(25 << 18)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
sizes.append(resident_memory_bytes())
block = torch.ones(25 << 18)  # perhaps in a hole of the heap, which stays in the process
del block
with reused_memory():
    pass
print(json.dumps([*sizes, resident_memory_bytes(), faults]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, kept, after, last, faults = json.loads(done.stdout)
    assert kept - before > 20e6
    # 20 times 26 MB are 128,000 pages. The allocator may take a new block up to seven times, until its cache of small
    # pieces is full.
    assert faults < 50_000
    assert after - before < 10e6
    assert last - before < 10e6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux lets a process forget its peak")
def test_a_peak_can_be_forgotten() -> None:
    large = torch.ones(50 << 20)
    before = peak_memory_bytes()
    del large
    if not forget_peak():
        pytest.skip("this system does not let a process forget its peak")
    assert peak_memory_bytes() < before - 100e6
    assert abs(resident_memory_bytes() - peak_memory_bytes()) < 50e6


def tree(root: Path, **files: str) -> Path:
    """A file system with these files, dots in their names for slashes that double underscores stand for."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MACHINE = "MemTotal: 16000 kB\nMemFree: 1 kB\nMemAvailable: 8000 kB\n"
V2, V1 = "sys__fs__cgroup__", "sys__fs__cgroup__memory__"


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 8000 * 1024),
        ({"proc__self__cgroup": "0::/\n"}, 8000 * 1024),
        (  # a container: its own group is the root that it sees
            {
                "proc__self__cgroup": "0::/\n",
                f"{V2}memory_DOT_max": "5000000\n",
                f"{V2}memory_DOT_current": "4000000\n",
                f"{V2}memory_DOT_stat": "anon 1\ninactive_file 500000\n",
            },
            1_500_000,
        ),
        (  # the narrowest of nested groups counts
            {
                "proc__self__cgroup": "0::/batch/job\n",
                f"{V2}batch__memory_DOT_max": "1000000\n",
                f"{V2}batch__memory_DOT_current": "100000\n",
                f"{V2}batch__memory_DOT_stat": "",
                f"{V2}batch__job__memory_DOT_max": "max\n",
                f"{V2}batch__job__memory_DOT_current": "100000\n",
                f"{V2}batch__job__memory_DOT_stat": "",
            },
            900_000,
        ),
        (
            {
                "proc__self__cgroup": "9:name=systemd:/\n4:memory:/job\n0::/\n",
                f"{V1}job__memory_DOT_limit_in_bytes": "3000000\n",
                f"{V1}job__memory_DOT_usage_in_bytes": "3500000\n",
                f"{V1}job__memory_DOT_stat": "total_inactive_file 1000000\n",
            },
            500_000,
        ),
        (
            {
                "proc__self__cgroup": "4:cpu,memory:/gone\n",
                f"{V1}memory_DOT_limit_in_bytes": f"{2**63 - 4096}\n",
                f"{V1}memory_DOT_usage_in_bytes": "3500000\n",
                f"{V1}memory_DOT_stat": "",
            },
            8000 * 1024,
        ),
    ],
)
def test_memory_that_is_left(files: dict[str, str], available: int, tmp_path: Path) -> None:
    assert available_memory(tree(tmp_path, proc__meminfo=MACHINE, **files)) == available


def test_a_machine_without_proc_has_all_its_memory(tmp_path: Path) -> None:
    assert available_memory(tmp_path) > 10**8


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (4200, "4.2 kB"), (91e6, "91 MB"), (9.14e6, "9.1 MB"), (1.5e9, "1.50 GB")],
)
def test_bytes_are_told_in_a_unit_that_says_something(count: float, text: str) -> None:
    assert size(count) == text
