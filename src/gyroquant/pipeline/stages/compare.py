"""Compares the model as it was read with the one that transformers runs."""

from __future__ import annotations

from gyroquant.models.execution.compare_with_transformers import Comparison, compare_with_transformers
from gyroquant.models.stores.base import WeightStore
from gyroquant.pipeline.stages.base import RunContext, Stage
from gyroquant.system.progress import Progress


class Compare(Stage):
    """Refuses a model that was read wrongly. Writes `opened` in the manifest: the difference from transformers."""

    name, journal_key = "compare with transformers", "opened"

    def run(self, context: RunContext) -> None:
        job = context.job
        job.state.results["opened"] = context.journal.stage(
            self.journal_key, lambda: compare_store(job.store, context.progress).to_dict()
        )


def compare_store(store: WeightStore, progress: Progress) -> Comparison:
    """Compares a model as it was read with the one that transformers runs; see `compare_with_transformers`."""
    with progress.stage(Compare.name, len(store.graph.blocks)) as advance:
        return compare_with_transformers(store, advance)
