"""`--push` and `gyroquant push`, to a small local server that speaks the hub's protocol."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from fake_hub import FakeHub

from gyroquant.cli import main

Captured = pytest.CaptureFixture[str]


def inside(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["gyroquant", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def quantize(model: Path, out: Path, *more: object) -> list[object]:
    return ["quantize", model, out, "--recipe", "rtn-w4", "--set", "weights.group_size=32", *more]


def test_results_are_pushed(
    folders: dict[str, Path], tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    assert inside(monkeypatch, *quantize(folders["llama"], out, "--push", "lab/tiny")) == 0
    assert f"pushed to {hub.endpoint}/lab/tiny\n" in capfd.readouterr().out
    assert hub.repositories["lab/tiny"]["private"]
    assert "gyroquant.json" in hub.repositories["lab/tiny"]["files"]
    options = ("--format", "dense", "--push", "plain", "--public", "--json")
    assert inside(monkeypatch, "export", out, dense, *options) == 0
    assert json.loads(capfd.readouterr().out)["pushed"] == f"{hub.endpoint}/me/plain"
    assert not hub.repositories["me/plain"]["private"]
    assert "pushed" not in json.loads((dense / "gyroquant_export.json").read_text())


def test_a_push_that_cannot_be_done_is_refused_before_any_work(
    folders: dict[str, Path], tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    out = tmp_path / "out"
    for options, reason in (
        (("--push", "other/x"), "the token of me cannot write to other"),
        (("--public",), "--public is for --push NAME"),
    ):
        assert inside(monkeypatch, *quantize(folders["llama"], out, *options)) == 1
        assert reason in capfd.readouterr().err
        assert inside(monkeypatch, "export", out, tmp_path / "x", *options) == 1
        assert reason in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_push_that_fails_leaves_the_folder_and_can_be_repeated(
    folders: dict[str, Path], tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    out, hub.refuses = tmp_path / "out", "/commit/"
    assert inside(monkeypatch, *quantize(folders["llama"], out, "--push", "x")) == 1
    shown = capfd.readouterr()
    assert "true bits per rounded weight" in shown.out
    assert f"The folder is complete; run `gyroquant push {out} x` to push it again" in shown.err
    hub.refuses = ""
    assert inside(monkeypatch, "push", out, "x") == 0
    assert capfd.readouterr().out == f"pushed to {hub.endpoint}/me/x\n"
    assert hub.repositories["me/x"]["files"]["SHA256SUMS"] == (out / "SHA256SUMS").read_bytes()


def test_interrupting_a_push_says_what_is_left(
    folders: dict[str, Path], tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    assert inside(monkeypatch, *quantize(folders["llama"], out)) == 0
    monkeypatch.setattr("gyroquant.formats.push.check_push", interrupt)
    assert inside(monkeypatch, "push", out, "x") == 130
    assert f"{out} is complete; run `gyroquant push {out} x` to push it" in capfd.readouterr().err
