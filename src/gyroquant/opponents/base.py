"""What a program is that we are compared with: what it can be asked for, and what it deploys."""

from __future__ import annotations

import json
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from gyroquant.errors import InputError
from gyroquant.models.source import open_model
from gyroquant.processes import KilledError, bound

SIDES = Path(__file__).parent / "sides"
LARGEST_RELOAD_ERROR = 0.1  # of the logits' size; what fp16 scales and activations change is far below
_TAIL = 2000  # characters of what a program printed that its failure is told with
_KILLS = ("SIGKILL", "SIGTERM")  # by which a system that is out of memory ends programs; others are their own fault


@dataclass(frozen=True)
class Size:
    """The size that everybody is asked for: `group_size` input channels share a scale, -1 is a whole row."""

    bits: int
    group_size: int
    symmetric: bool = False


@dataclass(frozen=True)
class Task:
    """One run of an opponent.

    `model` is a Hugging Face folder with plain weights and a tokenizer; `tokens` a safetensors file that holds the
    calibration text as `tokens`, shape (samples, length), int64; `out` an empty folder that the run may fill.
    """

    model: Path
    tokens: Path
    out: Path
    size: Size
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What an opponent deployed.

    `dense` is what our own evaluation opens: a Hugging Face folder with the weights that its files stand for, or a
    GGUF file. `true_bits` is everything its files store for the rounded layers of the blocks, over the number of their
    weights. `bytes` is the size of its own files, with 16 bits for every entry of what is not rounded (embedding, head,
    norms, biases), as in ours: how wide that is there depends on how wide we handed it over, not on the program.
    `file_bytes` is their size as they are. `seconds` and `peak_memory_bytes` are of its own process, with loading and
    saving.
    """

    dense: Path
    true_bits: float
    bytes: int
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str] = field(default_factory=dict)
    file_bytes: int = 0

    @classmethod
    def reported(
        cls, program: str, report: Mapping[str, Any], dense: Path, files: Path, *, true_bits: float, wide: int
    ) -> Outcome:
        """What a script that has ended well says of its run.

        `files` is the folder of the program's own, and `wide` how many bytes of that go beyond 16 bits an entry of what
        is not rounded. Raises OpponentError if the weights that are to be evaluated are not finite, or if their logits
        differ from those of what the program runs by more than LARGEST_RELOAD_ERROR.
        """
        try:
            store = open_model(dense)
            for name in store.shapes:
                store.read([name])  # which refuses what is not finite
        except InputError as error:
            raise OpponentError(f"{program} deployed no usable weights: {error}") from error
        difference = report["reload_error"]
        if not difference <= LARGEST_RELOAD_ERROR:  # not: NaN
            raise OpponentError(
                f"the files of {program} do not stand for what it runs: the logits differ by {difference:.3g} of their "
                f"size, more than {LARGEST_RELOAD_ERROR:g}"
            )
        size, measured = folder_bytes(files), (report["seconds"], report["peak_memory_bytes"], report["versions"])
        return cls(dense, true_bits, size - wide, *measured, size)


class OpponentError(InputError):
    """An opponent that cannot run, or did not; the message is the reason that a comparison shows."""


class Opponent(ABC):
    """A program that we are compared with. Instances hold nothing; a file each, registered by being a subclass."""

    kinds: ClassVar[dict[str, type[Opponent]]] = {}

    name: ClassVar[str]
    home: ClassVar[str]
    """Where it is to be had: owner/name on GitHub."""
    requirements: ClassVar[tuple[str, ...]]
    """What pip installs into its own environment, pinned, beside our own version of PyTorch."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Ways to use it, by name, and the settings of each; they are part of what a result is named by."""
    rotated: ClassVar[frozenset[str]] = frozenset()
    """The variants that change the basis which weights are rounded in; not part of what a result is named by."""
    fixed: ClassVar[frozenset[str]] = frozenset()
    """The variants that neither calibrate nor draw anything at random; not part of what a result is named by."""
    installing: ClassVar[Mapping[str, str]] = {}
    """Environment variables while it is installed."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            Opponent.kinds[cls.name] = cls

    @classmethod
    def rotates(cls, variant: str) -> bool:
        """Whether a variant changes the basis which weights are rounded in."""
        return variant in cls.rotated

    @classmethod
    def varies(cls, variant: str) -> bool:
        """Whether what a variant deploys depends on its seed, or on the calibration text."""
        return variant not in cls.fixed

    @abstractmethod
    def problem(self, variant: str, size: Size) -> str:
        """Why it cannot be asked for this size, in a line; empty if it can."""

    @abstractmethod
    def run(self, variant: str, task: Task, python: Path) -> Outcome:
        """Has it quantize a model with the interpreter of its environment.

        Raises OpponentError with the reason when it fails, and KilledError when something else has killed it.
        """


def run_side(python: Path, script: str, arguments: list[str], report: Path) -> Any:
    """Runs a script of `sides` with another interpreter and returns the JSON that it wrote to `report`.

    Scripts never import gyroquant. What they print goes to a log beside the report. Raises OpponentError with the end
    of it when they fail or write nothing, KilledError when they are killed for want of memory. On Linux the script does
    not outlive the thread that calls.
    """
    log = report.with_suffix(".log")
    with log.open("w") as sink:
        command = bound([str(python), "-I", str(SIDES / script), *arguments, "--report", str(report)])
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, check=False)
    status = done.returncode
    if status < 0 and signal.Signals(-status).name in _KILLS:
        raise KilledError(_reason(script, status, log), -status)
    if status != 0 or not report.exists():
        raise OpponentError(_reason(script, status, log))
    return json.loads(report.read_text())


def _reason(script: str, status: int, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace")[-_TAIL:].splitlines() if line.strip()]
    last = lines[-1] if lines else "it printed nothing"
    if status < 0:
        return f"{script} was killed by {signal.Signals(-status).name}; its last line: {last}"
    return f"{script} ended with status {status}: {last}"


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


__all__ = [
    "LARGEST_RELOAD_ERROR",
    "SIDES",
    "Opponent",
    "OpponentError",
    "Outcome",
    "Size",
    "Task",
    "folder_bytes",
    "run_side",
]
