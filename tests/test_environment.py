"""What the process does to its own memory."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gyroquant.environment import peak_memory_bytes, steady_memory


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells of a program's own peak")
def test_the_peak_is_this_programs_own_and_not_that_of_its_parent() -> None:
    large = torch.ones(200 << 20)  # 800 MB, more than importing takes
    code = "from gyroquant.environment import peak_memory_bytes; print(peak_memory_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak_memory_bytes() > large.nbytes
    assert 10e6 < child < large.nbytes


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has this setting")
def test_freed_blocks_go_back_to_the_system() -> None:
    assert steady_memory()
    before = resident_mb()
    blocks = [torch.ones(5 << 18) for _ in range(20)]  # 5 MB each
    held = resident_mb()
    kept = blocks[-1]
    del blocks
    assert held - before > 80
    assert resident_mb() - before < 30
    assert kept.sum() == 5 << 18
