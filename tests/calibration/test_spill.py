"""Tensors in files: what is written stays, and what is not looked at is not in memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from gyroquant.calibration.spill import Spilled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_comes_back_whatever_the_advice(dtype: torch.dtype, tmp_path: Path) -> None:
    spilled, wanted = Spilled(tmp_path / "new" / "x.bin", (7, 3, 1000), dtype), torch.randn(7, 3, 1000).to(dtype)
    for row in range(7):
        spilled.ahead(row, row + 1)
        spilled.tensor[row] = wanted[row]
        spilled.behind(row, row + 1)
    spilled.ahead(5, 900)  # beyond the end
    spilled.ahead(900, 901)
    assert torch.equal(spilled.tensor, wanted)
    assert (tmp_path / "new" / "x.bin").read_bytes() == wanted.view(torch.uint8).numpy().tobytes()


def resident() -> int:
    """Bytes of files in this process's memory."""
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what of files is in memory")
def test_what_is_behind_leaves_memory(tmp_path: Path) -> None:
    spilled = Spilled(tmp_path / "x.bin", (64, 1 << 20), torch.uint8)
    before = resident()
    for row in range(64):
        spilled.tensor[row] = row
        spilled.behind(row, row + 1)
    assert resident() - before < 16 << 20
    assert int(spilled.tensor[:, 0].long().sum()) == sum(range(64))
    assert resident() - before > 0
