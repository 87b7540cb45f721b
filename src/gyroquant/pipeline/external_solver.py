"""Rounding by an external solver, which gets the whole transformed model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gyroquant.grids import QuantizedWeight
from gyroquant.models.execution.online import OnlineOp, attach
from gyroquant.models.folding.in_memory import build_folded
from gyroquant.pipeline.job import Job
from gyroquant.system.progress import Progress


def run_external_solver(job: Job, progress: Progress) -> dict[str, QuantizedWeight]:
    """Rounds a job's targets with its external solver; returns them by the name of the weight. Empty for other solvers.

    External solvers replace linear layers by their own modules, which do not run the hooks of the layers. So a layer
    with a hook is put into a container, and the container gets the hook.
    """
    solver = job.recipe.weights.solver
    if not solver.needs_model:
        return {}
    assert job.tokens is not None
    with progress.stage("external solver", 1) as advance:
        model = build_folded(job.store, job.plan)
        online = [online for index in range(len(job.graph.blocks)) for online in job.running_in(index)]
        names = {op.module: _in_container(model, op.module, online) for op in job.targets.values()}
        attach(model, [*online, *job.running_around()])
        layers = {names[op.module]: job.grids[name] for name, op in job.targets.items()}
        with torch.enable_grad():
            rounded = solver.quantize_model(model, layers, job.tokens, job.tokenizer, job.recipe.seed)
        advance()
    return {name: rounded[names[op.module]] for name, op in job.targets.items()}


def _in_container(model: Any, name: str, online: list[OnlineOp]) -> str:
    """Puts a layer into a container if an online operation is attached to it; returns the layer's name in the model."""
    if all(op.module != name for op in online):
        return name
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, nn.Sequential(model.get_submodule(name)))
    return f"{name}.0"
