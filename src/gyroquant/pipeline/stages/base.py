"""The base class of a stage: how it runs, what the journal keeps of it, and its memory and time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from gyroquant.formats.native.writer import Writer
from gyroquant.formats.output_folder import OutputFolder
from gyroquant.pipeline.cost_probe import CostProbe, StageCost
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel
from gyroquant.pipeline.quantize_model import writer_for
from gyroquant.system.environment import size
from gyroquant.system.journal import Journal
from gyroquant.system.progress import Progress


@dataclass
class RunContext:
    """The objects that the stages of a run share. `opened` closes at the end of the run what the stages have opened."""

    job: Job
    journal: Journal
    progress: Progress
    opened: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def folder(self) -> OutputFolder:
        """The folder that becomes the result. It is created on the disk at its first use."""
        return self.opened.enter_context(OutputFolder(self.job.output.folder, self.job.output.overwrite))

    @cached_property
    def writer(self) -> Writer:
        """Writes rounded layers and all else into the folder."""
        return writer_for(self.job, self.folder)


@dataclass(frozen=True)
class Shortage:
    """A lack of memory in a stage: `lacking` bytes, in a run whose hidden states take `hidden_bytes`."""

    lacking: int
    hidden_bytes: int


class Stage(ABC):
    """One stage of a quantization.

    - ``name``: the name in progress bars, estimates and messages.
    - ``journal_key``: the name of its data in the journal; if there are several files, the common start of their names.
      Empty if the journal keeps nothing. Then the stage is repeated when an interrupted run continues.
    """

    name: ClassVar[str]
    journal_key: ClassVar[str] = ""

    def applies(self, job: Job) -> bool:
        """Whether a job has this stage."""
        return True

    @abstractmethod
    def run(self, context: RunContext) -> None:
        """Does the work, or reads its result from the journal. The result goes into the state of the job."""

    def memory(self, model: MemoryModel) -> float | None:
        """Bytes that the stage needs in addition to `model.base`, computed from sizes alone.

        None if another stage always needs more.
        """
        return None

    def cost(self, probe: CostProbe) -> StageCost | None:
        """The cost of the stage, measured on a part of it; None if `memory` returns None."""
        return None

    def remedies(self, job: Job, shortage: Shortage) -> list[str]:
        """Changes that lower the memory of this stage, the most reliable first."""
        return less_hidden(job, shortage, 0 if job.output.offload is not None else shortage.hidden_bytes)


def less_hidden(job: Job, shortage: Shortage, held: int) -> list[str]:
    """Remedies for a stage that holds `held` bytes of hidden states in memory."""
    if not held:
        return []
    enough = "" if held >= shortage.lacking else ", which is not enough alone"
    return [
        f"keep {size(held)} of hidden states on disk with --offload DIR{enough}",
        *fewer_samples(job, shortage, held),
    ]


def fewer_samples(job: Job, shortage: Shortage, held: int) -> list[str]:
    """A remedy with the number of samples that makes `held` bytes of hidden states small enough."""
    samples = job.recipe.calibration.nsamples
    if not held:
        return []
    fewer = int(samples * (1 - shortage.lacking / held))
    return [f"use --nsamples {fewer}" if fewer > 0 else f"use fewer --nsamples than {samples}"]


def shorter_windows(job: Job) -> str:
    """A remedy for a stage whose memory grows with the length of a window."""
    return f"use a --seqlen shorter than {job.recipe.calibration.seqlen}"
