"""How much memory and disk a quantization will take, reckoned from the sizes of what is alive at once.

Nothing is run and no weight is read, so that a run that cannot fit is refused before any work. Where the numbers come
from is said at each; `gyroquant.predict` measures the same stages on one block.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gyroquant.environment import available_memory, resident_memory_bytes, size
from gyroquant.errors import InputError
from gyroquant.estimate.reckoning import Reckoning, hidden_bytes, most_workers, observer_bytes
from gyroquant.export.folder import check_rooms, left_behind
from gyroquant.job import Job, expected_bytes

_JOURNAL = 3  # copies of the hidden states in the journal: behind the last two blocks, and the one being written


@dataclass(frozen=True)
class Stage:
    """A part of a run: its peak of resident memory in bytes, that of workers here included, and its seconds where they
    were measured.
    """

    name: str
    peak_memory_bytes: int
    seconds: float | None = None


@dataclass(frozen=True)
class Prediction:
    """What a whole run takes. `disk_bytes` is the size of the result, `scratch_bytes` what else is on disk meanwhile:
    the pieces that it is put together from, and hidden states.
    """

    stages: tuple[Stage, ...]
    disk_bytes: int
    scratch_bytes: int
    hidden_bytes: int = 0
    """Of one set of hidden states, in memory or in files of `offload`."""

    @property
    def seconds(self) -> float:
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def peak_memory_bytes(self) -> int:
        return max(stage.peak_memory_bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        totals = {"seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes}
        return totals | asdict(self) | {"stages": [asdict(stage) for stage in self.stages]}


def estimate(job: Job) -> Prediction:
    """Memory of every stage and disk of a job, without running any of it; no times."""
    reckoned = Reckoning(job)
    stages = tuple(Stage(name, size) for name, size in reckoned.totals())
    return Prediction(stages, *disk(job), reckoned.hidden)


def disk(job: Job) -> tuple[int, int]:
    """Bytes on disk: of the result, and of what lies beside it while a job runs, which is the journal's rounded blocks
    and hidden states: with workers those that enter the block of each of them.
    """
    result = expected_bytes(job)
    return result, result + (most_workers(job) or _JOURNAL) * hidden_bytes(job)


def check_fits(job: Job) -> None:
    """Raises InputError when a job needs more memory, or room on a disk, than there is, and says what to change.

    What a run before has left beside the destination is room: it is gone on from, or removed. Workers count with all
    that they hold, each with hidden states of its own, in memory or in a file of `offload`. One is asked for room in
    memory at the least, since no more are started here than there is room for; those of a cluster elsewhere are not
    counted in memory, and on disk as many as were asked for.
    """
    found, out, offload = estimate(job), job.output.folder, job.output.offload
    needs = [(out, max(0, found.disk_bytes + found.scratch_bytes - left_behind(out)))]
    if offload is not None:
        needs.append((offload, found.hidden_bytes * (1 + most_workers(job))))
    check_rooms(needs)
    if job.output.device.type != "cpu":
        return
    worst = max(found.stages, key=lambda stage: stage.peak_memory_bytes)
    needed, there = worst.peak_memory_bytes - resident_memory_bytes(), available_memory()
    if needed > there:
        remedy = _remedy(job, found, worst.name, needed - there)
        raise InputError(
            f"{job.recipe.name} needs about {size(needed)} of memory for {job.store.label} (stage "
            f"{worst.name!r}), and {size(there)} are available: {remedy}"
        )


def _remedy(job: Job, found: Prediction, stage: str, lacking: int) -> str:
    """What would bring the need of a stage down, the surest first."""
    settings, learn, remedies = job.recipe.calibration, job.recipe.learn, list[str]()
    apart = stage == "round" and job.output.workers is not None
    held = found.hidden_bytes if job.output.offload is None or stage == "finish" else 0
    held *= 2 if apart else 1  # of this process and of a worker
    if stage == "learn" and learn is not None and learn.objective in ("cross_entropy", "kl"):
        remedies.append("learn a block at a time (--set learn.objective=blocks)")
    elif stage == "prove":
        remedies.append("prove on less text (--set proof.nsamples=1)")
    elif held:
        if stage != "finish":
            enough = "" if held >= lacking else ", which is not enough alone"
            remedies.append(f"keep {size(held)} of hidden states on disk with --offload DIR{enough}")
        fewer = int(settings.nsamples * (1 - lacking / held))
        remedies.append(f"use --nsamples {fewer}" if fewer > 0 else f"use fewer --nsamples than {settings.nsamples}")
    if stage == "finish":
        remedies.append("leave the last touch out (--set finish=null)")
    if apart:
        remedies.append("round one block after the other, without --workers and --ray")
    if stage in ("learn", "allocate", "finish"):
        remedies.append(f"use a --seqlen shorter than {settings.seqlen}")
    return "; ".join([*remedies, "free some memory, or take a machine with more"])


__all__ = ["Prediction", "Reckoning", "Stage", "check_fits", "disk", "estimate", "hidden_bytes", "observer_bytes"]
