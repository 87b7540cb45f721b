"""The public face: what it exports, that it imports nothing before it is used, and what the command line costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import gyroquant as gq
from gyroquant.system.version import gyroquant_version

HEAVY = ("torch", "transformers", "numpy", "scipy", "pydantic", "rich", "typer")
CPU_SECONDS = 0.4


def run(code: str, *arguments: object) -> str:
    """What a program of its own prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", [*gq.__all__, "__version__"])
def test_every_public_name_is_there_and_is_kept(name: str) -> None:
    assert getattr(gq, name) is getattr(gq, name)
    assert name in dir(gq)


def test_public_names_are_those_of_their_modules() -> None:
    for name, module in gq._MODULES.items():
        assert getattr(gq, name) is getattr(import_module(f"gyroquant.{module}"), name)
    assert {*gq._MODULES, *gq._ROOMS} == set(gq.__all__)
    assert gq.__all__ == sorted(gq.__all__)
    assert gq.__version__ == gyroquant_version()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'gyroquant' has no attribute 'quantise'"):
        gq.quantise  # noqa: B018
    assert not hasattr(gq, "__wrapped__")


def test_importing_it_imports_nothing_heavy() -> None:
    code = f"import sys, gyroquant; dir(gyroquant); print([name for name in {HEAVY} if name in sys.modules])"
    assert run(code).strip() == "[]"


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_help_and_version_need_neither_torch_nor_transformers_and_little_time(option: str) -> None:
    code = """
import json, resource, sys
from gyroquant.cli import main
sys.argv = ["gyroquant", sys.argv[1]]
try:
    main()
except SystemExit as done:
    assert not done.code
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in ("torch", "transformers") if name in sys.modules]
print(json.dumps([used.ru_utime + used.ru_stime, heavy]))
"""
    *shown, last = run(code, option).splitlines()
    seconds, heavy = json.loads(last)
    assert shown
    assert heavy == []
    assert seconds <= CPU_SECONDS


CHECKER = """
[mypy]
plugins = pydantic.mypy
follow_imports = skip
[mypy-gyroquant.*,pydantic.*,pydantic_core.*]
follow_imports = silent
"""
"""Settings of a checker that reads gyroquant and what its classes are made of. Reading torch takes most of the time."""


def test_types_are_known_to_a_checker(tmp_path: Path) -> None:
    """Names that a checker does not find would be Any, and a wrong use of them no error."""
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    lines = [f"reveal_type(gq.{name})" for name in gq.__all__ if name not in gq._ROOMS]
    program.write_text("\n".join(["import gyroquant as gq", *lines]))
    settings = tmp_path / "mypy.ini"
    settings.write_text(CHECKER)
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--no-incremental", str(program)]
    environment = os.environ | {"MYPYPATH": str(Path(__file__).parent.parent / "src")}
    shown = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False).stdout
    revealed = [line for line in shown.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(lines), shown
    assert not [line for line in revealed if '"Any"' in line]
