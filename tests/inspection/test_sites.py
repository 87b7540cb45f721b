"""`gyroquant inspect --sites`: what R1 can do, every site, and where a derived description comes from."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from rich.console import Console

from gyroquant.cli import main
from gyroquant.errors import InputError
from gyroquant.inspection import model as inspecting
from gyroquant.inspection.model import Inspection, inspect_model
from gyroquant.models.deriving.tiny import default_config, tiny_model
from gyroquant.models.graph.sites import SITE_NAMES
from gyroquant.models.graph.spec import ARCHITECTURES
from gyroquant.report import summaries


def shown(parts: Any) -> str:
    stream = io.StringIO()
    terminal = Console(file=stream, width=250)
    for part in parts:
        terminal.print(part, highlight=False)
    return stream.getvalue()


@pytest.fixture(scope="module")
def gemma() -> Inspection:
    return inspect_model(tiny_model(default_config("gemma")), sites=True)


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("models") / "gemma"
    tiny_model(default_config("gemma")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model", "level"), [("llama", "fused"), ("gemma2", "online"), ("gpt2", "fused"), ("olmo2", "online")]
)
def test_the_level_of_a_model_that_a_file_describes(model: str, level: str) -> None:
    result = inspect_model(tiny_models.build(model), sites=True)
    assert result.level == result.to_dict()["level"] == level
    assert not result.to_dict()["derived"]
    assert result.entries() == []
    text = shown(summaries.described(result))
    assert f"R1 on this model: {level}" in text
    assert "proof" not in text
    assert "entries" not in text
    for row in result.sites():
        assert row["proofs"] == row["not_proven"] == {}


@pytest.mark.parametrize(
    ("model_type", "level"), [("gemma", "fused"), ("gemma4_text", "online"), ("rwkv", "unrotated")]
)
def test_the_level_of_a_derived_description_is_what_was_proven(model_type: str, level: str) -> None:
    result = inspect_model(tiny_model(default_config(model_type)), sites=True)
    derivation = result.store.derivation
    assert derivation is not None
    assert result.level == derivation.level == level
    row = next(row for row in result.sites() if row["site"] == "R1")
    assert bool(row["blocked"]) == (level != "fused")
    assert row["online"] == (level != "unrotated")
    text = shown(summaries.described(result))
    assert f"R1 on this model: {level}" in text
    if level == "unrotated":
        assert "a random map changed the logits" in text
        assert "not available" in shown([summaries.sites(result)])


def test_every_site_is_listed_or_missing_with_a_reason(gemma: Inspection) -> None:
    for result in (gemma, inspect_model(tiny_model(default_config("qwen3_5_text")), sites=True)):
        rows = {row["site"] for row in result.sites()}
        assert sorted((*rows, *result.missing_sites())) == sorted(SITE_NAMES)
        assert all(result.missing_sites().values())
    assert "changed the logits" in result.missing_sites()["R2"]


def test_rows_say_which_maps_can_be_fused_and_which_run_online(gemma: Inspection) -> None:
    rows = {row["site"]: row for row in gemma.sites()}
    assert rows["R1"]["places"] == 1
    assert rows["R1"]["orders"] == [64]
    assert rows["R1"]["admits"] == "orthogonal"
    assert rows["R1"]["online"]
    assert not rows["R1"]["online_unasked"]
    assert not rows["R2"]["online"]
    assert rows["qk"]["online"]
    assert rows["R3"]["admits_online"] == "orthogonal"
    assert rows["R3"]["blocked"]
    assert set(rows["R4"]["proofs"]) == {"R4", "R4 permutation", "R4 diagonal"}
    assert set(rows["R1"]["proofs"]) == {"R1", "R1 online"}
    assert all(error < 1e-5 for row in rows.values() for error in row["proofs"].values())


def test_a_site_that_is_blocked_at_some_places_only(gemma: Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    def some(graph: Any, name: str, *args: Any, **options: Any) -> Any:
        first, *others = find(graph, name, *args, **options)
        return [replace(first, blocked="so", admits="nothing"), *others]

    find = inspecting.find_sites
    monkeypatch.setattr(inspecting, "find_sites", some)
    rows = {row["site"]: row for row in gemma.sites()}
    assert rows["R2"]["blocked"] == ""
    assert rows["R2"]["partly_blocked"] == "at 1 of 4 places: so"
    assert rows["R2"]["admits"] == "any"
    assert rows["R1"]["blocked"] == "so"
    assert "not fused at 1 of 4 places: so" in shown([summaries.sites(gemma)])
    assert "not fused at 1 of 4 places: so" in shown(summaries.described(gemma))


def test_the_entries_of_a_derived_description_come_with_facts(gemma: Inspection) -> None:
    entries = {entry["name"]: entry for entry in gemma.entries()}
    assert entries["mlp.up_proj"]["writes"] == "mlp.up"
    assert entries["mlp.up_proj"]["in_block"]
    assert not entries["lm_head"]["in_block"]
    assert entries["self_attn"]["reads"] is None
    assert all(entry["fact"] for entry in entries.values())
    text = shown(summaries.described(gemma))
    for part in ("derived from the model and proven on a tiny one", "entries of each block of model.layers", "lm_head"):
        assert part in text
    assert "its outputs are the values that attention takes" in text


def test_the_plain_command_says_who_described_the_model(gemma_folder: Path, folders: dict[str, Path]) -> None:
    text = shown(summaries.inspected(inspect_model(gemma_folder)))
    assert "gemma (derived from the model and proven on a tiny one)" in text
    assert "fused: a map of the residual stream is folded" in text
    text = shown(summaries.inspected(inspect_model(folders["gemma2"])))
    assert "gemma2 (described by gemma)" in text
    assert "online: a map of the residual stream runs with the model" in text


def test_a_wrapper_shows_the_entries_of_its_decoder() -> None:
    wrapper = tiny_models._wrapper(
        "LlavaConfig",
        text_config={"model_type": "gemma", "head_dim": 16},
        vision_config=tiny_models._vision(model_type="clip_vision_model", num_hidden_layers=2, projection_dim=32),
        image_token_index=90,
    )()
    model = tiny_models.auto_class(wrapper).from_config(wrapper, dtype=torch.float32)
    result = inspect_model(tiny_models.randomise(model, 0).eval(), sites=True)
    entries = {entry["name"]: entry for entry in result.entries()}
    assert {"mlp.up_proj", "model.norm"} <= set(entries)
    assert all(entry["fact"] for entry in entries.values())


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["gyroquant", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_the_command(
    gemma_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    assert run(monkeypatch, "inspect", gemma_folder, "--sites", "--save", path) == 0
    assert "description written to" in capfd.readouterr().out
    assert "GEMMA = register(" in path.read_text()
    assert run(monkeypatch, "inspect", gemma_folder, "--sites", "--save", path) == 1
    assert "exists already" in capfd.readouterr().err
    assert run(monkeypatch, "inspect", gemma_folder, "--sites", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["derived"]
    assert found["level"] == "fused"
    assert found["entries"][0]["fact"]
    assert found["recipes"] == {}
    assert found["saved"] is None


def test_a_saved_description_is_used_from_then_on(gemma_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    before = inspect_model(gemma_folder, sites=True, save=path)
    assert before.saved == str(path)
    with ARCHITECTURES.restored():
        exec(compile(path.read_text(), str(path), "exec"), {})
        after = inspect_model(gemma_folder, sites=True)
        assert after.store.derivation is None
        keys = ("site", "places", "orders", "admits", "online", "blocked")
        assert [[row[key] for key in keys] for row in after.sites()] == [
            [row[key] for key in keys] for row in before.sites()
        ]


def test_options_that_contradict_each_other_are_refused(folders: dict[str, Path], tmp_path: Path, corpus: Path) -> None:
    path = tmp_path / "mine.py"
    with pytest.raises(InputError, match="described by hand already \\(llama\\)"):
        inspect_model(folders["llama"], sites=True, save=path)
    with pytest.raises(InputError, match="give --sites too"):
        inspect_model(folders["llama"], save=path)
    for options in ({"recipe": "rtn"}, {"text": corpus}, {"changes": ["seed=2"]}, {"recipe": "rtn", "dry_run": True}):
        with pytest.raises(InputError, match="--sites shows only the sites"):
            inspect_model(folders["llama"], sites=True, **options)  # type: ignore[arg-type]
    path.write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        inspect_model(tmp_path / "nowhere", sites=True, save=path)
    assert path.read_text() == "precious"
