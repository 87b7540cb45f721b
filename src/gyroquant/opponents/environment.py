"""A virtual environment of an opponent's own, made when asked for: its packages never meet ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from gyroquant.opponents.base import Opponent, OpponentError
from gyroquant.processes import bound
from gyroquant.progress import Stages

_READY = "gyroquant-ready"  # holds what was installed; written last, so an environment without it is half made
_VARIABLE = "GYROQUANT_ENVIRONMENTS"


def default_folder() -> Path:
    """Where environments are kept: $GYROQUANT_ENVIRONMENTS, or the user's cache."""
    return Path(os.environ.get(_VARIABLE) or Path.home() / ".cache" / "gyroquant" / "environments")


def python_of(opponent: type[Opponent], folder: Path, make: bool, progress: Stages | None = None) -> Path:
    """The interpreter of an opponent's environment, `folder`/name.

    With `make`, an environment that is missing, half made or of other requirements is made again. PyTorch goes in first
    and nothing later replaces it: our own version, of whatever build pip finds; on Linux that is the one for CUDA
    unless pip is configured otherwise (PIP_EXTRA_INDEX_URL). Raises OpponentError without `make`, and with pip's reason
    when something cannot be installed.
    """
    place = folder.expanduser().absolute() / opponent.name
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = _digest(opponent)
    ready = place / _READY
    if python.exists() and ready.exists() and ready.read_text() == wanted:
        return python
    if not make:
        state = "is of other requirements or half made" if place.exists() else "does not exist"
        raise OpponentError(f"the environment of {opponent.name} ({place}) {state}; --make-environments makes it")
    try:
        _make(opponent, place, python, progress or Stages())
        ready.write_text(wanted)
    except OSError as error:  # no disk left, no right to write
        shutil.rmtree(place, ignore_errors=True)
        raise OpponentError(f"the environment of {opponent.name} cannot be made in {place}: {error}") from error
    except OpponentError:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return python


def torch_requirement() -> str:
    """Our own version of PyTorch as a requirement, without the build (+cpu)."""
    return f"torch=={torch.__version__.partition('+')[0]}"


def _digest(opponent: type[Opponent]) -> str:
    parts = [torch_requirement(), *opponent.requirements, *(f"{k}={v}" for k, v in sorted(opponent.installing.items()))]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _make(opponent: type[Opponent], place: Path, python: Path, progress: Stages) -> None:
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(place)],
        # some programs are built here, against the PyTorch that is there, and expect these two
        [*_pip(python, place), torch_requirement(), "setuptools", "wheel"],
        [*_pip(python, place), *opponent.requirements],
    ]
    if not opponent.requirements:
        del steps[2]
    with progress.stage(f"environment of {opponent.name}", len(steps)) as advance:
        for number, command in enumerate(steps):
            if number == 1:
                (place / "constraints.txt").write_text(torch_requirement() + "\n")
            _call(opponent, command)
            advance()


def _pip(python: Path, place: Path) -> list[str]:
    pip = [str(python), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    return [*pip, "--constraint", str(place / "constraints.txt")]


def _call(opponent: type[Opponent], command: list[str]) -> None:
    done = subprocess.run(
        bound(command),
        env=os.environ | dict(opponent.installing),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise OpponentError(f"{opponent.name} cannot be installed: {meaningful_line(done.stdout)}")


def meaningful_line(output: str) -> str:
    """The line of pip's output that says why: its last error that is not a pointer to help, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:") and "ResolutionImpossible" not in line]
    said = [line for line in lines if not line.startswith(("WARNING:", "[notice]"))]
    return (errors or said or ["it printed nothing"])[-1].removeprefix("ERROR: ")


__all__ = ["default_folder", "meaningful_line", "python_of", "torch_requirement"]
