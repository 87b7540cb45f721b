"""An export appears whole and proved, or not at all; verify-export finds a changed one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import saved_models
import tiny_models
import torch
from typer.testing import CliRunner

import gyroquant as gq
from gyroquant.cli import app
from gyroquant.errors import InputError, ProofError
from gyroquant.formats import export as deploy
from gyroquant.formats.base import Format, Layer, ModelRequirements, check_fit, format_named
from gyroquant.formats.export import MANIFEST, export, formats
from gyroquant.formats.native.runtime import TransformersRuntime
from gyroquant.formats.runtime import Runtime
from gyroquant.grids import Fp4Grid, IntegerGrid
from gyroquant.inspection.verify_export import verify_export
from gyroquant.maps import hadamard
from gyroquant.models.execution.online import OnlineMap
from gyroquant.models.graph.sites import HookPoint
from gyroquant.models.stores.source import open_model
from gyroquant.pipeline.export_requirements import check_job, requirements_of_job
from gyroquant.pipeline.job import prepare
from gyroquant.report import summaries
from gyroquant.system.checksums import write_checksums

ROTATED = {"R1": {"method": "hadamard"}, "R2": {"method": "hadamard"}}
ONLINE = OnlineMap(HookPoint("input", "model.layers.0.mlp.down_proj"), hadamard(96))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, rotated and rounded."""
    return saved_models.rounded(tiny_models.build("llama"), tmp_path_factory.mktemp("saved") / "out", ROTATED).folder


@pytest.mark.parametrize("name", sorted(Format.registry))
def test_every_format_says_what_it_holds(name: str) -> None:
    """The contract of formats: refusals name the format and the layer; a runtime belongs to each."""
    one = format_named(name)
    assert one.title
    assert issubclass(Runtime.registry[name], Runtime)
    assert "nowhere" in " ".join(one._architecture("nowhere")) or one.capabilities.model_types is None
    stranger = Layer("model.layers.0.mlp.up_proj.weight", Fp4Grid(), 128)
    if not (one.capabilities.dense or one.capabilities.any_grid):
        assert any(stranger.name in reason for reason in one.incompatibilities(ModelRequirements("llama", (stranger,))))
    if "input" not in one.capabilities.points:
        reasons = one.incompatibilities(ModelRequirements("llama", (), (ONLINE,)))
        assert any("model.layers.0.mlp.down_proj" in reason for reason in reasons)
    plain = Layer("model.layers.0.mlp.up_proj.weight", IntegerGrid(bits=4, group_size=32, symmetric=True), 128)
    assert one.incompatibilities(ModelRequirements("llama", (plain,))) == []


def weights(folder: Path) -> int:
    return open_model(folder).weights


def shown(manifest: Any) -> list[str]:
    (table,) = summaries.exported(manifest, "x")
    return [str(cell) for cell in table.columns[0].cells]


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", ["archive", "compressed-tensors", "dense", "gguf", "onnx", "openvino"])
def test_written_checked_and_verified(name: str, out: Path, tmp_path: Path) -> None:
    packages = {"compressed-tensors": "compressed_tensors", "onnx": "onnxruntime", "openvino": "openvino"}
    pytest.importorskip(packages.get(name, "gguf"))
    manifest = export(out, name, tmp_path / "x")
    assert manifest["check"]["relative_logit_error"] < deploy.TOLERANCE
    assert json.loads((tmp_path / "x" / MANIFEST).read_text())["format"] == name
    files = {path.name: path.stat().st_size for path in (tmp_path / "x").iterdir()}
    held = sum(count for file, count in files.items() if file.startswith(("model.", "openvino_model.bin")))
    assert manifest["weight_bytes"] == held <= manifest["bytes"] <= sum(files.values())
    assert manifest["whole_model_bits_per_weight"] == 8 * held / weights(out)
    assert "files with weights" in shown(manifest)
    result = verify_export(tmp_path / "x", out, tokens=8, window=32)
    assert result["passed"]
    assert result["ways"]["exact"]["greedy_tokens_alike"] == 8
    assert abs(result["ways"]["exact"]["kl"]) < 1e-5


@pytest.mark.usefixtures("unmeasured")
def test_every_device_is_asked(out: Path, tmp_path: Path) -> None:
    ov = pytest.importorskip("openvino")
    export(out, "openvino", tmp_path / "x", check=False)
    ways = verify_export(tmp_path / "x", out, tokens=2, window=32, devices=True)["ways"]
    assert len(ways) == 2 + len(ov.Core().available_devices)
    assert ways[next(key for key in ways if key.startswith("CPU"))]["perplexity"] == ways["default"]["perplexity"]


