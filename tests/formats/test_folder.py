"""The output folder appears whole or not at all."""

import errno
import shutil
import struct
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.formats import output_folder as module
from gyroquant.formats.output_folder import OutputFolder, check_destination, check_room, check_rooms, left_behind
from gyroquant.formats.shards import merge, write_piece
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.pipeline.resources import check_fits
from gyroquant.pipeline.sizes import expected_bytes
from gyroquant.system import files as written


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


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_came_to_be_meanwhile_is_not_replaced(kind: str, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    other.mkdir()
    out.mkdir()  # empty, so that it may become the destination
    with pytest.raises(FileExistsError, match="was created during the run") as error, OutputFolder(out) as folder:
        folder.json("new", {})
        if kind == "folder":
            (out / "mine").write_text("mine")
        else:
            out.rmdir()
            out.write_text("mine") if kind == "file" else out.symlink_to(other)
        folder.commit()
    assert error.value.filename == str(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    if kind == "link":
        assert out.readlink() == other
    else:
        assert (out / "mine" if kind == "folder" else out).read_text() == "mine"


def test_what_comes_to_be_at_the_last_moment_is_not_replaced_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(module, "sync_tree", lambda folder: (out / "mine").write_text("mine"))
    with pytest.raises(OSError, match="out"), OutputFolder(out) as folder:
        folder.commit()
    assert (out / "mine").read_text() == "mine"


def test_an_empty_folder_becomes_the_destination(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with OutputFolder(out) as folder:
        folder.json("new", {})
        folder.commit()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def free(monkeypatch: pytest.MonkeyPatch, place: Path, count: int) -> None:
    """Has every disk say that it has so many bytes free."""
    usage = shutil.disk_usage(place)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda asked: usage._replace(free=count))


def test_a_small_disk_is_noticed_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    free(monkeypatch, tmp_path, 1000)
    with pytest.raises(InputError, match=r"out needs about 12 MB, but its disk has 1\.0 kB free; choose"):
        check_room(tmp_path / "out", 12_345_678)
    with pytest.raises(InputError, match=r"needs about \d+ kB, but its disk has 1\.0 kB free"):
        prepare(folders["llama"], tmp_path / "out", gq.load_recipe("rtn", ["weights.group_size=16"]))


def test_places_on_one_disk_need_room_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free(monkeypatch, tmp_path, 1000)
    one, other = tmp_path / "new" / "out", tmp_path / "hidden"
    check_rooms([(one, 900), (other, 100)])
    with pytest.raises(InputError, match=r"out and .*hidden need about 1\.1 kB, but their disk has 1\.0 kB free"):
        check_rooms([(one, 900), (other, 200)])
    if Path("/proc").exists():  # another disk
        check_rooms([(one, 900), (Path("/proc"), 200)])


def test_what_a_run_before_has_left_is_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    recipe = gq.load_recipe("rtn", ["weights.group_size=16"])
    free(monkeypatch, tmp_path, expected_bytes(prepare(folders["llama"], tmp_path / "out", recipe)))
    with pytest.raises(InputError, match="free; choose another disk"):
        prepare(folders["llama"], tmp_path / "out", recipe)
    for state, count in (("journal", 100), ("partial", 20)):
        (tmp_path / f".out.{state}" / "logs").mkdir(parents=True)
        (tmp_path / f".out.{state}" / "logs" / "x").write_bytes(bytes(count << 10))
    (tmp_path / ".other.journal").mkdir()
    (tmp_path / ".other.journal" / "x").write_bytes(bytes(1 << 10))
    assert left_behind(tmp_path / "out") == 120 << 10
    check_fits(prepare(folders["llama"], tmp_path / "out", recipe))


def test_a_disk_that_fills_up_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    calls = 0
    original = written.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None) -> None:
        nonlocal calls
        calls += 1
        original(tensors, path, metadata)
        if calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(written, "save_file", full)
    recipe = gq.load_recipe("rtn", ["weights.group_size=16"])
    with pytest.raises(OSError, match="No space left") as error:
        pipeline.run(prepare(folders["llama"], tmp_path / "out", recipe))
    assert error.value.kept == tmp_path / ".out.journal"  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]
    pipeline.run(prepare(folders["llama"], tmp_path / "out", recipe))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert calls == 2 + tiny_models.build("llama").config.num_hidden_layers  # all but the one group that was done


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
