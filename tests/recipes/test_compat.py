"""Old names of keys load for one release, with a warning."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from gyroquant.errors import RecipeError, RenamedWarning
from gyroquant.recipes import compat
from gyroquant.recipes.schema import Recipe, load_recipe

FINISH = r"'finish' is now 'finetune'.*0\.3 refuses it"
SPANS = r"'learn.gradient: spans' is now 'learn.gradient: scaled_ste'"
NEW: dict[str, Any] = {"learn": {"gradient": "scaled_ste"}, "weights": {"bits": 2}, "finetune": {"steps": 7}}
OLD: dict[str, Any] = {"learn": {"gradient": "spans"}, "weights": {"bits": 2}, "finish": {"steps": 7}}


def test_new_names_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_recipe(NEW)
        load_recipe("gyro-w2", ["finetune.steps=4", "learn.gradient=scaled_ste"], "light")


def test_a_mapping_with_old_names_loads_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match=FINISH), pytest.warns(FutureWarning, match=SPANS):
        assert load_recipe(OLD) == load_recipe(NEW)


def test_a_file_with_old_names_loads_with_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(OLD))
    with pytest.warns(FutureWarning, match=FINISH), pytest.warns(FutureWarning, match=SPANS):
        recipe = load_recipe(path)
    assert recipe == load_recipe({"name": "mine"} | NEW)
    assert "finish" not in recipe.to_dict()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("finish.steps=4", "finetune.steps=4", FINISH),
        ("finish=null", "finetune=null", FINISH),
        ("finish={steps: 4}", "finetune={steps: 4}", FINISH),
        ("learn.gradient=spans", "learn.gradient=scaled_ste", SPANS),
        ("learn={gradient: spans}", "learn={gradient: scaled_ste}", SPANS),
    ],
)
def test_changes_and_efforts_with_old_names(old: str, new: str, message: str) -> None:
    with pytest.warns(FutureWarning, match=message):
        assert load_recipe("gyro-w2", [old]) == load_recipe("gyro-w2", [new])
    data: dict[str, Any] = {"weights": {"bits": 2}}
    with pytest.warns(FutureWarning, match=message):
        changed = load_recipe(data | {"efforts": {"light": [old]}}, effort="light")
    assert changed == load_recipe(data | {"efforts": {"light": [new]}}, effort="light")


def test_each_old_name_is_warned_of_once() -> None:
    with pytest.warns(RenamedWarning) as caught:
        load_recipe(OLD)
    assert len(caught) == 2


def test_a_typed_recipe_takes_the_old_name() -> None:
    with pytest.warns(FutureWarning, match=FINISH):
        assert Recipe.model_validate(OLD | {"learn": None}).finetune == load_recipe(NEW).finetune


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(RecipeError, match="'finish' is now 'finetune', and both are given: leave 'finish' out"):
        load_recipe(OLD | NEW)


def test_a_manifest_of_the_last_release_is_read_silently() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        manifest = compat.current_manifest({"recipe": OLD, "finished": {"losses": [1.0]}, "text": None})
    assert manifest == {"recipe": NEW, "finetuned": {"losses": [1.0]}, "text": None}


def test_data_without_old_names_is_not_copied() -> None:
    assert compat.current(NEW) is NEW
    assert compat.current([5]) == [5]


def test_previous_is_the_inverse_of_current() -> None:
    assert compat.previous(NEW) == OLD
    assert compat.current(compat.previous(NEW), warn=False) == NEW
    assert json.dumps(compat.current(OLD, warn=False)) == json.dumps(NEW)  # keys stay in their places


def test_the_command_line_shows_a_warning_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from gyroquant.cli import main

    monkeypatch.setattr("sys.argv", ["gyroquant", "recipes", "gyro-w2", "--set", "finish.steps=4"])
    with pytest.raises(SystemExit) as done:
        main()
    assert not done.value.code
    shown = capfd.readouterr()
    assert "warning: 'finish' is now 'finetune'" in shown.err
    assert "RenamedWarning" not in shown.err
    assert yaml.safe_load(shown.out)["finetune"]["steps"] == 4


def test_a_folder_whose_manifest_has_the_old_names_verifies(folders: dict[str, Path], tmp_path: Path) -> None:
    from gyroquant import quantize, verify
    from gyroquant.system.checksums import CHECKSUM_FILE, write_checksums

    recipe = {"weights": {"bits": 4, "group_size": 16}, "proof": {"seqlen": 32}}
    out = tmp_path / "out"
    quantize(folders["llama"], recipe, out=out)
    path = out / "gyroquant.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"] = compat.previous(manifest["recipe"])
    assert "finish" in manifest["recipe"]
    path.write_text(json.dumps(manifest))
    (out / CHECKSUM_FILE).unlink()
    write_checksums(out)
    result = verify(out, proof=True, recipe_file=tmp_path / "again.yaml")
    assert result["passed"], result
    assert load_recipe(tmp_path / "again.yaml").finetune is None
