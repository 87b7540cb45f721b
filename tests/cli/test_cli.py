"""The command line, as a user meets it: in a process of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gyroquant as gq
from gyroquant.cli import main
from gyroquant.formats import export as deploy

SMALL = ("--set", "weights.group_size=16", "--nsamples", "8", "--seqlen", "32")


def call(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gyroquant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def inside(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Runs a command in this process, where everything is imported already; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["gyroquant", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


Captured = pytest.CaptureFixture[str]


def test_the_whole_way(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    out = tmp_path / "out"
    done = call(
        "quantize",
        folders["llama_tied"],
        out,
        "--recipe",
        "gsr",
        "--set",
        "weights.bits=3",
        "--text",
        corpus,
        "--seed",
        "2",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr
    assert "true bits per rounded weight" in done.stdout
    manifest = json.loads((out / "gyroquant.json").read_text())
    assert manifest["proof"]["relative_logit_error"] < 1e-5
    assert manifest["proof"]["worst_block"] in (0, 1)
    assert manifest["bits"]["per_weight"] == pytest.approx(3 + 19 / 16)
    assert manifest["recipe"]["seed"] == manifest["recipe"]["calibration"]["seed"] == 2
    asked = ("--text", corpus, "--windows", 4, "--window", 64, "--against", folders["llama_tied"], "--json")
    asked += ("--report", out.parent / "diagnosis", "--prompts", 2, "--prompt-tokens", 8, "--steps", 3)
    assert inside(monkeypatch, "evaluate", out, *asked) == 0
    result = json.loads(capfd.readouterr().out)
    assert {"perplexity", "tokens", "kl", "top1_agreement", "true_bits_per_weight"} <= set(result)
    assert result["tokens"] == 256
    assert result["diagnosis"]["continuations"]["lengths"] == [3, 3]
    assert (out.parent / "diagnosis" / "diagnosis.html").exists()
    assert result["true_bits_per_weight"] == pytest.approx(3 + 19 / 16)
    assert result["whole_model_bits_per_weight"] > result["true_bits_per_weight"]
    assert result["bytes"]["total"] == sum(result["bytes"][part] for part in ("layers", "embeddings", "head", "rest"))
    assert inside(monkeypatch, "quantize", folders["llama_tied"], out, "--recipe", "rtn") == 1
    assert "not empty" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("quantize {model} {tmp}/o --recipe gsrr", "did you mean 'gsr'"),
        ("quantize {model} {tmp}/o --set weights.bit=2", "did you mean 'bits'"),
        ("quantize {tmp}/nowhere {tmp}/o", "there is no model at"),
        ("quantize {model} {tmp}/o --recipe gptq --set weights.group_size=16 --text {tmp}/none.txt", "no text file"),
        ("quantize {model} {tmp}/o --recipe gptq --set weights.group_size=16", "give --text"),
        ("evaluate {model} --text {tmp}/none.txt", "no text file"),
        ("evaluate {model} --task-items 5", "--task-text and --task-items are for --tasks"),
        ("evaluate {model} --report {tmp}/r", "add --against MODEL"),
        (
            "evaluate {model} --against {model} --tasks cloze --report {tmp}/r",
            "--tasks leave out: add --text FILE",
        ),
        ("evaluate {model} --steps 3", "without a report: add --report DEST"),
        ("evaluate {model} --against {model} --report {model}", "is not a report of gyroquant"),
        ("quantize {model} {tmp}/o --recipe rtn --workers 0 --threads 0", "--workers is 0, and has to be at least 1"),
        ("quantize {model} {tmp}/o --recipe rtn --threads 0", "--threads is 0, and has to be at least 1"),
        ("quantize {model} {tmp}/o --recipe rtn --format dens", "there is no format 'dens'"),
        ("recipes nothing", "no recipe is called"),
    ],
)
def test_errors_are_one_clear_line(
    arguments: str,
    message: str,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Captured,
) -> None:
    assert inside(monkeypatch, *arguments.format(model=folders["llama"], tmp=tmp_path).split()) == 1
    shown = capfd.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    assert inside(monkeypatch, "quantize", tmp_path / "nowhere", tmp_path / "o", "--debug") == 1
    assert "Traceback" in capfd.readouterr().err


def lacking() -> RuntimeError:
    """What torch raises for want of memory."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    return caught.value


