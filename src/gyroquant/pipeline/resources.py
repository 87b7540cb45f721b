"""Memory and disk of a quantization, computed from the sizes of the data that each stage holds at once.

Nothing runs and no weight is read, so a run that cannot fit is refused before any work. The formula of each stage is in
its `memory` method. `gyroquant.inspection.dry_run` measures the same stages on one block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from gyroquant.errors import InputError
from gyroquant.formats.output_folder import check_rooms, left_behind
from gyroquant.pipeline.job import Job
from gyroquant.pipeline.memory_model import MemoryModel, hidden_bytes, most_workers, observer_bytes
from gyroquant.pipeline.sizes import expected_bytes
from gyroquant.pipeline.stages import STAGES, Shortage, Stage
from gyroquant.system.environment import available_memory, resident_memory_bytes, size

_JOURNAL = 3  # copies of the hidden states in the journal: after the last two blocks, and the one being written


@dataclass(frozen=True)
class StageEstimate:
    """The estimate for one stage.

    - `name`: the name of the stage.
    - `peak_memory_bytes`: its peak of resident memory, including workers on this machine.
    - `seconds`: its time; None if it was not measured.
    """

    name: str
    peak_memory_bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class ResourceEstimate:
    """The estimate for a whole run.

    - `stages`: the estimates of its stages.
    - `disk_bytes`: the size of the result.
    - `scratch_bytes`: further disk space during the run, for the pieces of the result and for hidden states.
    """

    stages: tuple[StageEstimate, ...]
    disk_bytes: int
    scratch_bytes: int
    hidden_bytes: int = 0
    """The size of one set of hidden states, in memory or in files of `offload`."""

    @property
    def seconds(self) -> float:
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def peak_memory_bytes(self) -> int:
        return max(stage.peak_memory_bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        totals = {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes}
        return totals | asdict(self) | {"stages": [asdict(stage) for stage in self.stages]}


def estimate(job: Job) -> ResourceEstimate:
    """Estimates memory of every stage and disk space of a job, without running it. Times are not estimated."""
    model = MemoryModel(job)
    stages = tuple(StageEstimate(stage.name, size) for stage, size in _needs(model))
    return ResourceEstimate(stages, *disk(job), model.hidden)


def _needs(model: MemoryModel) -> Iterator[tuple[Stage, int]]:
    """The stages of a job whose memory is estimated, and the total resident memory that each needs, in bytes."""
    for stage in STAGES:
        needed = stage.memory(model) if stage.applies(model.job) else None
        if needed is not None:
            yield stage, model.base + int(needed)


def disk(job: Job) -> tuple[int, int]:
    """Bytes on disk: of the result, and of the journal while the job runs.

    The journal holds the rounded blocks and hidden states. With workers, these are the inputs of each worker's block.
    """
    result = expected_bytes(job)
    return result, result + (most_workers(job) or _JOURNAL) * hidden_bytes(job)


def check_fits(job: Job) -> None:
    """Raises InputError, with remedies, if a job needs more memory or disk space than is available.

    - Files that an earlier run left beside the destination count as free space: this run continues or removes them.
    - Each worker counts with its own hidden states, in memory or in a file of `offload`.
    - Memory must suffice for one worker on this machine, because no more are started than fit.
    - Workers of a remote cluster need no memory here. On disk, all requested workers count.
    """
    model, out, offload = MemoryModel(job), job.output.folder, job.output.offload
    result, scratch = disk(job)
    needs = [(out, max(0, result + scratch - left_behind(out)))]
    if offload is not None:
        needs.append((offload, model.hidden * (1 + most_workers(job))))
    check_rooms(needs)
    if job.output.device.type != "cpu":
        return
    stage, peak = max(_needs(model), key=lambda need: need[1])
    needed, available = peak - resident_memory_bytes(), available_memory()
    if needed > available:
        remedies = stage.remedies(job, Shortage(needed - available, model.hidden))
        advice = "; ".join([*remedies, "free some memory, or take a machine with more"])
        raise InputError(
            f"{job.recipe.name} needs about {size(needed)} of memory for {job.store.label} (stage "
            f"{stage.name!r}), and {size(available)} are available: {advice}"
        )


__all__ = [
    "MemoryModel",
    "ResourceEstimate",
    "StageEstimate",
    "check_fits",
    "disk",
    "estimate",
    "hidden_bytes",
    "observer_bytes",
]
