"""The virtual environment of an external tool, made on request. Its packages are separate from ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from gyroquant.benchmark.external_tools.base import ExternalTool, ExternalToolError
from gyroquant.system.progress import Progress
from gyroquant.system.subprocesses import bound

_READY = "gyroquant-ready"  # digest of the requirements; written last, so an environment without it is incomplete
_VARIABLE = "GYROQUANT_ENVIRONMENTS"


def default_folder() -> Path:
    """The folder of the environments: $GYROQUANT_ENVIRONMENTS, or a folder in the user's cache."""
    return Path(os.environ.get(_VARIABLE) or Path.home() / ".cache" / "gyroquant" / "environments")


def python_of(tool: type[ExternalTool], folder: Path, make: bool, progress: Progress | None = None) -> Path:
    """The interpreter of an external tool's environment, `folder`/name.

    With `make`, an environment that is missing, incomplete or has other requirements is made again. PyTorch is
    installed first and a constraint keeps it: our own version, in the build that pip finds. On Linux that is the CUDA
    build unless pip is configured otherwise (PIP_EXTRA_INDEX_URL). Raises ExternalToolError if the environment is
    missing and `make` is False, and with pip's reason if a package cannot be installed.
    """
    place = folder.expanduser().absolute() / tool.name
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    expected = _digest(tool)
    ready = place / _READY
    if python.exists() and ready.exists() and ready.read_text() == expected:
        return python
    if not make:
        state = "has other requirements or is incomplete" if place.exists() else "does not exist"
        raise ExternalToolError(f"the environment of {tool.name} ({place}) {state}; --make-environments makes it")
    try:
        _make(tool, place, python, progress or Progress())
        ready.write_text(expected)
    except OSError as error:  # the disk is full, or the folder is not writable
        shutil.rmtree(place, ignore_errors=True)
        raise ExternalToolError(f"the environment of {tool.name} cannot be made in {place}: {error}") from error
    except ExternalToolError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return python


def torch_requirement() -> str:
    """Our own version of PyTorch as a requirement, without the build (such as +cpu)."""
    return f"torch=={torch.__version__.partition('+')[0]}"


def _digest(tool: type[ExternalTool]) -> str:
    parts = [torch_requirement(), *tool.requirements, *(f"{k}={v}" for k, v in sorted(tool.installing.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _make(tool: type[ExternalTool], place: Path, python: Path, progress: Progress) -> None:
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(place)],
        # some tools are built during installation, against the installed PyTorch, and need setuptools and wheel
        [*_pip(python, place), torch_requirement(), "setuptools", "wheel"],
        [*_pip(python, place), *tool.requirements],
    ]
    if not tool.requirements:
        del steps[2]
    with progress.stage(f"environment of {tool.name}", len(steps)) as advance:
        for number, command in enumerate(steps):
            if number == 1:
                (place / "constraints.txt").write_text(torch_requirement() + "\n")
            _call(tool, command)
            advance()


def _pip(python: Path, place: Path) -> list[str]:
    pip = [str(python), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    return [*pip, "--constraint", str(place / "constraints.txt")]


def _call(tool: type[ExternalTool], command: list[str]) -> None:
    done = subprocess.run(
        bound(command),
        env=os.environ | dict(tool.installing),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise ExternalToolError(f"{tool.name} cannot be installed: {meaningful_line(done.stdout)}")


def meaningful_line(output: str) -> str:
    """The line of pip's output with the reason: the last error that is not a pointer to help, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:") and "ResolutionImpossible" not in line]
    others = [line for line in lines if not line.startswith(("WARNING:", "[notice]"))]
    return (errors or others or ["it printed nothing"])[-1].removeprefix("ERROR: ")


__all__ = ["default_folder", "meaningful_line", "python_of", "torch_requirement"]
