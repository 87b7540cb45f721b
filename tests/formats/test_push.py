"""Folders are pushed to a hub, which here is a small local server that speaks its protocol."""

from __future__ import annotations

from pathlib import Path

import pytest
import saved_models
import tiny_models
from fake_hub import FakeHub
from huggingface_hub import constants

import gyroquant as gq
from gyroquant.formats.push import check_push
from gyroquant.system.checksums import check


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `quantize` writes it."""
    return saved_models.rounded(tiny_models.build("llama"), tmp_path_factory.mktemp("push") / "ours").folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_becomes_a_private_repository(folder: Path, hub: FakeHub, tmp_path: Path) -> None:
    assert gq.push(folder, "tiny-w4") == f"{hub.endpoint}/me/tiny-w4"
    repository = hub.repositories["me/tiny-w4"]
    assert repository["private"]
    files = {name: data for name, data in repository["files"].items() if name != ".gitattributes"}
    assert files == content(folder)
    assert {"README.md", "gyroquant.json", "SHA256SUMS"} <= files.keys()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    integrity = check(tmp_path)
    assert integrity is not None
    assert integrity.intact


def test_a_second_push_replaces_the_files(folder: Path, hub: FakeHub) -> None:
    gq.push(folder, "lab/tiny", public=True)
    repository = hub.repositories["lab/tiny"]
    assert not repository["private"]
    repository["files"]["model-00001-of-00002.safetensors"] = b"of an earlier push"
    gq.push(folder, "lab/tiny", public=True)
    assert {name for name in repository["files"] if name != ".gitattributes"} == content(folder).keys()


@pytest.mark.parametrize(
    ("name", "public", "files", "private", "reason"),
    [
        ("a b", False, None, True, "'a b' is not a name on the hub .*; use OWNER/NAME"),
        ("other/x", False, None, True, "the token of me cannot write to other; use one of me, lab"),
        ("x", False, ["gyroquant.json"], False, "me/x exists and is public; add --public"),
        ("x", True, ["gyroquant.json"], True, "me/x exists and is private; leave out --public"),
        ("x", False, ["pytorch_model.bin"], True, "me/x holds files that gyroquant did not write"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_any_work(
    name: str, public: bool, files: list[str] | None, private: bool, reason: str, hub: FakeHub
) -> None:
    if files is not None:
        hub.repositories[f"me/{name}"] = {"private": private, "files": dict.fromkeys(files, b"")}
    with pytest.raises(gq.InputError, match=reason):
        check_push(name, public)
    assert not any(request.startswith("POST") for request in hub.requests)


def test_a_repository_of_ours_or_an_empty_one_is_taken(hub: FakeHub) -> None:
    for files in ([".gitattributes"], ["gyroquant_export.json", "model.gguf"]):
        hub.repositories["me/x"] = {"private": True, "files": dict.fromkeys(files, b"")}
        assert check_push("x") == "me/x"
    assert check_push("lab/new") == "lab/new"


def test_a_push_needs_a_token_that_may_write(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.role = "read"
    with pytest.raises(gq.InputError, match="needs a token that may write; this one may only read"):
        check_push("x")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(gq.InputError, match="the hub does not accept the token"):
        check_push("x")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(gq.InputError, match="run `hf auth login`, or set HF_TOKEN"):
        check_push("x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(gq.InputError, match="HF_HUB_OFFLINE is set; unset it"):
        check_push("x")


@pytest.mark.parametrize("part", ["/create", "/preupload/", "/commit/"])
def test_a_push_that_fails_says_how_to_push_again(part: str, folder: Path, hub: FakeHub) -> None:
    before = content(folder)
    hub.refuses = part
    with pytest.raises(gq.InputError) as caught:
        gq.push(folder, "x", public=True)
    said = str(caught.value)
    assert said.startswith(f"{folder} was not pushed to x: ")
    assert said.endswith(f"The folder is complete; run `gyroquant push {folder} x --public` to push it again")
    assert content(folder) == before
    hub.refuses = ""
    gq.push(folder, "x", public=True)
    assert hub.repositories["me/x"]["files"]["SHA256SUMS"] == before["SHA256SUMS"]


def test_only_intact_folders_of_ours_are_pushed(folder: Path, hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(gq.InputError, match="is not a folder that gyroquant wrote"):
        gq.push(tmp_path, "x")
    for name, data in content(folder).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "README.md").write_text("another card")
    with pytest.raises(gq.InputError, match="differs from its SHA256SUMS: `gyroquant verify"):
        gq.push(tmp_path, "x")
    assert not hub.requests
