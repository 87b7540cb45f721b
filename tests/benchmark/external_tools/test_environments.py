"""Environments are made when asked for, made again when they are not what is asked for, and say why they are not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_tools
import pytest
import torch

from gyroquant.benchmark.external_tools import ExternalToolError, environment
from gyroquant.benchmark.external_tools.environment import default_folder, meaningful_line, python_of, torch_requirement
from gyroquant.benchmark.external_tools.scripted import ScriptedTool


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of one module, which pip builds without looking anywhere."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "tinypackage"\nversion = "1"\n'
    )
    (folder / "backend.py").write_text(
        "import os, zipfile\n"
        "def build_wheel(where, config_settings=None, metadata_directory=None):\n"
        "    name = 'tinypackage-1-py3-none-any.whl'\n"
        "    with zipfile.ZipFile(os.path.join(where, name), 'w') as wheel:\n"
        "        wheel.writestr('tinypackage.py', f'built_with = {os.environ.get(\"FLAVOUR\")!r}')\n"
        "        info = 'tinypackage-1.dist-info/'\n"
        "        wheel.writestr(info + 'METADATA', 'Metadata-Version: 2.1\\nName: tinypackage\\nVersion: 1\\n')\n"
        "        wheel.writestr(info + 'WHEEL', 'Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n')\n"
        "        wheel.writestr(info + 'RECORD', '')\n"
        "    return name\n"
    )
    return folder


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without packages. Copying it takes a tenth of the time of making one."""
    place = tmp_path_factory.mktemp("empty") / "environment"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    return place


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What is called; the step that would fetch PyTorch is only noted."""
    real, seen = environment._call, []

    def call(tool: type[ScriptedTool], command: list[str]) -> None:
        seen.append(command)
        if torch_requirement() not in command:
            real(tool, command)

    monkeypatch.setattr(environment, "_call", call)
    return seen


@pytest.fixture
def copying(calls: list[list[str]], empty: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The same, where an environment is a copy of an empty one."""
    usual = environment._call

    def call(tool: type[ScriptedTool], command: list[str]) -> None:
        if command[1:4] != ["-m", "venv", "--clear"]:
            usual(tool, command)
            return
        calls.append(command)
        shutil.rmtree(command[-1], ignore_errors=True)
        shutil.copytree(empty, command[-1], symlinks=True)

    monkeypatch.setattr(environment, "_call", call)
    return calls


@pytest.fixture
def tool(package: Path) -> Iterator[type[ScriptedTool]]:
    with fake_tools.fake(requirements=(str(package),), installing={"FLAVOUR": "plain"}) as kind:
        yield kind


def test_it_is_made_once_and_holds_what_is_asked_for(
    tool: type[ScriptedTool], calls: list[list[str]], tmp_path: Path
) -> None:
    python = python_of(tool, tmp_path, make=True)
    said = subprocess.run([python, "-Ic", "import tinypackage; print(tinypackage.built_with)"], capture_output=True)
    assert said.stdout.strip() == b"plain"
    assert (tmp_path / "fake" / "constraints.txt").read_text() == f"torch=={torch.__version__.split('+')[0]}\n"
    assert [torch_requirement() in command for command in calls] == [False, True, False]  # venv, PyTorch, the rest
    assert "--constraint" in calls[1]
    assert "--constraint" in calls[2]
    calls.clear()
    assert python_of(tool, tmp_path, make=False) == python
    assert calls == []


@pytest.mark.slow  # two virtual environments
def test_a_changed_list_and_a_half_made_environment_are_made_again(
    tool: type[ScriptedTool], copying: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python_of(tool, tmp_path, make=True)
    left = tmp_path / "fake" / "left-over"
    left.touch()
    with fake_tools.fake(requirements=()) as changed:
        with pytest.raises(
            ExternalToolError, match="has other requirements or is incomplete; --make-environments makes it"
        ):
            python_of(changed, tmp_path, make=False)
        python_of(changed, tmp_path, make=True)
        assert not left.exists()
        (tmp_path / "fake" / "gyroquant-ready").unlink()  # as a kill leaves it
        copying.clear()
        python_of(changed, tmp_path, make=True)
        assert len(copying) == 2
        monkeypatch.setattr(environment.torch, "__version__", "9.9.9+cpu")
        with pytest.raises(ExternalToolError, match="has other requirements"):
            python_of(changed, tmp_path, make=False)


def test_without_leave_nothing_is_made(tool: type[ScriptedTool], calls: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(ExternalToolError, match=r"fake.*does not exist; --make-environments makes it"):
        python_of(tool, tmp_path, make=False)
    assert calls == []


@pytest.mark.usefixtures("copying")
def test_what_cannot_be_installed_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    with (
        fake_tools.fake(requirements=(str(missing),)) as kind,
        pytest.raises(ExternalToolError, match=r"fake cannot be installed: .*nowhere"),
    ):
        python_of(kind, tmp_path, make=True)
    assert not (tmp_path / "fake").exists()


def test_a_full_disk_says_so_and_gives_the_space_back(
    tool: type[ScriptedTool], copying: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ExternalToolError, match=r"cannot be made in .*fake: .*No space left on device"):
        python_of(tool, tmp_path, make=True)
    assert not (tmp_path / "fake").exists()


def test_an_environment_that_python_cannot_make_says_why(tool: type[ScriptedTool], tmp_path: Path) -> None:
    (tmp_path / "fake").touch()  # a file where the folder would be
    with pytest.raises(ExternalToolError, match=r"fake cannot be installed: .*fake"):
        python_of(tool, tmp_path, make=True)


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("Collecting a\nERROR: No matching distribution found for a==9\nWARNING: old pip", "No matching distribution"),
        ("ERROR: Cannot install a and b\nERROR: ResolutionImpossible: for help visit", "Cannot install a and b"),
        ("one\ntwo\n[notice] a new release\n", "two"),
        ("", "it printed nothing"),
    ],
)
def test_the_line_that_says_why(output: str, line: str) -> None:
    assert meaningful_line(output).startswith(line)


def test_the_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GYROQUANT_ENVIRONMENTS", "/elsewhere")
    assert default_folder() == Path("/elsewhere")
    monkeypatch.delenv("GYROQUANT_ENVIRONMENTS")
    assert default_folder() == Path.home() / ".cache" / "gyroquant" / "environments"
