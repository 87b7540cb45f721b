"""A package of somebody else adds a method, a grid and a format, which the command line, workers and `compare` know."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import fresh_process
import pytest
import tiny_models
import yaml
from extend_page import install_plugin

SOURCE = Path(__file__).parents[2] / "src"
PACKAGE = "gyroquant_example"
COMMAND = """
import importlib
importlib.import_module("gyroquant.benchmark.execute").BASELINES = ("rtn",)  # one will do here
from gyroquant.cli import main
main()
"""
RECIPE: dict[str, Any] = {
    "description": "What the plug-in adds.",
    "transform": {"R1": "even"},
    "weights": {"grid": "lloyd_max", "group_size": 16, "solver": "gptq"},
    "calibration": {"nsamples": 4, "seqlen": 32, "dtype": "float32", "inputs": "original"},
    "proof": {"seqlen": 32},
}


class Installed:
    """A folder with the plug-in, a tiny model, a text and a recipe, and the command line that finds them."""

    def __init__(self, place: Path):
        self.place, self.model, self.text = place, place / "model", place / "text.txt"
        install_plugin(place / "site", PACKAGE, "Method", "Grid", "Format")
        tiny_models.build("llama", num_hidden_layers=1).save_pretrained(self.model)  # one worker process
        tiny_models.tokenizer().save_pretrained(self.model)
        self.text.write_text(tiny_models.prose(2000), encoding="utf-8")
        self.recipe = place / "even-lloyd.yaml"
        self.recipe.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")

    def run(self, *arguments: object, site: bool = True) -> subprocess.CompletedProcess[str]:
        """What a command of gyroquant says, with or without the plug-in."""
        paths = [str(SOURCE), *([str(self.place / "site")] if site else [])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        return fresh_process.run(COMMAND, *arguments, environment=environment)

    def data(self, *arguments: object) -> Any:
        """What a command of gyroquant gives as JSON."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="module")
def out(installed: Installed) -> Path:
    """A folder that was quantized by a worker."""
    out = installed.place / "out"
    command = ("quantize", installed.model, out, "--recipe", installed.recipe, "--text", installed.text)
    manifest = installed.data(*command, "--workers", 1, "--threads", 1)
    assert manifest["recipe"]["weights"]["grid"] == "lloyd_max"
    assert manifest["recipe"]["transform"]["R1"]["method"] == "even"
    assert 2.9 < manifest["bits"]["per_weight"] < 3.1
    return out


def test_workers_know_the_method_and_the_grid(out: Path) -> None:
    described = json.loads((out / "config.json").read_text())["quantization_config"]
    assert [grid["grid"] for grid in described["grids"]] == ["lloyd_max"]


def test_the_format_is_listed_and_written(installed: Installed, out: Path) -> None:
    listed = {entry["format"]: entry for entry in installed.data("formats", out)}
    assert listed["npz"]["problems"] == []
    manifest = installed.data("export", out, installed.place / "npz", "--format", "npz")
    assert manifest["check"]["relative_logit_error"] < 1e-5
    assert (installed.place / "npz" / "weights.npz").exists()


@pytest.mark.slow  # the whole command, with processes that each import PyTorch
def test_a_comparison_runs_a_recipe_of_the_plug_in(installed: Installed) -> None:
    amount = ("--nsamples", 2, "--seqlen", 32, "--window", 32, "--windows", 2, "--threads", 1)
    where = (installed.model, installed.place / "comparison", "--text", installed.text, "--test", installed.text)
    grid = ("--bits", 2, "--group-size", 16)
    found = installed.data("compare", *where, "--recipes", installed.recipe, *grid, *amount)
    done = {run["name"]: (run["status"], run.get("reason")) for run in found["cells"]}
    assert {status for status, _ in done.values()} == {"done"}, done
    assert any("even-lloyd" in name for name in done), done


def test_without_the_package_its_names_are_unknown(installed: Installed, tmp_path: Path) -> None:
    command = ("quantize", installed.model, tmp_path / "out", "--recipe", installed.recipe, "--text", installed.text)
    done = installed.run(*command, site=False)
    assert done.returncode != 0
    assert "even" in done.stderr + done.stdout


def test_a_package_that_cannot_be_imported_is_named(installed: Installed, tmp_path: Path) -> None:
    broken = Installed(tmp_path)
    (tmp_path / "site" / PACKAGE / "__init__.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    done = broken.run("formats")
    assert done.returncode != 0
    assert f"the plug-in 'example' of the package {PACKAGE} cannot be loaded" in " ".join(done.stderr.split())