def kept(error: Exception) -> Exception:
    """An error that has left a journal."""
    error.kept = Path("/x/.out.journal")  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (MemoryError(), "use fewer or shorter samples", 1),
        (OSError(28, "No space left on device", "/x/y"), "No space left on device: /x/y; no files were left", 1),
        (ZeroDivisionError("oops"), "This is a bug; run again with --debug to see where; no files were left", 1),
        (kept(ZeroDivisionError("oops")), "see where; run the same command again to continue (finished work is in", 1),
        (lacking(), "gyroquant: out of memory; use fewer or shorter samples", 1),
        (kept(lacking()), "--offload DIR; run the same command again to continue", 1),
        (RuntimeError("shapes differ"), "This is a bug", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_every_kind_of_failure_is_told_in_plain_words(
    error: BaseException, message: str, status: int, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("gyroquant.cli.recipes.load_recipe", fail)
    assert inside(monkeypatch, "recipes", "gsr") == status
    assert message in capfd.readouterr().err


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (OSError(28, "No space left on device"), "No space left on device; {out} is complete; run `{command}` to", 1),
        (gq.InputError("no such program"), "no such program; {out} is complete; run `{command}` to export it", 1),
        (ZeroDivisionError(), "to see where; {out} is complete; run `{command}` to export it", 1),
        (KeyboardInterrupt(), "interrupted; {out} is complete; run `{command}` to export it", 130),
    ],
)
def test_an_export_that_fails_leaves_what_it_was_made_from(
    error: BaseException,
    message: str,
    status: int,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Captured,
) -> None:
    out = tmp_path / "my out"

    def fail(folder: Path) -> None:
        raise error

    monkeypatch.setattr(deploy, "write_checksums", fail)
    assert inside(monkeypatch, *with_format(folders["llama"], out)) == status
    shown = capfd.readouterr().err
    command = shlex.join(["gyroquant", "export", str(out), str(out / "dense"), "--format", "dense"])
    assert message.format(out=out, command=command) in shown
    assert "no files were left" not in shown
    assert (out / "gyroquant.json").exists()
    assert not (out / "dense").exists()


def with_format(model: Path, out: Path) -> list[object]:
    """The arguments that quantize a model and export what comes out."""
    return ["quantize", model, out, "--recipe", "rtn", "--set", "weights.group_size=16", "--format", "dense"]


def test_a_folder_that_wants_its_export_alone_is_not_made_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    out = tmp_path / "my out"
    command, again = with_format(folders["llama"], out), ["export", out, out / "dense", "--format", "dense"]
    assert inside(monkeypatch, *command[:-2]) == 0
    assert inside(monkeypatch, *command) == 1
    shown = capfd.readouterr().err
    told = shlex.join(["gyroquant", *map(str, again)])
    assert f"is complete, except for its export; run `{told}` to export it" in shown
    assert "--overwrite" in shown
    assert inside(monkeypatch, *command[:-2]) == 1  # which wants no export
    assert "is not empty; choose another name" in capfd.readouterr().err
    assert inside(monkeypatch, *again) == 0
    assert inside(monkeypatch, *command) == 1
    assert "is not empty; choose another name" in capfd.readouterr().err
    assert inside(monkeypatch, "verify", out) == 0
    before = (out / "gyroquant.json").stat().st_mtime_ns
    assert inside(monkeypatch, *command, "--overwrite") == 0
    assert (out / "gyroquant.json").stat().st_mtime_ns != before


