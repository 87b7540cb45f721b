"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open

from gyroquant.system import files


def test_tensors_get_the_mode_of_other_files_and_a_full_disk_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.write_text("")
    files.save_tensors({"a": torch.eye(3).T}, tmp_path / "a", {"mark": "x"})
    assert (tmp_path / "a").stat().st_mode == other.stat().st_mode
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert file.metadata() == {"mark": "x"}

    def full(*asked: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left") as found:
        files.save_tensors({}, tmp_path / "b")
    assert found.value.errno == errno.ENOSPC
    assert found.value.filename == str(tmp_path / "b")


def test_folders_that_a_lock_has_made_go_with_it_unless_something_is_in_them(tmp_path: Path) -> None:
    with files.locked(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())
    with files.locked(tmp_path / "a" / "b" / "out"):
        (tmp_path / "a" / "kept").write_text("")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_new_folders_are_on_the_disk_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync", synced.append)
    assert files.make_folder(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
    assert synced == [tmp_path / "a", tmp_path]
    assert files.make_folder(tmp_path / "a") == []
