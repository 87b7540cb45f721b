"""Rotations as files: what one run learned is applied in another, composed and inverted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import save_file
from tiny_runs import run

import gyroquant as gq
from gyroquant.cli import main
from gyroquant.finetuning.rotations_file import compose, invert, load_rotations, write_rotations

LEARN = ["transform.R1={method: hadamard, random_signs: true}", "transform.R2=hadamard", "learn.steps=2"]
LEARN += ["learn.batch_size=1", "learn.lr=0.5", "weights.bits=4"]


def command(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["gyroquant", *arguments])
        main()
    return int(stopped.value.code or 0)


def test_what_was_learned_is_applied_in_another_run(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    run(folders["llama"], tmp_path / "one", "rtn", corpus, *LEARN)
    assert command("rotations", "save", str(tmp_path / "one"), str(tmp_path / "r.safetensors")) == 0
    assert set(load_rotations(tmp_path / "r.safetensors")) == {
        "R1",
        "model.layers.0.self_attn.R2",
        "model.layers.1.self_attn.R2",
    }
    stored = f"{{method: stored, file: {tmp_path / 'r.safetensors'}}}"
    changes = [f"transform.R1={stored}", f"transform.R2={stored}", "weights.bits=4"]
    run(folders["llama"], tmp_path / "two", "rtn", corpus, *changes)
    ids = tiny_models.tokens(tiny_models.build("llama"))
    with torch.no_grad():
        one, two = (gq.load(tmp_path / out, dtype=torch.float32)(ids).logits for out in ("one", "two"))
    assert torch.equal(one, two)


def test_composition_and_inverse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = ({"R1": gq.maps.random_orthogonal(8, generator).dense()} for _ in range(2))
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.allclose(x @ compose(a, b)["R1"], (x @ a["R1"]) @ b["R1"])
    write_rotations(tmp_path / "a.safetensors", a)
    assert command("rotations", "invert", str(tmp_path / "a.safetensors"), str(tmp_path / "i.safetensors")) == 0
    both = [str(tmp_path / name) for name in ("a.safetensors", "i.safetensors", "e.safetensors")]
    assert command("rotations", "compose", *both) == 0
    capsys.readouterr()
    assert command("rotations", "show", both[2], "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["from_identity"] < 1e-12
    assert torch.allclose(invert(a)["R1"], torch.linalg.inv(a["R1"]))
    with pytest.raises(gq.InputError, match="cannot be composed"):
        compose(a, {"R1": torch.eye(4)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"R1": torch.eye(32)}, "has shape"),
        ({"R2": torch.eye(64)}, "no rotation for R1"),
        ({"R1": 2 * torch.eye(64)}, "not orthogonal"),
        ({"R1": torch.ones(64)}, "not a square matrix"),
        (None, "cannot be read as rotations"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    content: dict[str, torch.Tensor] | None, message: str, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.safetensors"
    if content is None:
        path.write_bytes(b"not safetensors")
    else:
        save_file(content, path)
    with pytest.raises(gq.GyroquantError, match=message):
        run(folders["llama"], tmp_path / "out", "rtn", corpus, f"transform.R1={{method: stored, file: {path}}}")
    with pytest.raises(gq.InputError, match="does not contain learned rotations"):
        load_rotations(tmp_path)