def test_a_recipe_in_the_folder_that_it_is_to_replace_is_kept(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    mine = tmp_path / "out" / "mine.yaml"
    mine.parent.mkdir()
    mine.write_text("weights: {bits: 4, group_size: 16}\n")
    command = ["quantize", folders["llama"], mine.parent, "--recipe", mine, "--overwrite"]
    assert inside(monkeypatch, *command) == 1
    assert "mine.yaml, which replacing it would delete" in capfd.readouterr().err
    assert mine.exists()


def test_usage_errors_and_help(monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    assert inside(monkeypatch, "quantize") == 2
    assert inside(monkeypatch, "quantize", "a", "b", "--nonsense") == 2
    assert inside(monkeypatch, "--version") == 0
    for command in ("quantize", "evaluate", "inspect", "recipes"):
        assert inside(monkeypatch, command, "--help") == 0
        assert command in capfd.readouterr().out


def test_bits_and_sizes_choose_a_recipe(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    """Without --recipe it is ours: at these bits, or at those that the size leaves."""
    few = ["--text", corpus, "--effort", "light", "--nsamples", "8", "--seqlen", "32", "--json"]
    for options, wanted in ((["--bits", "2"], "gyro-w2"), (["--size", "33kB"], "gyro-w3")):
        out = tmp_path / wanted
        assert inside(monkeypatch, "quantize", folders["llama_tied"], out, *options, *few) == 0
        assert json.loads(capfd.readouterr().out)["recipe"]["name"] == f"{wanted} (light)"
    assert (tmp_path / "gyro-w3" / "model.safetensors").stat().st_size <= 33_000
    for options, message in (
        (["--bits", "5"], "--bits is 2, 3 or 4, not 5"),
        (["--bits", "3", "--recipe", "gyro-w2"], "write --set weights.bits=3"),
        (["--size", "3 apples"], "'3 apples' is not a size"),
        (["--size", "2kB"], "the smallest that is possible is"),
    ):
        out, given = tmp_path / "no", [*few, *options]
        assert inside(monkeypatch, "quantize", folders["llama_tied"], out, *given) == 1
        assert message in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "no").exists()


def test_interrupting_leaves_what_the_same_command_goes_on_from(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the work: status 130, one line, and nothing on the disk but the journal it names."""
    command = [
        sys.executable,
        "-m",
        "gyroquant",
        "quantize",
        str(folders["llama"]),
        str(tmp_path / "out"),
        "--recipe",
        "gptq",
        "--text",
        str(corpus),
        "--set",
        "weights.group_size=16",
        "--nsamples",
        "40",
        "--seqlen",
        "128",
        "--set",
        "calibration.dtype=float32",
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=60)
    if process.returncode == 0:  # it was already finished
        assert (tmp_path / "out" / "gyroquant.json").exists()
    else:
        assert process.returncode == 130, messages
        assert "interrupted" in messages
        assert [path.name for path in tmp_path.iterdir()] == [".out.journal"]
        assert "run the same command again to continue" in messages
        assert inside(monkeypatch, *command[3:]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_inspect_shows_how_far_rounded_layers_are_from_the_limit(
    folders: dict[str, Path], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    out = tmp_path / "out"
    command = ["quantize", folders["llama_tied"], out, "--recipe", "gptq", "--text", corpus]
    assert inside(monkeypatch, *command, *SMALL) == 0
    capfd.readouterr()
    assert inside(monkeypatch, "inspect", out) == 0
    shown = capfd.readouterr().out
    for text in ("above the rate-distortion bound", "in bits", "dB"):
        assert text in shown
    assert inside(monkeypatch, "inspect", out, "--json") == 0
    layers = json.loads(capfd.readouterr().out)["layers"]
    assert layers == json.loads((out / "gyroquant.json").read_text())["layers"]
    assert layers[0]["rate_distortion"]["decibels"] > 0
    (out / "gyroquant.json").write_text("{}")
    assert inside(monkeypatch, "inspect", out) == 1
    assert "is not a manifest" in capfd.readouterr().err


def test_inspect_and_recipes(
    folders: dict[str, Path], corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: Captured
) -> None:
    assert inside(monkeypatch, "inspect", folders["gemma2"], "--text", corpus, "--recipe", "rtn", *SMALL) == 0
    shown = capfd.readouterr().out
    for text in ("gemma2", "kurtosis", "estimate for rtn", "peak memory"):
        assert text in shown
    assert inside(monkeypatch, "inspect", folders["gemma2"], "--json") == 0
    assert "cannot pass it" in json.loads(capfd.readouterr().out)["recipes"]["gsr"]
    assert inside(monkeypatch, "recipes") == 0
    assert "gsr" in capfd.readouterr().out
    assert inside(monkeypatch, "recipes", "gsr") == 0
    assert "method: walsh" in capfd.readouterr().out
    assert inside(monkeypatch, "recipes", "gsr", "--json") == 0
    assert json.loads(capfd.readouterr().out)["name"] == "gsr"