def test_another_model_is_not_put_in_place(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(TransformersRuntime):
        """A program that makes something else of the file."""

        def feed(self, ids: torch.Tensor) -> torch.Tensor:
            return super().feed(ids) * 1.01

    monkeypatch.setattr(deploy, "open_runtime", lambda name, folder, exact: Other(folder, exact))
    with pytest.raises(ProofError, match="No export was written"):
        export(out, "dense", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_export_is_found(out: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    export(out, "dense", tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3] *= 1.5
    save_file(tensors, path, metadata={"format": "pt"})
    asked = ["verify-export", str(tmp_path / "x"), "--against", str(out), "--tokens", "4", "--window", "32"]
    assert "damaged" in str(CliRunner().invoke(app, asked).exception)
    write_checksums(tmp_path / "x")  # now only its logits tell
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 1
    for shown in ("allowed", "decode, tokens/s", "peak memory", "through the KV cache"):
        assert shown in done.stdout


def test_refusals_name_what_holds_it_instead() -> None:
    midrise = Layer("a", IntegerGrid(bits=2, group_size=-1, symmetric=True, midrise=True), 128)
    with pytest.raises(InputError, match=r"has no type for 2-bit midrise.*Formats that hold it as it is: .*openvino"):
        check_fit(format_named("gptq"), ModelRequirements("llama", (midrise,)))
    with pytest.raises(InputError, match=r"there is no format .onnxx.; did you mean .onnx."):
        format_named("onnxx")


def test_a_quantization_is_refused_before_any_work(tmp_path: Path, folders: dict[str, Path]) -> None:
    recipe = saved_models.recipe({"R4": {"method": "hadamard", "block": 32}})
    job = prepare(
        tiny_models.build("llama"), tmp_path / "o", recipe, [tiny_models.prose(3000)], tokenizer=tiny_models.tokenizer()
    )
    with pytest.raises(InputError, match="cannot run the online map before"):
        check_job("gguf", job)
    check_job("openvino", job)
    allocated = saved_models.recipe(allocate={"budget": 4.9, "bits": [3, 4]})
    job = prepare(
        tiny_models.build("llama"),
        tmp_path / "o",
        allocated,
        [tiny_models.prose(3000)],
        tokenizer=tiny_models.tokenizer(),
    )
    assert {layer.grid.bits for layer in requirements_of_job(job).layers} == {3, 4}


def test_what_is_not_ours_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `gyroquant quantize` first"):
        export(folders["llama"], "dense", tmp_path / "x")
    with pytest.raises(InputError, match="not an export of gyroquant"):
        verify_export(tmp_path, folders["llama"])


def test_an_existing_folder_is_only_replaced_when_asked(out: Path, tmp_path: Path) -> None:
    export(out, "dense", tmp_path / "x", check=False)
    with pytest.raises(InputError, match="--overwrite"):
        export(out, "dense", tmp_path / "x", check=False)
    export(out, "dense", tmp_path / "x", check=False, overwrite=True)


def test_commands(out: Path, tmp_path: Path, folders: dict[str, Path]) -> None:
    run = CliRunner()
    listed = run.invoke(app, ["formats", str(out), "--json"])
    assert {one["format"] for one in json.loads(listed.stdout)} == set(Format.registry)
    assert all(one["problems"] == [] for one in formats(out))
    written = run.invoke(app, ["export", str(out), str(tmp_path / "x"), "--format", "dense", "--json"])
    assert json.loads(written.stdout)["check"]["runtime"] == "transformers"
    text = tmp_path / "text.txt"
    text.write_text(tiny_models.prose(3000))
    tiny_models.build("llama").save_pretrained(tmp_path / "model")
    tiny_models.tokenizer().save_pretrained(tmp_path / "model")
    asked = ["quantize", str(tmp_path / "model"), str(tmp_path / "o"), "--recipe", "rtn", "--text", str(text)]
    asked += ["--set", "weights.group_size=32", "--nsamples", "2", "--seqlen", "32", "--set", "proof.seqlen=32"]
    done = run.invoke(app, [*asked, "--format", "dense"], catch_exceptions=False)
    assert done.exit_code == 0
    assert (tmp_path / "o" / "dense" / "model.safetensors").exists()
    assert torch.isfinite(gq.load(tmp_path / "o")(input_ids=torch.tensor([[3, 4]])).logits).all()


def test_logits_that_are_not_finite_are_no_small_error() -> None:
    ours = torch.ones(3, 4)
    assert deploy.relative_error(ours, ours) == 0
    for value in (torch.nan, torch.inf):
        theirs = ours.clone()
        theirs[1, 2] = value
        assert deploy.relative_error(theirs, ours) == float("inf")
