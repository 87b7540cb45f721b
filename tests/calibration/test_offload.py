"""Tensors in files: what is written stays, and what is not looked at is not in memory."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from gyroquant.calibration.offload import Spilled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_comes_back_whatever_the_advice(dtype: torch.dtype, tmp_path: Path) -> None:
    spilled, wanted = Spilled(tmp_path / "new", (7, 3, 1000), dtype), torch.randn(7, 3, 1000).to(dtype)
    for row in range(7):
        spilled.ahead(row, row + 1)
        spilled.tensor[row] = wanted[row]
        spilled.behind(row, row + 1)
    spilled.ahead(5, 900)  # beyond the end
    spilled.ahead(900, 901)
    assert torch.equal(spilled.tensor, wanted)
    if sys.platform == "linux":
        assert spilled.path is not None
    if spilled.path is not None:
        assert spilled.path.read_bytes() == wanted.view(torch.uint8).numpy().tobytes()


def test_files_share_a_folder_and_go_with_their_tensors(tmp_path: Path) -> None:
    one, other = (Spilled(tmp_path, (2, 512), torch.float32) for _ in range(2))
    one.tensor.fill_(1)
    other.tensor.fill_(2)
    assert set(one.tensor.unique().tolist()) == {1}
    assert not list(tmp_path.iterdir())
    path = one.path
    del one
    if path is not None:
        assert not path.exists() or path.stat().st_size != 4096


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system keeps no room for files")
def test_a_disk_without_room_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def full(number: int, start: int, size: int) -> None:
        asked.append((start, size))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"No space left on device.*hidden"):
        Spilled(tmp_path / "hidden", (3, 5), torch.float32)
    assert asked == [(0, 60)]
    assert not list((tmp_path / "hidden").iterdir())


def resident() -> int:
    """Bytes of files in this process's memory."""
    found = re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what of files is in memory")
def test_what_is_behind_leaves_memory(tmp_path: Path) -> None:
    spilled = Spilled(tmp_path, (64, 1 << 20), torch.uint8)
    before = resident()
    for row in range(64):
        spilled.tensor[row] = row
        spilled.behind(row, row + 1)
    assert resident() - before < 16 << 20
    assert int(spilled.tensor[:, 0].long().sum()) == sum(range(64))
    assert resident() - before > 0
