"""The interface of an external tool: which variants and sizes it supports, and what a run of it returns."""

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
from gyroquant.models.stores.source import open_model
from gyroquant.registry import Registry
from gyroquant.system.subprocesses import KilledError, bound

RUNNERS = Path(__file__).parent / "runners"
LARGEST_RELOAD_ERROR = 0.1  # relative to the logits' norm; fp16 scales and activations cause far less
_TAIL = 2000  # characters at the end of a log in which the reason of a failure is looked for
_KILLS = ("SIGKILL", "SIGTERM")  # the signals of a system that is out of memory; others are the program's own failure


@dataclass(frozen=True)
class Size:
    """The size of a quantization.

    bits: bits of a code.
    group_size: input channels that share a scale; -1 is a whole row.
    symmetric: no zero points. Default False.
    """

    bits: int
    group_size: int
    symmetric: bool = False


@dataclass(frozen=True)
class Task:
    """One run of an external tool.

    model: a Hugging Face folder with plain weights and a tokenizer.
    tokens: a safetensors file with the calibration text as `tokens`, shape (samples, length), int64.
    out: an empty folder for the files of the run.
    size: the requested size.
    seed: the seed. Default 0.
    """

    model: Path
    tokens: Path
    out: Path
    size: Size
    seed: int = 0


@dataclass(frozen=True)
class ToolResult:
    """The result of an external tool.

    dense: the model for our evaluation: a Hugging Face folder with the decoded weights of the tool's files, or a GGUF
        file.
    true_bits: everything that the tool's files store for the rounded layers of the blocks, in bits per weight.
    bytes: size of the tool's files, with 16 bits for every entry that is not rounded (embedding, head, norms, biases).
        Our own sizes count the same way. In the files, the width of these entries depends on the input, not on the
        tool.
    seconds, peak_memory_bytes: of the tool's process, with loading and saving.
    versions: versions of the tool's packages.
    file_bytes: size of the tool's files as they are.
    weight_bytes: bytes of the tensors in the tool's files, by part of the model, and their `total`. Embedding and head
        count as the tool's own defaults leave them, plain numbers at most 16 bits each.
    """

    dense: Path
    true_bits: float
    bytes: int
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str] = field(default_factory=dict)
    file_bytes: int = 0
    weight_bytes: dict[str, int] = field(default_factory=dict)

    @classmethod
    def reported(
        cls,
        program: str,
        report: Mapping[str, Any],
        dense: Path,
        files: Path,
        *,
        true_bits: float,
        wide: int,
        weight_bytes: dict[str, int],
    ) -> ToolResult:
        """The result of a script that succeeded.

        program: the name of the tool.
        report: what the script wrote: reload_error, seconds, peak_memory_bytes, versions.
        dense: the model for our evaluation.
        files: the folder of the tool's own files.
        true_bits: true bits per weight.
        wide: bytes of `files` beyond 16 bits per entry, of the entries that are not rounded.
        weight_bytes: bytes of the tensors in `files` by part of the model.

        Raises ExternalToolError if the weights to evaluate are not finite, or if the logits of these weights differ
        from the tool's own logits by more than LARGEST_RELOAD_ERROR.
        """
        try:
            store = open_model(dense)
            for name in store.shapes:
                store.read([name])  # raises for values that are not finite
        except InputError as error:
            raise ExternalToolError(f"the weights of {program} are not usable: {error}") from error
        difference = report["reload_error"]
        if not difference <= LARGEST_RELOAD_ERROR:  # also true for NaN
            raise ExternalToolError(
                f"the files of {program} do not hold the model that it ran: the logits differ by {difference:.3g} of "
                f"their size, more than {LARGEST_RELOAD_ERROR:g}"
            )
        size, measured = folder_bytes(files), (report["seconds"], report["peak_memory_bytes"], report["versions"])
        return cls(dense, true_bits, size - wide, *measured, size, weight_bytes)


class ExternalToolError(InputError):
    """An external tool cannot run, or failed. A comparison shows the message as the reason."""


class ExternalTool(ABC):
    """An external tool. Instances have no state. A subclass with a `name` is registered under it."""

    registry: ClassVar[Registry[type[ExternalTool]]] = Registry("external tool", "gyroquant.benchmark.external_tools")

    name: ClassVar[str]
    home: ClassVar[str]
    """The repository: owner/name on GitHub."""
    requirements: ClassVar[tuple[str, ...]]
    """Pinned requirements of its environment, besides our own version of PyTorch. Part of the key of a result."""
    variants: ClassVar[Mapping[str, Mapping[str, Any]]]
    """The settings of each variant, by name. Part of the key of a result."""
    rotated: ClassVar[frozenset[str]] = frozenset()
    """The variants that change the basis in which weights are rounded. Not part of the key of a result."""
    fixed: ClassVar[frozenset[str]] = frozenset()
    """The variants that use neither calibration text nor random numbers. Not part of the key of a result."""
    outside_bits: ClassVar[float] = 1
    """A lower bound of the bits a weight that its files hold for embedding, head and the rest. Sizes that are too small
    for it are known by it before a run. Not part of the key of a result.
    """
    installing: ClassVar[Mapping[str, str]] = {}
    """Environment variables during installation."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "name" in cls.__dict__:
            ExternalTool.registry.add(cls.name, cls)

    @classmethod
    def rotates(cls, variant: str) -> bool:
        """Whether a variant changes the basis in which weights are rounded."""
        return variant in cls.rotated

    @classmethod
    def varies(cls, variant: str) -> bool:
        """Whether the result of a variant depends on the seed or the calibration text."""
        return variant not in cls.fixed

    @abstractmethod
    def problem(self, variant: str, size: Size) -> str:
        """The reason why a variant does not support a size, in one line. Empty if it does."""

    @abstractmethod
    def run(self, variant: str, task: Task, python: Path) -> ToolResult:
        """Quantizes a model with the interpreter `python` of the tool's environment.

        Raises ExternalToolError with the reason if the tool fails, and KilledError if the system killed it.
        """


def run_script(python: Path, script: str, arguments: list[str], report: Path) -> Any:
    """Runs a script of `runners` with another interpreter. Returns the JSON that the script wrote to `report`.

    Scripts never import gyroquant. Their output goes to a log beside the report. Raises ExternalToolError with the last
    line of the log if the script fails or writes no report, and KilledError if the system kills it because memory is
    short. On Linux the script ends when the calling thread ends.
    """
    log = report.with_suffix(".log")
    with log.open("w") as sink:
        command = bound([str(python), "-I", str(RUNNERS / script), *arguments, "--report", str(report)])
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, check=False)
    status = done.returncode
    if status < 0 and signal.Signals(-status).name in _KILLS:
        raise KilledError(_reason(script, status, log), -status)
    if status != 0 or not report.exists():
        raise ExternalToolError(_reason(script, status, log))
    return json.loads(report.read_text())


def _reason(script: str, status: int, log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace")[-_TAIL:].splitlines() if line.strip()]
    last = lines[-1] if lines else "it printed nothing"
    if status < 0:
        return f"{script} was killed by {signal.Signals(-status).name}; last line of its output: {last}"
    return f"{script} ended with status {status}; last line of its output: {last}"


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


__all__ = [
    "LARGEST_RELOAD_ERROR",
    "RUNNERS",
    "ExternalTool",
    "ExternalToolError",
    "Size",
    "Task",
    "ToolResult",
    "folder_bytes",
    "run_script",
]
