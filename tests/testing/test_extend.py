"""The templates of docs/extend.md keep the contracts of their kinds, each as the one file that it is shown as."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_models
import yaml
from extend_page import PAGE, TEXT, template

import gyroquant as gq
from gyroquant import testing
from gyroquant.formats.export import formats
from gyroquant.models.graph.spec import Architecture
from gyroquant.registry import restored

CHECKS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "Method": ("Even", testing.check_method),
    "Solver": ("Feedback", testing.check_solver),
    "Step": ("Clip", testing.check_step),
    "Grid": ("LloydMaxGrid", testing.check_grid),
    "Map": ("Shift", testing.check_map),
    "Architecture": ("GEMMA", testing.check_architecture),
    "Format": ("Npz", testing.check_format),
}


@pytest.fixture
def run() -> Iterator[Callable[[str], ModuleType]]:
    """Executes templates as modules, whose classes are forgotten afterwards."""
    names = []

    def executed(section: str) -> ModuleType:
        module = ModuleType(f"template_of_a_{section.lower()}")
        sys.modules[module.__name__] = module  # dataclasses look their module up
        names.append(module.__name__)
        exec(compile(template(section), f"{PAGE.name}, {section}", "exec"), module.__dict__)
        return module

    with restored():
        yield executed
    for name in names:
        del sys.modules[name]


def test_there_is_a_template_for_every_kind_with_a_contract() -> None:
    sections = set(re.findall(r"^## (\w+)$", TEXT, re.MULTILINE))
    assert set(CHECKS) == sections & set(CHECKS)
    assert TEXT.count("```python") == len(CHECKS)
    kinds = {contract.kind for contract in testing.parametrize.CONTRACTS} - {"observer"}
    assert {section.lower() for section in CHECKS} == kinds


@pytest.mark.parametrize("section", CHECKS)
def test_templates_are_short(section: str) -> None:
    assert len(template(section).splitlines()) < 60


@pytest.mark.parametrize("section", CHECKS)
def test_templates_keep_the_contract_of_their_kind(section: str, run: Any) -> None:
    name, check = CHECKS[section]
    check(getattr(run(section), name))


@pytest.mark.parametrize("section", CHECKS)
def test_the_page_shows_the_command_that_checks(section: str) -> None:
    name, check = CHECKS[section]
    assert f"import {check.__name__}; from my_package import {name}; {check.__name__}({name})" in TEXT


def test_all_templates_work_together_in_a_recipe(run: Any, tmp_path: Path) -> None:
    """A model is rounded with the method, the solver, the step and the grid, and exported in the format."""
    for section in ("Method", "Solver", "Step", "Grid", "Format"):
        run(section)
    recipe = {
        "transform": {"R1": "even"},
        "weights": {"grid": "lloyd_max", "group_size": 32, "solver": "feedback", "clip_weights": {"deviations": 3}},
        "calibration": {"nsamples": 2, "seqlen": 32, "dtype": "float32"},
        "proof": {"seqlen": 32},
    }
    out = tmp_path / "out"
    loaded = gq.load_recipe(yaml.safe_load(yaml.safe_dump(recipe)))
    model = tiny_models.build("llama")
    result = gq.quantize(model, loaded, [tiny_models.prose(300)], out, tokenizer=tiny_models.tokenizer())
    assert 2.5 <= result.gyroquant_manifest["bits"]["per_weight"] < 2.55
    assert gq.export(out, "npz", tmp_path / "npz")["check"]["relative_logit_error"] < 1e-5
    fits = {entry["format"]: entry for entry in formats(out)}
    assert fits["npz"]["problems"] == []
    assert any("lloyd_max" in reason for reason in fits["gptq"]["problems"])
    with pytest.raises(gq.InputError, match="no type for the grid lloyd_max"):
        gq.export(out, "gptq", tmp_path / "gptq")


def test_an_architecture_is_known_by_its_model_type(run: Any) -> None:
    architecture = run("Architecture").GEMMA
    assert isinstance(architecture, Architecture)
    assert gq.testing.models.tiny_model("gemma1").config.model_type == "gemma"
