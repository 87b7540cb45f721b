"""Checksums find what changed, and sha256sum reads them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import saved_models
import tiny_models
import torch

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.models.stores.source import open_model
from gyroquant.system.checksums import CHECKSUM_FILE, Integrity, check, read_sums, unchecked, write_checksums

STRANGE = "with space\\and\nlines.txt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Some files, one below another folder, one with a name that has to be escaped, sealed."""
    place = tmp_path / "folder"
    (place / "b").mkdir(parents=True)
    (place / "a.bin").write_bytes(bytes(range(256)) * 9000)
    (place / "b" / "c.txt").write_text("c")
    (place / STRANGE).write_text("")
    write_checksums(place)
    return place


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as gyroquant writes it, sealed."""
    place = saved_models.rounded(tiny_models.build("llama"), tmp_path_factory.mktemp("saved") / "out").folder
    write_checksums(place)
    return place


def flip(path: Path, at: int = -3) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_what_is_sealed_is_intact(folder: Path) -> None:
    assert check(folder) == Integrity(3, 9000 * 256 + 1, (), (), ())
    assert list(read_sums(folder) or ()) == sorted(["a.bin", "b/c.txt", STRANGE])
    before = (folder / CHECKSUM_FILE).read_bytes()
    write_checksums(folder)  # its own list is no part of it
    assert (folder / CHECKSUM_FILE).read_bytes() == before


def test_a_list_whose_end_is_cut_off_is_no_list(folder: Path) -> None:
    path = write_checksums(folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(gq.InputError, match="SHA256SUMS ends in the middle of a line"):
        check(folder)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="coreutils' sha256sum is not installed")
def test_sha256sum_agrees(folder: Path) -> None:
    asked = ["sha256sum", "--check", "--strict", "--quiet", CHECKSUM_FILE]
    assert subprocess.run(asked, cwd=folder, capture_output=True, check=False).returncode == 0
    flip(folder / "a.bin")
    assert subprocess.run(asked, cwd=folder, capture_output=True, check=False).returncode == 1


def test_changes_are_told_apart(folder: Path) -> None:
    flip(folder / "a.bin", 1 << 20)
    (folder / "b" / "c.txt").unlink()
    (folder / "new").write_text("")
    found = check(folder)
    assert found == Integrity(3, 9000 * 256, ("b/c.txt",), ("a.bin",), ("new",))
    assert not found.intact
    assert check(folder / "b") is None


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("README.md", False),
        ("notes.txt", False),
        ("LICENSE", False),
        ("b/curve.PNG", False),
        (".cache/huggingface/x.json", False),
        (".openvino.partial/openvino_model.bin", False),
        ("model-00002-of-00002.safetensors", True),
        ("b/config.json", True),
        ("modeling_x.py", True),
        ("tokenizer.model", True),
        ("chat_template.jinja", True),
        ("merges.txt", True),
        ("vocab.txt", True),
        ("x.gguf", True),
        ("openvino_model.xml", True),
        ("model.onnx.data", True),
        ("blob", True),
    ],
)
def test_what_may_lie_beside_a_list(name: str, belongs: bool, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    found = check(folder)
    assert found is not None
    assert found.extra == (name,)
    assert found.unlisted == ((name,) if belongs else ())
    assert found.intact != belongs


def test_a_sealed_folder_below_is_looked_at_by_its_own_list(folder: Path) -> None:
    inner = folder / "export"
    inner.mkdir()
    (inner / "x").write_text("x")
    write_checksums(inner)
    assert check(folder) == Integrity(4, 9000 * 256 + 2, (), (), ())
    flip(inner / "x", 0)
    found = check(folder)
    assert found is not None
    assert (found.changed, found.extra) == (("export/x",), ())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("0" * 64 + "  ../outside\n", "outside"),
        ("0" * 64 + "  /etc/passwd\n", "outside"),
        ("0" * 63 + "  short\n", "line 1"),
        ("\xff\n", "line 1"),
    ],
)
def test_lists_that_are_no_lists_are_refused(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / CHECKSUM_FILE).write_text(text)
    with pytest.raises(InputError, match=why):
        check(tmp_path)


def test_damaged_weights_are_not_loaded(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    ids = torch.arange(8)[None]
    expected = gq.load(copy)(ids).logits
    flip(copy / "model.safetensors")
    for load in (gq.load, open_model):
        with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
            load(copy)
    from transformers import AutoModelForCausalLM

    with pytest.raises(InputError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(copy)
    gq.load(copy, check=False)
    with unchecked():
        open_model(copy)
    (copy / CHECKSUM_FILE).unlink()
    gq.load(copy)
    assert torch.equal(gq.load(out)(ids).logits, expected)


@pytest.mark.parametrize("lines", [slice(0, 0), slice(1, None)], ids=["emptied", "shortened"])
def test_weights_that_are_not_in_the_list_are_not_loaded(lines: slice, out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    listed = (copy / CHECKSUM_FILE).read_text().splitlines(keepends=True)
    listed.sort(key=lambda line: "model.safetensors" not in line)
    (copy / CHECKSUM_FILE).write_text("".join(listed[lines]))
    for load in (gq.load, open_model):
        with pytest.raises(InputError, match=r"model\.safetensors is not in SHA256SUMS"):
            load(copy)
    gq.load(copy, check=False)
    found = check(copy)
    assert found is not None
    assert "model.safetensors" in found.unlisted
    shutil.copy(out / CHECKSUM_FILE, copy / CHECKSUM_FILE)
    gq.load(copy)
    shutil.copy(copy / "model.safetensors", copy / "more.safetensors")
    with pytest.raises(InputError, match=r"more\.safetensors is not in SHA256SUMS"):
        gq.load(copy)


def test_other_files_do_not_matter_to_loading(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    (copy / "gyroquant.json").write_text("{}")
    gq.load(copy)
