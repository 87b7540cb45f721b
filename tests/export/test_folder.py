"""The output folder appears whole or not at all."""

import errno
import shutil
import struct
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import gyroquant as gq
from gyroquant import journal, pipeline
from gyroquant.errors import InputError
from gyroquant.export import folder as module
from gyroquant.export.folder import OutputFolder, check_destination, check_room
from gyroquant.export.shards import merge, write_piece
from gyroquant.job import prepare


def test_pieces_become_one_file_or_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i + 1, 3).to(dtype) for i, dtype in enumerate([torch.float32, torch.float16] * 3)}
    for limit, files in ((10**9, 1), (60, 3)):
        place = tmp_path / str(limit)
        place.mkdir()
        pieces = []
        for i, name in enumerate(tensors):
            pieces.append(place / f"piece-{i}")
            write_piece(pieces[-1], {name: tensors[name]})
        merge(pieces, place, max_bytes=limit)
        assert not any(piece.exists() for piece in pieces)
        found = sorted(place.glob("*.safetensors"))
        assert len(found) >= files
        assert (place / "model.safetensors.index.json").exists() == (len(found) > 1)
        joined = {k: v for file in found for k, v in load_file(file).items()}
        assert joined.keys() == tensors.keys()
        assert all(torch.equal(joined[k], tensors[k]) for k in tensors)
        for file in found:  # headers stay aligned, as readers that map files expect
            (length,) = struct.unpack("<Q", file.read_bytes()[:8])
            assert length % 8 == 0


def test_merged_files_are_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(4, dtype=torch.uint8)}
    write_piece(tmp_path / "p", tensors)
    merge([tmp_path / "p"], tmp_path)
    save_file(tensors, tmp_path / "direct.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(tmp_path / "direct.safetensors").keys()


def test_a_commit_puts_everything_in_place(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "a" / "out") as folder:
        folder.add({"x": torch.ones(2)})
        folder.json("note.json", {"ä": 1})
        folder.merge()
        assert not (tmp_path / "a" / "out").exists()
        folder.commit()
    assert sorted(p.name for p in (tmp_path / "a" / "out").iterdir()) == ["model.safetensors", "note.json"]
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_nothing_is_left_after_an_error(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), OutputFolder(tmp_path / "out") as folder:
        folder.add({"x": torch.ones(2)})
        raise error
    assert not list(tmp_path.iterdir())


def test_replacing_happens_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(InputError, match="not empty; choose another name, or replace it with --overwrite"):
        OutputFolder(out)
    with pytest.raises(RuntimeError), OutputFolder(out, overwrite=True) as folder:
        folder.add({"x": torch.ones(2)})
        raise RuntimeError
    assert (out / "old").exists()
    with OutputFolder(out, overwrite=True) as folder:
        folder.json("new", {})
        assert (out / "old").exists()
        folder.commit()
    assert [p.name for p in out.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_destinations_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        check_destination(tmp_path / "file")
    with pytest.raises(InputError, match="not a writable folder"):
        check_destination(tmp_path / "file" / "out")
    monkeypatch.setattr(module.os, "access", lambda *args: False)
    with pytest.raises(InputError, match="not a writable folder"):
        check_destination(tmp_path / "out")


def test_a_small_disk_is_noticed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda place: usage._replace(free=1000))
    with pytest.raises(InputError, match="has 0 MB free; choose another disk"):
        check_room(tmp_path / "out", 10**6)
    with pytest.raises(InputError, match="MB free"):
        prepare(folders["llama"], tmp_path / "out", gq.load_recipe("rtn", ["weights.group_size=16"]))


def test_a_disk_that_fills_up_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    calls = 0
    original = journal.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal calls
        calls += 1
        original(tensors, path)
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(journal, "save_file", full)
    recipe = gq.load_recipe("rtn", ["weights.group_size=16"])
    with pytest.raises(OSError, match="No space left") as error:
        pipeline.run(prepare(folders["llama"], tmp_path / "out", recipe))
    assert error.value.kept == tmp_path / ".out.journal"  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]
    pipeline.run(prepare(folders["llama"], tmp_path / "out", recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert calls == 2 + tiny.build("llama").config.num_hidden_layers  # all but the one group that was done


def test_a_replacement_that_was_killed_half_way_is_mended(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "kept").write_text("kept")
    (tmp_path / ".out.partial").mkdir()
    with OutputFolder(tmp_path / "out", overwrite=True) as folder:
        assert (tmp_path / "out" / "kept").exists()
        folder.json("new", {})
        folder.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]
