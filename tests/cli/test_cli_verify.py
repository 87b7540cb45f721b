"""`gyroquant verify`: what is wrong with a folder, the command that makes it again, its proof made again."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import gyroquant as gq
from gyroquant.calibration.text import load_text
from gyroquant.cli import app
from gyroquant.finetuning.rotations_file import FILE_NAME
from gyroquant.inspection import verify as verification
from gyroquant.pipeline import run as pipeline
from gyroquant.pipeline.job import prepare
from gyroquant.system.checksums import write_checksums

BRIEF = ["weights.group_size=16", "calibration.nsamples=8", "calibration.seqlen=32", "calibration.dtype=float32"]
LEARNED = {
    "name": "learned",
    "transform": {"R1": {"method": "hadamard", "random_signs": True}, "R2": "hadamard"},
    "learn": {"objective": "weights", "steps": 3},
    "weights": {"bits": 4, "group_size": 16, "symmetric": False, "scale": "mse", "solver": "rtn"},
    "calibration": {"nsamples": 4, "seqlen": 32, "dtype": "float32"},
    "proof": {"seqlen": 32},
}


def made(folder: Path, out: Path, recipe: Any, corpus: Path, *changes: str, **options: Any) -> Path:
    """A folder written and sealed."""
    loaded = gq.load_recipe(recipe, [*(BRIEF if isinstance(recipe, str) else ()), *changes])
    pipeline.run(prepare(folder, out, loaded, corpus, tokenizer=tiny_models.tokenizer(), **options))
    write_checksums(out)
    return out


@pytest.fixture(scope="module")
def out(folders: dict[str, Path], corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, rotated and rounded by GPTQ."""
    return made(folders["llama"], tmp_path_factory.mktemp("saved") / "out", "gsr", corpus, "weights.bits=3")


def run(*arguments: object) -> tuple[int, dict[str, Any]]:
    """The exit status of `gyroquant verify` and what it printed as JSON."""
    done = CliRunner().invoke(app, ["verify", *map(str, arguments), "--json"], catch_exceptions=False)
    return done.exit_code, json.loads(done.stdout)


def test_a_folder_as_it_was_written_passes(out: Path) -> None:
    status, result = run(out)
    assert (status, result["problems"], result["extra"]) == (0, [], [])
    assert result["tensors"] == len(gq.load(out).state_dict())
    shown = CliRunner().invoke(app, ["verify", str(out)]).stdout
    assert "none found" in shown
    assert "gyroquant quantize" in shown


def test_every_kind_of_damage_is_named(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scales"
    tensors[name].fill_(float("nan"))
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    (copy / "generation_config.json").unlink()
    (copy / "note.txt").write_text("")
    status, result = run(copy)
    assert status == 1
    assert result["extra"] == ["note.txt"]
    text = " / ".join(result["problems"])
    assert "generation_config.json is missing" in text
    assert "model.safetensors, or its line in SHA256SUMS, is damaged" in text
    assert "model.layers.1.mlp.up_proj.weight cannot be decoded" in text
    assert "not finite" in text
    assert len(result["problems"]) == 3
    (copy / "model.safetensors").write_bytes(b"x" * 100)
    (copy / "SHA256SUMS").unlink()
    status, result = run(copy)
    assert status == 1
    assert [problem.partition(":")[0] for problem in result["problems"]] == [
        f"{copy} has no SHA256SUMS, so its files cannot be checked",
        "the weights cannot be opened",
    ]


def test_a_list_that_lost_lines_does_not_pass(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    listed = (copy / "SHA256SUMS").read_text().splitlines(keepends=True)
    (copy / "SHA256SUMS").write_text("".join(line for line in listed if "model.safetensors" not in line))
    status, result = run(copy)
    assert status == 1
    assert [problem.partition(":")[0] for problem in result["problems"]] == ["model.safetensors is not in SHA256SUMS"]
    (copy / "SHA256SUMS").write_text("")
    status, result = run(copy)
    assert status == 1
    names = sorted(path.name for path in copy.iterdir() if path.name not in ("SHA256SUMS", "README.md"))
    assert [problem.partition(" is ")[0] for problem in result["problems"]] == names


def test_the_command_makes_the_folder_again(out: Path, folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    words = shlex.split(verification.verify(out)["command"])
    assert words[:4] == ["gyroquant", "quantize", str(folders["llama"]), str(out)]
    assert "--dense" not in words
    assert words[words.index("--text") + 1] == corpus.name
    words[3], words[words.index("--text") + 1] = str(tmp_path / "again"), str(corpus)
    done = CliRunner().invoke(app, words[1:], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_the_recipe_is_written_where_no_preset_is_near(folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    place = made(folders["llama"], tmp_path / "out", LEARNED, corpus, dense=True)
    assert "--recipe RECIPE.yaml" in verification.verify(place)["command"]
    command = verification.verify(place, recipe_file=tmp_path / "r.yaml")["command"]
    assert f"--recipe {tmp_path / 'r.yaml'}" in command
    assert "--dense" in command
    assert gq.load_recipe(tmp_path / "r.yaml") == gq.load_recipe(LEARNED)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_the_proof_of_a_folder_from_before_windows_began_with_bos_is_made_on_its_tokens(
    suffix: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its manifest has neither the key nor what windows begin with: they were cut from the text as it stands."""
    model, text = tmp_path / "model", tmp_path / f"text{suffix}"
    shutil.copytree(folders["llama"], model)
    tiny_models.beginning(template=tiny_models.CHAT).save_pretrained(model)
    rows = [{"messages": [{"role": "user", "content": tiny_models.prose(40, i)}]} for i in range(30)]
    text.write_text("\n".join(map(json.dumps, rows)))
    job = prepare(
        model,
        tmp_path / "out",
        gq.load_recipe("gsr", [*BRIEF, "calibration.add_bos=false"]),
        load_text(text, prose=True),
    )
    pipeline.run(job)
    path = tmp_path / "out" / "gyroquant.json"
    manifest = json.loads(path.read_text())
    assert manifest["text"].pop("bos") is None
    assert manifest["recipe"]["calibration"].pop("add_bos") is False
    path.write_text(json.dumps(manifest))
    write_checksums(tmp_path / "out")
    seen, original = list[torch.Tensor](), verification.prove

    def prove(store: Any, plan: Any, runner: Any, tokens: torch.Tensor, *rest: Any) -> Any:
        seen.append(tokens)
        return original(store, plan, runner, tokens, *rest)

    monkeypatch.setattr(verification, "prove", prove)
    status, result = run(tmp_path / "out", "--proof", "--text", text)
    assert status == 0, result["problems"]
    assert torch.equal(seen[0], job.proof_tokens)
    assert "calibration.add_bos=false" in result["command"]


def test_the_proof_is_made_again(out: Path, folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    status, result = run(out, "--proof", "--text", corpus)
    assert status == 0, result["problems"]
    assert result["proof"]["again"] == pytest.approx(result["proof"]["recorded"], rel=0.5)
    other = tmp_path / "other.txt"
    other.write_text(tiny_models.prose(6000, seed=3))
    status, result = run(out, "--proof", "--text", other, "--against", folders["llama"])
    assert status == 1
    assert "is not the one of the run" in result["problems"][0]
    with pytest.raises(gq.InputError, match=r"give --text FILE"):
        gq.verify(out, proof=True)


def test_a_proof_that_does_not_hold_or_is_another_fails(
    out: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    manifest = json.loads((copy / "gyroquant.json").read_text())
    manifest["proof"]["relative_logit_error"] = 5e-5
    (copy / "gyroquant.json").write_text(json.dumps(manifest))
    write_checksums(copy)
    status, result = run(copy, "--proof", "--text", corpus)
    assert status == 1
    assert "5.0e-05 is recorded" in result["problems"][0]

    def wrong(*args: object) -> None:
        raise gq.ProofError("block 1")

    monkeypatch.setattr(verification, "prove", wrong)
    status, result = run(out, "--proof", "--text", corpus)
    assert (status, result["problems"]) == (1, ["the proof does not hold: block 1"])


def test_weights_of_another_model_are_found(out: Path, corpus: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    write_checksums(copy)
    assert run(copy)[0] == 0
    status, result = run(copy, "--proof", "--text", corpus)
    assert status == 1
    assert "model.embed_tokens.weight is not what the recipe makes of" in result["problems"][0]


@pytest.mark.parametrize("kind", ["learned", "measured"])
def test_learned_and_measured_maps(kind: str, folders: dict[str, Path], corpus: Path, tmp_path: Path) -> None:
    recipe: Any = LEARNED if kind == "learned" else "smoothquant"
    changes = [] if kind == "learned" else ["activations=null"]
    place = made(folders["llama"], tmp_path / "out", recipe, corpus, *changes)
    result = verification.verify(place, proof=True, text=corpus)
    assert result["passed"], result["problems"]
    assert result["proof"]["again"] == pytest.approx(result["proof"]["recorded"], rel=0.5)
    if kind == "measured":
        assert result["proof"]["maps"] == "measured again"
        return
    assert result["proof"]["maps"].endswith(FILE_NAME)
    (place / FILE_NAME).unlink()
    write_checksums(place)
    assert verification.verify(place, proof=True, text=corpus)["proof"]["maps"] == "learned again"


def test_exports_are_checked_too(out: Path, tmp_path: Path) -> None:
    gq.export(out, "dense", tmp_path / "dense", check=False)
    status, result = run(tmp_path / "dense")
    assert (status, result["problems"]) == (0, [])
    assert shlex.split(result["command"])[:2] == ["gyroquant", "export"]
    data = bytearray((tmp_path / "dense" / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "dense" / "model.safetensors").write_bytes(data)
    assert run(tmp_path / "dense")[0] == 1
    with pytest.raises(gq.InputError, match="damaged"):
        gq.verify_export(tmp_path / "dense", out)


def test_other_folders_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(gq.InputError, match="neither"):
        gq.verify(folders["llama"])
    (tmp_path / "gyroquant.json").write_text("[")
    with pytest.raises(gq.InputError, match="damaged"):
        gq.verify(tmp_path)
